"""The command line: its help, its commands over a tiny model, and how it ends."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import __version__, cli
from engine.aot import topologies
from engine.loading import use_compile_cache
from engine.progress import ProgressBar
from engine.weights import open_checkpoint
from tests.command_line import CommandLine, Ended
from tests.conftest import ROOT
from tests.dashboard.reader import recordings
from tests.runtime import tiny

COMMANDS = ("serve", "chat", "generate", "plan", "calibrate", "replay", "convert", "bench", "key")
HEAVY = ("flax", "gguf", "grpc", "jax", "jinja2", "numpy", "orbax", "safetensors", "tokenizers")


@pytest.fixture
def octavo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A config of the tiny model; programs are kept, so that only the first load compiles."""
    folder = tiny.write_model(tmp_path_factory.mktemp("model"))
    cache = tmp_path_factory.mktemp("compiled")
    yield tiny.write_config(folder / "config.yaml", folder, compile_cache=str(cache))
    use_compile_cache("")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_help_names_every_command(octavo: CommandLine) -> None:
    for arguments in ((), ("--help",)):
        ended = octavo(*arguments)
        assert ended.code == 0
        assert all(command in ended.out for command in COMMANDS)


@pytest.mark.parametrize(
    "command", [*((name,) for name in COMMANDS), *(("bench", n) for n in ("throughput", "serve"))]
)
def test_every_command_explains_itself(octavo: CommandLine, command: tuple[str, ...]) -> None:
    ended = octavo(*command, "--help")
    assert ended.code == 0
    assert f"Usage: octavo {' '.join(command)}" in ended.out
    assert len(ended.out.splitlines()) > 5


def test_help_and_version_load_nothing_heavy() -> None:
    script = f"""
import sys
sys.argv = ["octavo", sys.argv[1]]
from engine.cli import main
try:
    main()
except SystemExit as ended:
    print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules))
    raise
"""
    for option in ("--help", "--version"):
        command = [sys.executable, "-c", script, option]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert ended.stdout.splitlines()[-1].split() == ["loaded:"]


def test_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "engine", "--version"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == __version__


@pytest.mark.parametrize(
    ("config_name", "kib_a_token"),
    [("llama3-8b-v5e-8", 128), ("llama3-8b-v6e-8", 128), ("llama3-70b-v6e-8", 320)],
)
def test_plan_gives_the_known_cost_of_a_token(
    octavo: CommandLine, config_name: str, kib_a_token: int
) -> None:
    path = ROOT / "configs" / f"{config_name}.yaml"
    ended = octavo("plan", "--config", path, "--hbm", "32GiB", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["kv_bytes_per_token"] == kib_a_token * 1024
    table = octavo("plan", "--config", path, "--hbm", "32GiB")
    assert table.code == 0
    assert f"{kib_a_token}.00 KiB" in table.out


def test_plan_reads_a_local_model_and_takes_overrides(octavo: CommandLine, config: Path) -> None:
    ended = octavo("plan", "-c", config, "--json", "--set", "cache.dtype=bfloat16")
    plan = json.loads(ended.out)
    assert (ended.code, plan["cache_dtype"], plan["num_blocks"]) == (0, "bfloat16", 64)
    assert plan["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2


def test_generate_records_what_replays(octavo: CommandLine, config: Path, tmp_path: Path) -> None:
    source, output, log = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "log.jsonl"))
    source.write_text(
        '{"prompt": "Hello", "max_tokens": 5, "temperature": 0, "ignore_eos": true}\n'
        '{"prompt_ids": [72, 101], "max_tokens": 5, "seed": 3, "logprobs": 1}\n'
        '{"prompt_ids": [9999], "index": 7}\n'
        '{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}\n'
    )
    ended = octavo("generate", "-c", config, "-i", source, "-o", output, "--record", log)
    assert ended.code == 1
    assert "Loading weights …" in ended.err
    assert "1 of 4 lines failed; first: index 7: prompt_ids: 9999 is not a token id" in ended.err
    greedy, drawn, wrong, chat = records(output)
    assert len(greedy["token_ids"]) == 5
    assert len(drawn["logprobs"]) == len(drawn["token_ids"])
    assert wrong.keys() == {"index", "error"}
    assert chat["prompt_tokens"] == len("user:hi" + "assistant:") + 3
    ended = octavo("replay", log, "--check")
    assert ended.code == 0
    assert "plans are identical (3 requests, " in ended.out
    assert "\n" not in ended.out.strip()
    assert "prompts" not in ended.out
    assert str(drawn["token_ids"])[1:-1].replace(" ", "") not in log.read_text()
    page = tmp_path / "page.html"
    assert octavo("replay", log, "--html", page).out == octavo("replay", log).out
    (recording,) = recordings(page.read_text())
    assert recording["frames"][-1]["running"] == []
    assert recording["frames"][-1]["generated"] == 5 + 5 + len(chat["token_ids"])


