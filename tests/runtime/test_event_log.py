"""A recorded log replays to identical plans, and any other file is an error with a line number."""

from __future__ import annotations

import dataclasses
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.runtime.event_log import MAX_BLOCKS, LogError
from engine.runtime.recorder import Recorder
from engine.runtime.replay import replay
from engine.sampling import SamplingParams
from engine.types import Domain, FinishReason
from tests.core.driver import make_limits, make_request
from tests.core.random_operations import (
    LIMITS,
    REQUEST,
    SEARCH_LIMITS,
    SEARCH_REQUEST,
    WEIGHTS,
    WEIGHTS_OF_EXCHANGES,
    declare_public,
    draw,
    perform_random,
)
from tests.core.random_operations import make_limits as random_limits
from tests.core.simulation import Simulation


def record_random(
    path: Path, seed: int, num_operations: int = 300, *, tokens: bool = False
) -> Simulation:
    """Record a random simulation; of odd seeds, most requests are beam searches."""
    rng = random.Random(seed)
    searches = seed % 2
    numbers = draw(rng, SEARCH_LIMITS if searches else LIMITS)
    limits = random_limits(numbers)
    recorder = Recorder(path, limits, tokens=tokens)
    simulation = Simulation(limits, rng.randint(1, 3), recorder)
    declare_public(simulation, numbers)
    requests = SEARCH_REQUEST if searches else REQUEST
    weights = WEIGHTS_OF_EXCHANGES if seed % 4 > 1 else WEIGHTS
    perform_random(simulation, rng, num_operations, requests, weights)
    recorder.close()
    if recorder._pseudonyms:
        # A public prefix is remembered, as a failure may make it run again.
        assert recorder._pseudonyms._sequences.keys() - {"public"} == simulation.records.keys()
    return simulation


def record_story(path: Path, *, tokens: bool = False) -> Simulation:
    """A short log with every kind of event, and preemptions."""
    limits = make_limits(num_blocks=5, max_num_seqs=2)
    recorder = Recorder(path, limits, tokens=tokens)
    simulation = Simulation(limits, 2, recorder)
    for name in "ab":
        simulation.admit(make_request(name, (3, 1, 4, 1, 0, 2, 0), max_tokens=9))
    for _ in range(4):
        simulation.schedule()
        simulation.commit()
    simulation.admit(make_request("c", (3, 1, 4, 1, 0), max_tokens=3, prompt_logprobs=0))
    simulation.abort("b", FinishReason.DEADLINE)
    simulation.schedule()
    simulation.fail()
    simulation.drain()
    recorder.close()
    return simulation


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The story's log."""
    path = tmp_path / "events.jsonl"
    record_story(path)
    return path


@pytest.fixture
def full_log(tmp_path: Path) -> Path:
    """The same with tokens."""
    path = tmp_path / "full.jsonl"
    record_story(path, tokens=True)
    return path


def edit(path: Path, number: int, change: Callable[[Any], Any]) -> None:
    """Change one line of a log, counted from 1, as a JSON value."""
    lines = path.read_text().splitlines(keepends=True)
    lines[number - 1] = json.dumps(change(json.loads(lines[number - 1]))) + "\n"
    path.write_text("".join(lines))


def first_line_with(path: Path, kind: str, occurrence: int = 0) -> int:
    """The number of a line that holds such an event."""
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return [number for number, event in enumerate(events, 1) if kind in event][occurrence]


def error_of(path: Path, *, check: bool = False) -> str:
    """How a replay complains."""
    with pytest.raises(LogError) as caught:
        replay(path, check=check)
    return str(caught.value)


@pytest.mark.parametrize("tokens", [False, True], ids=["hashed", "full"])
@pytest.mark.parametrize("seed", range(12))
def test_a_recorded_run_replays_to_identical_plans_and_an_equal_state(
    tmp_path: Path, seed: int, tokens: bool
):
    path = tmp_path / "events.jsonl"
    simulation = record_random(path, seed, tokens=tokens)
    seen = replay(path, check=seed < 2)
    counts = simulation.counts
    assert seen.holds_tokens == tokens
    assert seen.state.snapshot() == simulation.state.snapshot()
    assert seen.preemptions == counts["preempted"]
    assert seen.requests == counts["operation: admit"] - counts["refused"]
    assert seen.steps == simulation.state.snapshot()["step"]


