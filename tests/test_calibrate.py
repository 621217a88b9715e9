"""`octavo calibrate`: the scales are those of the largest keys and values, found independently."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from engine import backends
from engine import calibrate as module
from engine.backends import resolve_attention
from engine.calibrate import DEFAULT_PROMPTS, MAX_PROMPT_TOKENS, calibrate, read_prompts
from engine.config import ConfigError
from engine.config_file import from_tree
from engine.text import Message
from engine.weights import open_checkpoint
from engine.weights.kv_scales import LARGEST, read_scales
from tests.command_line import CommandLine
from tests.model.quantised import largest_values
from tests.runtime import tiny
from tests.weights.checkpoints import read_all

PROMPTS = ("Hello, how are you?", "x" * 100, "é", "12345 67890")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def octavo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def in_numpy(folder: Path, *sequences: tuple[int, ...]) -> np.ndarray:
    """The largest values of the tiny model on these tokens, by a NumPy model."""
    params = read_all(open_checkpoint(folder))
    return largest_values(tiny.ARCH, params, map(np.array, sequences))


def as_ids(text: str) -> tuple[int, ...]:
    return tuple(text.encode())  # the tiny model's tokens are bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"cache.dtype": "int8", "cache.scales": "missing.safetensors"},  # to be made
        {"mesh.tensor": 2, "scheduler.max_step_tokens": 16, "buckets": {}},  # prompts in chunks
        {"mesh.tensor": 4},  # each KV head twice
    ],
    ids=["one device", "two in chunks", "four with copies"],
)
def test_scales_are_those_of_the_largest_values(folder: Path, changes: dict[str, Any]) -> None:
    tree = tiny.config_tree(folder, **{"scheduler.max_num_seqs": 8, **changes})
    told: list[tuple[str, int, int]] = []

    def tell(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    found = calibrate(from_tree(tree), list(PROMPTS), progress=tell)
    expected = in_numpy(folder, *map(as_ids, PROMPTS)) / 127
    np.testing.assert_allclose(found.scales, expected, rtol=1e-4)
    assert (found.dtype, found.num_prompts) == ("int8", 4)
    assert found.num_tokens == sum(len(as_ids(prompt)) for prompt in PROMPTS)
    assert told[-1] == ("Calibrating", 4, 4)
    assert next(step for step in told if step[0] == "Calibrating")[1:] == (0, 4)


def test_long_prompts_are_cut_and_a_config_s_own_limits_hold(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_tree(tiny.config_tree(folder, **{"model.max_model_len": 64}))
    prompt = tiny.random_ids(100)
    found = calibrate(config, [prompt], dtype="float8_e4m3fn")
    assert found.num_tokens == 63
    np.testing.assert_allclose(found.scales, in_numpy(folder, prompt[:63]) / 448, rtol=1e-4)
    monkeypatch.setattr(module, "MAX_PROMPT_TOKENS", 32)
    unlimited = dataclasses.replace(config.model, max_model_len=None)
    found = calibrate(dataclasses.replace(config, model=unlimited), [prompt])
    assert found.num_tokens == 32
    assert MAX_PROMPT_TOKENS == 4096


def test_kernels_that_take_no_float32_cache_are_left_to_the_config_that_they_are_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On Hopper the gpu kernels run a float32 model with an int8 cache, but not with an exact one:
    that one runs on xla, as on any device."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(backends, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    config = from_tree(tiny.config_tree(folder, **{"cache.dtype": "int8", "cache.scales": "s"}))
    assert (resolve_attention(config).backend, config.model.dtype) == ("gpu", "float32")
    prompt = tiny.random_ids(40)
    found = calibrate(config, [prompt])
    np.testing.assert_allclose(found.scales, in_numpy(folder, prompt) / 127, rtol=1e-4)
    [record] = [record for record in caplog.records if record.name == "engine.calibrate"]
    assert "calibrating with attention.backend xla" in record.getMessage()
    assert "not float32" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_what_the_kernels_take_is_calibrated_with_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(backends, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    changes = {"model.dtype": "bfloat16", "cache.dtype": "int8", "cache.scales": "s"}
    config = from_tree(tiny.config_tree(Path("x"), **changes))
    assert module._unquantised(config, tiny.ARCH).attention.backend == "auto"
    assert not caplog.records


def test_the_command_writes_a_file_that_the_engine_takes(
    octavo: CommandLine, folder: Path, tmp_path: Path
) -> None:
    config = tiny.write_config(tmp_path / "config.yaml", folder)
    source, output = tmp_path / "prompts.txt", tmp_path / "scales.safetensors"
    source.write_text("\n".join((*PROMPTS, "", "")))
    arguments = ("calibrate", "-c", config, "-o", output, "--prompts", source)
    ended = octavo(*arguments, "--dtype", "float8_e4m3fn")
    assert ended.code == 0
    assert re.fullmatch(
        rf"wrote {output}: float8_e4m3fn scales of 2 layers x 2 KV heads, from 4 prompts, 132 "
        rf"tokens in all; use them with --set cache.dtype=float8_e4m3fn "
        rf"--set cache.scales={output}\n",
        ended.out,
    )
    assert "Calibrating …" in ended.err
    scales = read_scales(output, tiny.ARCH, "float8_e4m3fn")
    expected = in_numpy(folder, *map(as_ids, PROMPTS)) / LARGEST["float8_e4m3fn"]
    np.testing.assert_allclose(scales, expected, rtol=1e-4)

    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text('{"prompt": "Hello", "max_tokens": 3, "temperature": 0}')
    settings = ("--set", "cache.dtype=float8_e4m3fn", "--set", f"cache.scales={output}")
    ended = octavo("generate", "-c", config, "-i", requests, "-o", answers, *settings)
    assert ended.code == 0
    assert json.loads(answers.read_text())["token_ids"]


def test_the_built_in_prompts_are_many_kinds_of_text_and_chats(folder: Path) -> None:
    found = calibrate(from_tree(tiny.config_tree(folder)))
    assert found.num_prompts == 2 * len(DEFAULT_PROMPTS)
    chats = [(tiny.TURN, *b"user:", *as_ids(text), tiny.TURN_END) for text in DEFAULT_PROMPTS]
    chats = [(*chat, tiny.TURN, *b"assistant:") for chat in chats]
    sequences = (*map(as_ids, DEFAULT_PROMPTS), *chats)
    assert found.num_tokens == sum(map(len, sequences))
    np.testing.assert_allclose(found.scales, in_numpy(folder, *sequences) / 127, rtol=1e-4)


def test_prompts_are_lines_of_text_or_of_requests(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text('one\n\n {"prompt": "two"}\n')
    assert read_prompts(text) == ["one", ' {"prompt": "two"}']
    lines.write_text(
        '{"prompt": "one", "temperature": 1}\n{"prompt_ids": [1, 2]}\n'
        '{"messages": [{"role": "user", "content": "hi"}]}\n'
    )
    assert read_prompts(lines) == ["one", [1, 2], [{"role": "user", "content": "hi"}]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "has no prompt; give at least one line"),
        ("a.txt", b"good\n\xff\n", "line 2: 'utf-8' codec"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 1}', "line 2: prompt must be a text"),
        ("a.jsonl", b"{", "line 1: not valid JSON"),
    ],
)
def test_a_file_of_prompts_that_can_not_be_read_names_the_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read_prompts(path)


def test_what_can_not_be_calibrated_is_refused(folder: Path) -> None:
    config = from_tree(tiny.config_tree(folder))
    with pytest.raises(ConfigError, match="cache of bfloat16 takes no scales; int8 and float8"):
        calibrate(config, dtype="bfloat16")
    with pytest.raises(ValueError, match="prompt 2: prompt_ids: 9999 is not a token id"):
        calibrate(config, ["a", (9999,)])
    with pytest.raises(ValueError, match="prompt 1: messages: "):
        calibrate(config, [(Message("user", "a"), "b")])  # type: ignore[bad-argument-type]
