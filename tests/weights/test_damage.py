"""Damaged files: whatever the damage, a WeightsError or values, and never much memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.weights import WeightsError, open_checkpoint
from engine.weights.gguf import GGUFCheckpoint
from tests.weights.checkpoints import LLAMA, random_tensors, read_all, write_folder, write_gguf

SMALL = LLAMA | {"hidden_size": 8, "intermediate_size": 8, "head_dim": 4, "num_hidden_layers": 1}
# The files are a few KiB. What is allocated on their word must stay of that order.
MAX_BYTES = 8 * 2**20

many = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> tuple[Path, bytes, int]:
    """A path to write damaged files to, a good file's bytes, and the length of its header."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, SMALL, random_tensors(SMALL))
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GGUFCheckpoint)
    damaged = path.with_name("damaged.gguf")
    return damaged, path.read_bytes(), checkpoint.file.header_bytes


@pytest.fixture(scope="module")
def safetensors(tmp_path_factory) -> tuple[Path, bytes, int]:
    """The same for model.safetensors; the path is that of the file in its folder."""
    folder = write_folder(tmp_path_factory.mktemp("hf") / "m", SMALL, random_tensors(SMALL))
    path = folder / "model.safetensors"
    content = path.read_bytes()
    return path, content, 8 + int.from_bytes(content[:8], "little")


def outcome(path: Path, content: bytes) -> str:
    """Open and read everything; `read`, or why not.

    Fails on any other exception, on a reason that doesn't name the file, and on allocations
    that the file's size doesn't explain.
    """
    path.write_bytes(content)
    source = path if path.suffix == ".gguf" else path.parent
    tracemalloc.start()
    try:
        read_all(open_checkpoint(source))
    except WeightsError as error:
        reason = str(error)
        assert reason.startswith(str(source))
        return reason
    else:
        return "read"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MAX_BYTES


def flipped(content: bytes, flips: list[tuple[int, int]]) -> bytes:
    damaged = bytearray(content)
    for place, bits in flips:
        damaged[place % len(content)] ^= bits
    return bytes(damaged)


places = st.integers(0, 2**31)


@many
@given(place=places)
def test_a_gguf_file_cut_off_anywhere_is_refused(gguf, place):
    path, content, _ = gguf
    # The last tensor may be followed by padding, which nobody misses.
    length = place % (len(content) - 32)
    assert outcome(path, content[:length]) != "read"


@many
@given(flips=st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_in_a_gguf_header_give_an_error_or_values(gguf, flips):
    path, content, header = gguf
    flips = [(place % header, bits) for place, bits in flips]
    outcome(path, flipped(content, flips))


@many
@given(place=places, value=st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
def test_absurd_numbers_in_a_gguf_header_give_an_error_or_values(gguf, place, value):
    path, content, header = gguf
    place %= header - 8
    outcome(path, content[:place] + value.to_bytes(8, "little") + content[place + 8 :])


@many
@given(junk=st.binary(max_size=200))
@example(junk=b"")
def test_junk_after_the_magic_is_refused(gguf, junk):
    path, _, _ = gguf
    assert outcome(path, b"GGUF" + junk) != "read"


@many
@given(place=places)
def test_a_safetensors_file_cut_off_anywhere_is_refused(safetensors, place):
    path, content, _ = safetensors
    assert outcome(path, content[: place % len(content)]) != "read"


@many
@given(flips=st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_in_a_safetensors_header_give_an_error_or_values(safetensors, flips):
    path, content, header = safetensors
    outcome(path, flipped(content, [(place % header, bits) for place, bits in flips]))


def test_the_undamaged_files_are_read(gguf, safetensors):
    for path, content, _ in (gguf, safetensors):
        assert outcome(path, content) == "read"