def test_preemptions_happen_in_what_is_replayed(tmp_path: Path):
    """Else the test above would say little."""
    path = tmp_path / "events.jsonl"
    assert sum(record_random(path, seed).counts["preempted"] > 0 for seed in range(12)) >= 2


def test_a_request_survives_a_log_with_tokens_in_every_field(tmp_path: Path):
    request = dataclasses.replace(
        make_request("idé\ud800", (5, 6), max_tokens=3, seed=2**64 - 1, priority=-3),
        sampling=SamplingParams(
            temperature=0.5, logit_bias=((1, -2.0),), allowed_token_ids=(4, 5), stop=("x",)
        ),
        stop_ids=frozenset({1, 2**31 - 1}),
        bad_word_ids=((1, 2), (3,)),
        domain=Domain("t", "s"),
        deadline=12.5,
    )
    path = tmp_path / "events.jsonl"
    recorder = Recorder(path, make_limits(), tokens=True)
    recorder.admit(request)
    recorder.close()
    state = replay(path).state
    (sequence,) = state.core.sequences.values()
    assert sequence.request == request


# What doesn't replay.


def test_a_row_too_few_is_found_at_its_line(log: Path):
    number = first_line_with(log, "schedule")
    edit(log, number, lambda event: {**event, "digest": "0" * 32, "rows": 1, "tokens": 7})
    assert error_of(log) == (
        f"{log}:{number}: step 0 differs: recorded 1 rows with 7 tokens, now 2 with 14"
    )


def test_a_changed_digest_is_found_at_its_line(log: Path):
    number = first_line_with(log, "schedule", 2)
    edit(log, number, lambda event: {**event, "digest": event["digest"][::-1]})
    assert error_of(log).startswith(f"{log}:{number}: step 2 differs: it has as many rows")


def test_a_changed_step_number_is_found_at_its_line(log: Path):
    number = first_line_with(log, "schedule", 1)
    edit(log, number, lambda event: {**event, "schedule": 7})
    assert error_of(log) == f"{log}:{number}: step 7 was recorded here, but 1 is next"


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_step_tokens", 2), ("block_size", 3), ("num_blocks", 4), ("max_num_seqs", 1)],
)
def test_changed_limits_are_found_at_the_first_line_that_they_matter_to(
    log: Path, name: str, value: int
):
    edit(log, 1, lambda event: {**event, "limits": {**event["limits"], name: value}})
    number = int(error_of(log).removeprefix(f"{log}:").split(":")[0])
    assert number > 1


def test_a_changed_prompt_a_missing_line_and_a_doubled_line_are_found(log: Path):
    text = log.read_text()
    lines = text.splitlines(keepends=True)
    edit(log, 2, lambda event: event | {"admit": 6, "marks": event["marks"][:2]})
    error_of(log)
    for number in range(1, len(lines) - 1):  # nothing comes after the last two to show it
        log.write_text("".join(lines[: number - 1] + lines[number:]))
        error_of(log)
        if "abort" not in lines[number - 1]:  # a second time changes nothing
            log.write_text("".join(lines[:number] + lines[number - 1 :]))
            error_of(log)
    log.write_text(text)
    replay(log)


def test_a_torn_last_line_is_ignored(log: Path):
    whole = replay(log)
    text = log.read_text()
    last = text.splitlines(keepends=True)[-1]
    for length in range(1, len(last)):
        log.write_text(text[: len(text) - len(last) + length])
        assert replay(log).steps >= whole.steps - 1
    log.write_text(text + '{"schedule": 99, "dig')
    assert replay(log).steps == whole.steps