def test_a_page_that_others_reach_must_be_allowed(octavo: CommandLine, config: Path) -> None:
    ended = octavo("serve", "-c", config, "--http", "0.0.0.0:0")
    assert ended.code == 2
    assert "--http is 0.0.0.0, which other machines reach" in ended.err
    ended = octavo("serve", "-c", config, "--set", "server.http=0.0.0.0:0")
    assert ended.code == 2
    assert "--http is 0.0.0.0, which other machines reach" in ended.err
    ended = octavo("serve", "-c", config, "--http", "99999")
    assert ended.code == 2
    assert "a port, from 0 to 65535, or host:port" in ended.err
    ended = octavo("serve", "-c", config, "--http-public")
    assert ended.code == 2
    assert "the page of server.http (--http), which is missing" in ended.err


def test_a_log_with_tokens_is_asked_for_by_name(
    octavo: CommandLine, config: Path, tmp_path: Path
) -> None:
    source, output, log = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "log.jsonl"))
    source.write_text('{"prompt_ids": [72, 101], "max_tokens": 5, "seed": 3}\n')
    asked = ("generate", "-c", config, "-i", source, "-o", output, "--record-tokens", log)
    assert octavo(*asked).code == 0
    assert '"prompt_ids":[72,101]' in log.read_text()
    ended = octavo("replay", log, "--check")
    assert ended.out.strip().endswith("preemptions); the log holds prompts and outputs")
    ended = octavo(*asked, "--record", log)
    assert ended.code == 2
    assert "--record and --record-tokens both name an event log; give one of them" in ended.err


def test_a_converted_model_is_the_same_model(
    octavo: CommandLine, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted, output = tmp_path / "converted", tmp_path / "out.jsonl"
    ended = octavo("convert", config.parent, converted, "--dtype", "float32")
    assert ended.code == 0
    assert ended.out.strip() == f"wrote {converted}; use it as model.source"
    assert open_checkpoint(converted).format == "octavo"
    answers = []
    for source in (config.parent, converted):

        class Stdin:
            buffer = io.BytesIO(b'{"prompt": "Hello", "temperature": 0, "max_tokens": 30}')

        monkeypatch.setattr(sys, "stdin", Stdin)
        settings = ("--set", f"model.source={source}", "--set", "server.port=0")
        assert octavo("generate", "-c", config, "-i", "-", "-o", output, *settings).code == 0
        answers.append(records(output)[0]["token_ids"])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--bogus"), "generate"),
        (("plan",), "--config is missing: a YAML file, such as configs/smollm2-135m-cpu.yaml"),
        (("generate", "-c", "x", "-o", "y"), "--input is missing"),
        (("chat", "hello"), 'octavo chat -m "Hello"'),
        (("frob",), "Unknown command"),
        (("chat", "--max-tokens", "many"), "max-tokens"),
    ],
)
def test_misuse_ends_with_code_two_and_an_explanation(
    octavo: CommandLine, arguments: tuple[str, ...], message: str
) -> None:
    ended = octavo(*arguments)
    assert ended.code == 2
    assert message in ended.out + ended.err


