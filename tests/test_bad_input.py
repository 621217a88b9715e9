"""What users get wrong ends with exit code 2 and one line that says what to do instead.

That a running engine survives bad requests is in test_engine.py, bad lines of a batch file are
in test_generate.py, and what the server answers is in tests/serve.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import CommandLine
from tests.conftest import ROOT
from tests.runtime import tiny
from tests.weights.checkpoints import LLAMA, random_tensors, write_gguf


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    (folder / "requests.jsonl").write_text('{"prompt": "Hello", "max_tokens": 3}')
    return tiny.write_config(folder / "config.yaml", folder)


@pytest.fixture
def octavo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def assert_refused(octavo: CommandLine, arguments: tuple[object, ...], *messages: str) -> None:
    """The command ends with code 2, prints nothing but one line, and that says all of it."""
    ended = octavo(*arguments)
    lines = [line for line in ended.err.splitlines() if not line.endswith(" …")]  # progress
    assert (ended.code, ended.out, len(lines)) == (2, "", 1), ended
    assert lines[0].startswith("octavo: ")
    for message in messages:
        assert message in lines[0]


def generate(config: Path, *more: object, output: object = None) -> tuple[object, ...]:
    source = config.parent / "requests.jsonl"
    output = output or config.parent / "answers.jsonl"
    return ("generate", "-c", config, "-i", source, "-o", output, *more)


@pytest.mark.parametrize("command", ["generate", "serve"])
@pytest.mark.parametrize(
    ("setting", "messages"),
    [
        ("model.dtyp=float32", ("unknown key model.dtyp", "did you mean model.dtype?")),
        ("cach.num_blocks=3", ("unknown key cach", "did you mean cache?")),
        ("nonsense=1", ("unknown key nonsense", "known: model, mesh, cache")),
        ("model.dtype=float16", ("model.dtype is 'float16'", "float32, bfloat16")),
        ("model.dtype", ("--set takes key=value",)),
        ("cache.num_blocks=lots", ("cache.num_blocks", "'lots' is not a number", "512MiB")),
        ("cache.num_blocks=-1", ("cache.num_blocks is -1", "at least 1")),
        ("cache.block_size=17", ("cache.block_size is 17", "power of two from 8 to 256")),
        ("cache.memory=1MiB", ("either cache.num_blocks or cache.memory",)),
        ("cache.host_memory=-1", ("cache.host_memory is -1", "at least 0")),
        ("cache.host_memory=1", ("cache.host_memory is 1 bytes, but one block", "raise it")),
        ("cache.host_memory=1000TiB", ("but this machine has", "lower it")),
        ("attention.backend=cuda", ("attention.backend is 'cuda'", "auto, tpu, gpu, cpu, xla")),
        ("cache.dtype=int4", ("cache.dtype is 'int4'", "float32, bfloat16, float8_e4m3fn, int8")),
        ("model.max_model_len=.nan", ("model.max_model_len",)),
    ],
)
def test_a_config_that_makes_no_sense(
    octavo: CommandLine, config: Path, command: str, setting: str, messages: tuple[str, ...]
) -> None:
    arguments = generate(config) if command == "generate" else ("serve", "-c", config)
    assert_refused(octavo, (*arguments, "--set", setting), *messages)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"model: [", "is not valid YAML"),
        (b"- a list", "must hold a mapping"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"", "must hold a mapping"),
        (b"cache: {num_blocks: 4}", "model"),
    ],
)
def test_a_config_file_that_is_none(
    octavo: CommandLine, tmp_path: Path, text: bytes, message: str
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(text)
    assert_refused(octavo, ("plan", "-c", file), str(file), message)
    assert_refused(octavo, ("plan", "-c", tmp_path), str(tmp_path), "Is a directory")


@pytest.mark.parametrize(
    ("setting", "messages"),
    [
        ("mesh.tensor=5", ("mesh.tensor is 5", "there are 4 devices", "lower it")),
        ("mesh.tensor=3", ("mesh.tensor is 3", "can't cut 4 query heads", "divisor of 4")),
        ("attention.backend=tpu", ("attention.backend", "'tpu' can't run", "cpu", "or xla")),
        ("attention.backend=gpu", ("attention.backend", "'gpu' can't run", "cpu", "or xla")),
        ("cache.dtype=int8", ("int8, which needs cache.scales", "octavo calibrate --config")),
        ("cache.scales=x.safetensors", ("held in float32, which takes none", "int8")),
        ("mesh.data=2", ("mesh.data is 2", "one server a replica")),
        ("model.max_model_len=4096", ("max_model_len is 4096", "at most 2048")),
        ("cache.num_blocks=4", ("max_model_len is 512", "enlarge the cache")),
        ("cache.num_blocks=2000000000", ("2000000000 blocks", "can be addressed")),
        ("model.source=/nowhere/model.gguf", ("/nowhere/model.gguf", "no such file", "hf:")),
        ("model.source=hf:../../etc", ("hf:../../etc",)),
    ],
)
def test_what_the_model_or_the_machine_can_not_do(
    octavo: CommandLine, config: Path, setting: str, messages: tuple[str, ...]
) -> None:
    assert_refused(octavo, generate(config, "--set", setting), *messages)
    assert not (config.parent / "answers.jsonl").exists()


def damaged(config: Path, folder: Path, name: str, content: bytes | None) -> Path:
    """A copy of the model in which one file is replaced, or missing."""
    shutil.copytree(config.parent, folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    return tiny.write_config(folder / "config.yaml", folder)


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("config.json", None, ("config.json",)),
        ("config.json", b"{", ("config.json",)),
        ("config.json", b'{"model_type": "bert"}', ("bert",)),
        ("model.safetensors", None, ("safetensors",)),
        ("model.safetensors", b"\xff" * 64, ("model.safetensors",)),
        ("tokenizer.json", None, ("has no tokenizer.json",)),
        ("tokenizer.json", b"{}", ("can't read", "tokenizer.json")),
        ("tokenizer_config.json", b"[]", ("tokenizer_config.json",)),
    ],
)
def test_a_model_folder_that_is_damaged(
    octavo: CommandLine,
    config: Path,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    messages: tuple[str, ...],
) -> None:
    copy = damaged(config, tmp_path / "copy", name, content)
    assert_refused(octavo, generate(copy), *messages)


def test_weights_that_are_cut_off(octavo: CommandLine, config: Path, tmp_path: Path) -> None:
    whole = (config.parent / "model.safetensors").read_bytes()
    copy = damaged(config, tmp_path / "copy", "model.safetensors", whole[:-100])
    assert_refused(octavo, generate(copy), "model.safetensors")
    gguf = write_gguf(tmp_path / "model.gguf", LLAMA, random_tensors(LLAMA))
    gguf.write_bytes(gguf.read_bytes()[:-100])
    assert_refused(octavo, generate(config, "--set", f"model.source={gguf}"), str(gguf), "tensor")
    assert_refused(octavo, ("convert", gguf, tmp_path / "converted"), str(gguf), "tensor")
    assert not (tmp_path / "converted").exists()


def test_files_that_can_not_be_read_or_written(
    octavo: CommandLine, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("the model was loaded in vain")

    monkeypatch.setattr("engine.loading.load_engine", never)
    none, file = tmp_path / "none", tmp_path / "file"
    file.write_text("")
    below = file / "below"
    missing, not_folder = "No such file or directory", "Not a directory"
    cases = (
        (("plan", "-c", none), (str(none), "see configs/")),
        (("generate", "-c", config, "-i", none, "-o", file), (str(none), missing)),
        (generate(config, output=tmp_path), (str(tmp_path), "Is a directory")),
        (generate(config, output=none / "out"), (str(none / "out"), missing)),
        (generate(config, output=below), (str(below), not_folder)),
        (generate(config, "--record", below), (str(below), not_folder)),
        (generate(config, "--record", tmp_path), (str(tmp_path), "Is a directory")),
        (("serve", "-c", config, "--record", below, "--set", "server.port=0"), (not_folder,)),
        (("replay", none), (str(none), missing)),
        (("replay", config), (f"{config}:1", "not JSON")),
        (("convert", none, tmp_path / "new"), (str(none), "no such file")),
        (("convert", config.parent, tmp_path, "--dtype", "float32"), (str(tmp_path),)),
        (("convert", config.parent, tmp_path / "new", "--dtype", "int4"), ("'int4'", "float32")),
    )
    for arguments, messages in cases:
        assert_refused(octavo, arguments, *messages)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (("--temperature", "nan"), ("temperature: nan is not a number in [0, 100]",)),
        (("--temperature", "-1"), ("temperature: -1.0 is not a number",)),
        (("--max-tokens", "0"), ("max_tokens: 0 is not a whole number",)),
        (("--seed", "-5"), ("seed: -5 is not a whole number",)),
    ],
)
def test_sampling_options_that_are_out_of_range(
    octavo: CommandLine, options: tuple[str, ...], messages: tuple[str, ...]
) -> None:
    assert_refused(octavo, ("chat", "-m", "hi", *options), *messages)


def test_a_size_of_memory_that_is_none(octavo: CommandLine) -> None:
    path = ROOT / "configs" / "llama3-8b-v5e-8.yaml"
    assert_refused(octavo, ("plan", "-c", path, "--hbm", "big"), "'big' is not a number")


DISK_FULL = """
import resource
# Files may not grow beyond 8 KiB: a small probe fits, a compiled program does not.
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
from engine.cli import main
main()
"""


def test_a_disk_that_fills_up_under_the_compile_cache_costs_warnings_only(
    config: Path, tmp_path: Path
) -> None:
    pytest.importorskip("resource")
    cache, output = tmp_path / "cache", tmp_path / "out.jsonl"
    # One program for one token of one sequence compiles soonest.
    settings = ("scheduler.max_num_seqs=1", "scheduler.max_step_tokens=1")
    settings += tuple(f"buckets.{name}=[1]" for name in tiny.config_tree(cache)["buckets"])
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = generate(config, "--set", f"compile_cache={cache}", *options, output=output)
    command = [sys.executable, "-c", DISK_FULL, *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Error writing persistent compilation cache entry" in ended.stderr
    assert "File too large" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(json.loads(output.read_text())["token_ids"]) <= 3