# Files that are no logs, and logs that mean harm.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an Octavo event log"),
        (b"\n", ":1: not JSON"),
        (b"[1]\n", ":1: not an event"),
        (b"7\n", ":1: not an event"),
        (b"{}\n", "is not an Octavo event log"),
        (
            b'{"octavo_event_log":1,"limits":{}}\n',
            "of format 1, but this version replays format 2; use",
        ),
        (b'{"octavo_event_log":2}\n', ":1: Object missing required field `limits`"),
        (b"\xff\xfe\x00GGUF\n", "can't read"),
        (b'{"octavo_event_log":2', "is not an Octavo event log"),
    ],
)
def test_a_file_that_is_no_log_is_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "events.jsonl"
    path.write_bytes(content)
    assert message in error_of(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    assert error_of(tmp_path / "none").startswith(f"can't read {tmp_path / 'none'}: ")
    assert error_of(tmp_path).startswith(f"can't read {tmp_path}: ")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"num_blocks": 10**12}, "num_blocks is 1000000000000; it must be from 1 to 2147483647"),
        ({"num_blocks": MAX_BLOCKS + 1}, f"num_blocks is {MAX_BLOCKS + 1}, but a log may say"),
        ({"max_num_seqs": 10**8, "max_step_tokens": 10**8}, "max_num_seqs is 100000000, but"),
        ({"num_blocks": -1}, "num_blocks is -1; it must be"),
        ({"block_size": 0}, "block_size is 0; it must be"),
        ({"num_blocks": "7"}, "Expected `int`, got `str`"),
        ({"num_blocks": 7.5}, "Expected `int`, got `float`"),
        ({"num_blocks": None}, "Expected `int`, got `null`"),
        ({"max_num_seqs": 20}, "max_step_tokens (16) is below max_num_seqs (20)"),
        ({"num_block": 3}, "unknown fields ['num_block'] in Limits"),
    ],
)
def test_limits_are_refused_before_they_size_anything(
    log: Path, limits: dict[str, Any], message: str
):
    edit(log, 1, lambda event: {**event, "limits": {**event["limits"], **limits}})
    tracemalloc.start()
    try:
        assert message in error_of(log)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


HOSTILE = [
    "{}",
    "null",
    "[]",
    '"admit"',
    '{"unknown":1}',
    '{"admit":1}',
    '{"admit":null}',
    '{"admit":{}}',
    '{"admit":[]}',
    '{"admit":8,"marks":[],"max_tokens":1,"domain":["",""]}',
    '{"admit":8,"marks":[1,2,3,4,5],"max_tokens":1,"domain":["",""]}',
    '{"admit":0,"marks":[],"max_tokens":1,"domain":["",""]}',
    '{"admit":1,"marks":[],"max_tokens":0,"domain":["",""]}',
    '{"admit":1,"marks":[],"max_tokens":1,"domain":""}',
    '{"admit":1,"marks":[],"max_tokens":1,"domain":["",""],"forks":2147483647}',
    '{"admit":2147483647,"marks":[],"max_tokens":1,"domain":["",""]}',
    '{"admit":2147483648,"marks":[],"max_tokens":1,"domain":["",""]}',
    '{"admit":3,"marks":[-1],"max_tokens":1,"domain":["",""]}',
    '{"admit":3,"marks":[2147483648],"max_tokens":1,"domain":["",""]}',
    '{"admit_request":1}',
    '{"admit_request":{}}',
    '{"abort":"a"}',
    '{"abort":["a"],"reason":"abort"}',
    '{"abort":"a","reason":"nonsense"}',
    '{"abort":{"a":1},"reason":"abort"}',
    '{"schedule":0}',
    '{"schedule":0,"digest":5,"rows":0,"tokens":0}',
    '{"schedule":0,"digest":"","rows":null,"tokens":0}',
    '{"schedule":0,"digest":"","rows":0,"tokens":0}',
    '{"schedule":[0],"digest":"","rows":0,"tokens":0}',
    '{"schedule":NaN,"digest":"","rows":0,"tokens":0}',
    '{"commit":0}',
    '{"commit":0,"rows":1}',
    '{"commit":-1,"rows":0}',
    '{"commit":[],"rows":0}',
    '{"commit":Infinity,"rows":0}',
    '{"commit_tokens":0,"tokens":[1]}',
    '{"fail":3}',
    '{"fail":[3]}',
    '{"fail":[[]]}',
    '{"fail":[1e400]}',
    '{"fail":[' + "9" * 5000 + "]}",
    '{"abort":"a","reason":"abort","fail":[]}',
    '{"abort":"a","reason":"abort","extra":1}',
    "[" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    '{"admit_request":' + '{"sampling":' * 50_000 + "1" + "}" * 50_001,
    '{"abort":' + "[" * 400 + "]" * 400 + "}",
]