def test_an_interrupt_ends_with_its_own_code(
    octavo: CommandLine, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", interrupted)
    assert octavo("plan", "-c", config) == Ended(130, "", "")


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTAVO_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["octavo", "replay", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="none"):
        cli.main()


def test_a_log_level_that_does_not_exist_is_explained() -> None:
    command = [sys.executable, "-m", "engine", "--version"]
    environment = {"OCTAVO_LOG": "loud", "PATH": ""}
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    said = "OCTAVO_LOG is 'loud'; it must be one of debug, info, warning, error, critical"
    assert (ended.returncode, ended.stderr.strip()) == (2, f"octavo: {said}")


class FakeTerminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_a_line_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with ProgressBar() as show:
            for done in range(3):
                show("Loading", done, 2)
            show("Compiling", 0, 5)  # broken off

    work()
    assert capsys.readouterr().err == "Loading …\nCompiling …\n"
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    work()
    assert "Loading" in terminal.getvalue()
    assert "━" in terminal.getvalue()


GOOGLE, INTEL = "0x1ae0\n", "0x8086\n"


@pytest.mark.parametrize(
    ("vendors", "files", "is_quiet"),
    [
        ([INTEL], [], True),
        ([INTEL], ["dev/vfio/vfio"], True),  # the driver alone
        ([INTEL, GOOGLE], [], False),
        # A container may hide the bus of a machine that has TPUs, or what is on it.
        ([], ["dev/accel0"], False),
        ([], [], False),
        (None, [], False),
        ([INTEL], ["dev/accel0"], False),
        ([INTEL], ["dev/vfio/0"], False),
        ([None], [], False),  # a device whose vendor can't be read
    ],
)
def test_libtpu_is_only_told_that_there_is_no_tpu_where_that_is_certain(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vendors: list[str | None] | None,
    files: list[str],
    is_quiet: bool,
) -> None:
    if vendors is not None:
        (tmp_path / "sys/bus/pci/devices").mkdir(parents=True)
    for number, vendor in enumerate(vendors or ()):
        device = tmp_path / f"sys/bus/pci/devices/{number}"
        device.mkdir()
        if vendor is None:
            (device / "vendor").mkdir()  # reading it is an OSError, even for root
        else:
            (device / "vendor").write_text(vendor)
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    topologies.quiet_libtpu(tmp_path)
    assert ("TPU_SKIP_MDS_QUERY" in environment) == is_quiet
    assert len(environment) == (3 if is_quiet else 0)


def test_libtpu_is_silent_where_there_is_no_tpu() -> None:
    """It is among the development tools, and JAX asks it for devices whenever it is there."""
    quiet = {name: os.environ[name] for name in os.environ if not name.startswith(("JAX", "TPU"))}
    code = "from engine.aot import topologies as t; t.quiet_libtpu(); import jax; jax.devices()"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=quiet, capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""


STRANGER = """
import socket, ssl
from concurrent.futures import ThreadPoolExecutor
from engine import cli

def serve(*_, **__):
    import grpc, trustme
    certificate = trustme.CA().issue_cert("127.0.0.1")
    pair = certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    context = ssl._create_unverified_context()
    context.set_alpn_protocols(["h2"])
    name = "x\\nWARNING octavo.serve: resumed by an operator"
    with socket.create_connection(("127.0.0.1", port)) as raw:
        context.wrap_socket(raw, server_hostname=name).recv(1)
    server.stop(0).wait()

cli.app = serve
cli.main()
"""


def test_a_stranger_s_handshake_writes_nothing_into_the_log() -> None:
    """gRPC's core would write the name that was asked for, line breaks and all."""
    environment = {name: text for name, text in os.environ.items() if name != "GRPC_VERBOSITY"}
    result = subprocess.run(
        [sys.executable, "-c", STRANGER],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