@pytest.mark.parametrize("line", HOSTILE, ids=lambda line: line[:40])
def test_a_hostile_line_is_named_and_nothing_else_happens(log: Path, line: str):
    header = log.read_text().splitlines(keepends=True)[0]
    log.write_text(header + line + "\n")
    assert error_of(log).startswith(f"{log}:2: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", 5),
        ("prompt_ids", []),
        ("prompt_ids", "12"),
        ("prompt_ids", [2**31]),
        ("prompt_ids", [-1]),
        ("prompt_ids", [10**400]),
        ("prompt_ids", [1.5]),
        ("prompt_ids", [True]),
        ("max_tokens", 0),
        ("max_tokens", -(10**30)),
        ("max_tokens", 10**30),
        ("priority", None),
        ("priority", "high"),
        ("domain", None),
        ("domain", {"tenant": 1, "salt": ""}),
        ("domain", {"tenants": "x"}),
        ("sampling", {"temperature": -1}),
        ("sampling", {"temperature": "hot"}),
        ("sampling", {"stop": ["x"] * 1000}),
        ("sampling", {"warmth": 3}),
        ("stop_ids", 3),
        ("stop_ids", [[]]),
        ("bad_word_ids", [3]),
        ("sampler_row", [1.0]),
        ("owner", "me"),
    ],
)
def test_a_request_with_a_wrong_field_is_refused(full_log: Path, field: str, value: Any):
    """What is out of range may pass as a request, but then not as a recorded plan."""
    edit(full_log, 2, lambda event: {"admit_request": {**event["admit_request"], field: value}})
    assert error_of(full_log).startswith(f"{full_log}:")


def test_tokens_that_no_device_could_say_are_refused(full_log: Path):
    log = full_log
    number = first_line_with(log, "commit_tokens")
    for tokens in ([2**31, 0], [10**30, 0], [1.5, 0], ["1", 0], [None, 0], [[], 0], [0], [0, 0, 0]):
        text = log.read_text()
        edit(log, number, lambda event, tokens=tokens: {**event, "tokens": tokens})
        assert error_of(log).startswith(f"{log}:{number}: ")
        log.write_text(text)


def test_steps_out_of_order_are_refused(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    limits = make_limits()
    recorder = Recorder(path, limits)
    simulation = Simulation(limits, 2, recorder)
    simulation.admit(make_request("a", (1, 2, 3)))
    plans = [simulation.schedule(), simulation.schedule()]
    recorder.close()
    head = path.read_text()
    later, earlier = (
        json.dumps({"commit": plan.step, "rows": 1}) + "\n" for plan in reversed(plans)
    )
    path.write_text(head + earlier + later)
    replay(path)
    path.write_text(head + later + earlier)
    assert error_of(path) == f"{path}:5: step 1 can't be taken in now: step 0 is next"
    path.write_text(head + earlier + earlier)
    assert error_of(path) == f"{path}:6: step 0 was not planned, or was taken in already"


def test_a_line_without_end_is_refused(log: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.runtime.event_log.MAX_LINE", 4096)
    log.write_text(log.read_text().splitlines(keepends=True)[0] + "1" * 5000 + "\n")
    assert error_of(log) == f"{log}:2: longer than 4096 characters"


def test_random_damage_is_an_error_or_harmless_but_never_anything_else(log: Path):
    rng = random.Random(0)
    original = log.read_bytes()
    refused = 0
    for _ in range(400):
        data = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            choice = rng.random()
            if choice < 0.4:
                data[at] = rng.choice(b'0123456789[]{},:"-.eE\n aZ\x00\xff')
            elif choice < 0.7:
                del data[at : at + rng.randint(1, 30)]
            else:
                start = rng.randrange(len(data))
                data[at:at] = data[start : start + rng.randint(1, 200)]
        log.write_bytes(data)
        try:
            replay(log, check=True)
        except LogError:
            refused += 1
    assert refused > 300
