"""A log without tokens: it says nothing of them, and yet plans, sharing and all, come out equal."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.core.block_keys import child_key, root_key
from engine.core.limits import Limits
from engine.runtime.event_log import LogError, plan_digest
from engine.runtime.recorder import Recorder
from engine.runtime.replay import replay
from engine.sampling import SamplingParams
from engine.types import (
    BlockCopy,
    Domain,
    FinishReason,
    Fork,
    PlanRow,
    Request,
    StepPlan,
    StepTokens,
    SwapIn,
    SwapOut,
)
from tests.core.driver import Driver, make_request
from tests.core.random_operations import (
    LIMITS,
    REQUEST,
    WEIGHTS,
    draw,
    perform,
    possible,
)
from tests.core.random_operations import (
    make_limits as random_limits,
)
from tests.core.simulation import Simulation

TEXTS = ("client-name", "tenant-name", "a-salt", "stop-here", "a-bad-word")


class Recorded(Driver):
    """A driver whose events are recorded, at two tokens a number that occurs nowhere else."""

    def __init__(self, path: Path, *, tokens: bool = False, **changes: Any):
        super().__init__(**changes)
        self.recorder = Recorder(path, self.limits, tokens=tokens)
        self.rng = random.Random(0)
        self.sampled: list[int] = []

    def ask(self, *requests: Request) -> None:
        for request in requests:
            self.admit(request)
            self.recorder.admit(request)

    def run_recorded(self) -> None:
        """Step until nothing is left; each row samples a large number."""
        while not self.state.is_idle:
            plan = self.schedule()
            self.recorder.schedule(plan)
            token_ids = tuple(self.rng.randrange(10**9, 2**31) for _ in plan.rows)
            self.sampled += token_ids
            self.recorder.commit(plan, StepTokens(token_ids))
            self.commit(plan, StepTokens(token_ids))
        self.recorder.close()


def secret_request(number: int, rng: random.Random, **changes: Any) -> Request:
    """A request of which every part is distinctive."""
    name = f"client-name-{number}"
    return Request(
        name,
        tuple(rng.randrange(10**9, 2**31) for _ in range(9 + number)),
        SamplingParams(
            stop=("stop-here",),
            bad_words=("a-bad-word",),
            logit_bias=((1_357_913_579, 1.0),),
            stop_token_ids=(1_468_014_680,),
            seed=987_654_321_012_345,
        ),
        seed=987_654_321_012_345,
        max_tokens=20,
        stop_ids=frozenset({1_468_014_680}),
        bad_word_ids=((1_579_115_791,),),
        domain=Domain("tenant-name", "a-salt"),
        deadline=192837465.5,
        **changes,
    )


def record_secrets(path: Path, *, tokens: bool = False) -> tuple[list[Request], list[int]]:
    """Record requests, one with a fork, in a pool that is small for them; and all that came out."""
    driver = Recorded(path, tokens=tokens, num_blocks=12, host_blocks=4)
    rng = random.Random(1)
    requests = [
        secret_request(number, rng, forks=(Fork("client-name-fork", 5),) if number == 1 else ())
        for number in range(3)
    ]
    driver.ask(*requests)
    driver.run_recorded()
    return requests, driver.sampled


def secrets_in(path: Path, requests: list[Request], sampled: list[int]) -> list[str]:
    """What of the requests and outputs can be found in a log's text."""
    text = path.read_text()
    numbers = [token for request in requests for token in request.prompt_ids] + sampled
    numbers += [1_357_913_579, 1_468_014_680, 1_579_115_791, 987_654_321_012_345, 192_837_465]
    keys = []
    for request in requests:
        key = root_key(request.domain, "weights")
        for start in range(0, len(request.prompt_ids) - 3, 4):
            key = child_key(key, request.prompt_ids[start : start + 4])
            keys += [key.hex()[:8], str(int.from_bytes(key[:4], "little") & 0x7FFFFFFF)]
    return [secret for secret in (*TEXTS, *map(str, numbers), *keys) if secret in text]


def test_no_text_no_token_and_no_name_is_in_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert secrets_in(path, *record_secrets(path)) == []
    assert replay(path).requests == 3


def test_a_log_with_tokens_has_all_of_it(tmp_path: Path) -> None:
    """Else the test above might look for the wrong things."""
    path = tmp_path / "log"
    requests, sampled = record_secrets(path, tokens=True)
    found = set(secrets_in(path, requests, sampled))
    assert found >= {*TEXTS, *map(str, requests[0].prompt_ids), *map(str, sampled)}
    assert "987654321012345" in found
    assert replay(path).requests == 3


def test_a_log_is_for_its_owner_only(tmp_path: Path) -> None:
    record_secrets(tmp_path / "log")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_two_logs_of_the_same_requests_have_no_hash_in_common(tmp_path: Path) -> None:
    """Nobody can tell what a hash stands for by making one."""
    hashes = []
    for name in "ab":
        record_secrets(tmp_path / name)
        events = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        admitted = [event for event in events if "admit" in event]
        hashes.append({mark for event in admitted for mark in event["marks"]})
        hashes[-1] |= {part for event in admitted for part in event["domain"]}
    assert len(hashes[0]) == len(hashes[1]) > 12
    assert not hashes[0] & hashes[1]


def marks_of(path: Path) -> list[list[int]]:
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return [event["marks"] for event in events if "admit" in event]


def test_prompts_have_equal_hashes_as_far_as_they_are_equal_in_a_domain(tmp_path: Path) -> None:
    path = tmp_path / "log"
    driver = Recorded(path)
    prompt = tuple(range(100, 112))
    for name, token_ids, domain in (
        ("a", prompt, Domain("t")),
        ("b", (*prompt[:7], 5, *prompt[8:]), Domain("t")),
        ("c", prompt, Domain("u")),
        ("d", prompt, Domain("t", "u")),
        ("e", prompt[:8], Domain("t")),
    ):
        driver.ask(make_request(name, token_ids, domain=domain, max_tokens=1))
    driver.run_recorded()
    a, b, c, d, e = marks_of(path)
    assert len(a) == 6  # two a block
    assert b[:3] == a[:3]
    assert not set(b[3:]) & set(a)
    assert e == a[:4]
    assert len({*a, *c, *d}) == 18


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_blocks_of_any_size_are_told_apart(tmp_path: Path, block_size: int) -> None:
    path = tmp_path / "log"
    driver = Recorded(path, block_size=block_size, num_blocks=64)
    for name, prompt in (("a", (1, 2, 3, 4, 5, 6, 7)), ("b", (1, 2, 3, 4, 5, 6, 8))):
        driver.ask(make_request(name, prompt, max_tokens=9))
        driver.ask(make_request(name * 2, prompt, max_tokens=9))
    driver.run_recorded()
    assert replay(path, check=True).tokens == 36


def test_a_next_turn_finds_blocks_of_prompt_and_answer_in_the_replay_too(tmp_path: Path) -> None:
    """The block where the prompt ended holds some of each, in a fork as well."""
    path = tmp_path / "log"
    driver = Recorded(path, block_size=8, num_blocks=32)
    driver.ask(make_request("a", 11, max_tokens=30, n=2, forks=(Fork("b", 1),)))
    while not driver.state.is_idle:
        plan = driver.schedule()
        driver.recorder.schedule(plan)
        ids = tuple(row.output_position + (row.request.request_id == "b") for row in plan.rows)
        driver.recorder.commit(plan, StepTokens(ids))
        driver.commit(plan, StepTokens(ids))
        if plan.step == 8:
            for name in "ab":
                known = tuple(driver.state.core.sequences[name].token_ids)
                driver.ask(make_request(name * 2, known, max_tokens=1))
                other = (*known[:10], 1, *known[11:])  # the last of the prompt is another
                driver.ask(make_request(name * 3, other, max_tokens=1))
    driver.recorder.close()
    cached = {output.request_id: output.num_cached_tokens for output in driver.outputs}
    assert cached == {"a": 0, "b": 0, "aa": 16, "bb": 16, "aaa": 8, "bbb": 8}
    assert replay(path).requests == 5


def test_a_step_that_fails_ends_no_later_request_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "log"
    driver = Recorded(path)
    driver.ask(make_request("a", 5))
    plan = driver.schedule()
    driver.recorder.schedule(plan)
    driver.recorder.abort("a", FinishReason.ABORT)
    driver.abort("a")
    driver.ask(make_request("a", 6, max_tokens=3))
    driver.recorder.fail((plan,))
    driver.fail(plan)
    driver.run_recorded()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event["abort"] for event in events if "abort" in event] == ["r0"]
    assert replay(path).tokens == 3


def without_names(snapshot: dict[str, Any]) -> dict[str, Any]:
    """A snapshot in which sequences are known by their rank alone."""
    for seq in (*snapshot["running"], *snapshot["waiting"]):
        del seq["request_id"]
        seq["forks"] = len(seq["forks"])
    return snapshot


@pytest.mark.parametrize("seed", range(30))
def test_in_the_middle_of_a_run_the_replayed_state_is_the_recorded_one(
    tmp_path: Path, seed: int
) -> None:
    """Blocks of each sequence included: what was shared is shared."""
    path = tmp_path / "log"
    rng = random.Random(1000 + seed)
    limits = random_limits(draw(rng, LIMITS))
    recorder = Recorder(path, limits)
    simulation = Simulation(limits, rng.randint(1, 3), recorder)
    for serial in range(rng.randint(20, 200)):
        (operation,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if operation in possible(simulation):
            perform(simulation, operation, draw(rng, REQUEST), serial)
    recorder.close()
    assert recorder._pseudonyms is not None
    assert recorder._pseudonyms._sequences.keys() == simulation.records.keys()
    state = replay(path).state
    assert without_names(state.snapshot()) == without_names(simulation.state.snapshot())


def record_sharing(path: Path) -> Limits:
    """Turns of a conversation, so that prompts and generated blocks are found again."""
    driver = Recorded(path, num_blocks=20)
    for turn in range(3):
        prompt = tuple(range(50, 50 + 4 * turn + 9))
        driver.ask(make_request(f"t{turn}", prompt, max_tokens=4))
        driver.ask(make_request(f"u{turn}", prompt, max_tokens=4, stop_ids=frozenset({3})))
    for _ in range(20):
        plan = driver.schedule()
        driver.recorder.schedule(plan)
        tokens = StepTokens(tuple(3 if row.start == 14 else 9 for row in plan.rows))
        driver.recorder.commit(plan, tokens)
        driver.commit(plan, tokens)
    assert driver.state.is_idle
    driver.recorder.close()
    return driver.limits


def test_a_changed_hash_count_or_stop_is_found_or_changes_no_plan(tmp_path: Path) -> None:
    """A replay that passes has compared every plan, so there is no third outcome."""
    path = tmp_path / "log"
    record_sharing(path)
    whole = replay(path)
    lines = path.read_text().splitlines(keepends=True)
    outcomes = {"found": 0, "harmless": 0}

    def try_with(number: int, event: dict[str, Any], *, must_fail: bool = False) -> None:
        path.write_text("".join([*lines[:number], json.dumps(event) + "\n", *lines[number + 1 :]]))
        try:
            seen = replay(path, check=True)
        except LogError:
            outcomes["found"] += 1
        else:
            assert not must_fail, f"line {number + 1} as {event}"
            outcomes["harmless"] += 1
            assert (seen.steps, seen.requests) == (whole.steps, whole.requests)

    for number, line in enumerate(lines[1:], 1):
        event = json.loads(line)
        if "admit" in event:
            for index in range(len(event["marks"])):
                marks = list(event["marks"])
                marks[index] ^= 1
                try_with(number, event | {"marks": marks})
            try_with(number, event | {"admit": event["admit"] + 1}, must_fail=True)
            try_with(number, event | {"forks": 1}, must_fail=True)
        elif "commit" in event:
            for index in range(len(event.get("marks", ()))):
                marks = [list(mark) for mark in event["marks"]]
                marks[index][1] ^= 1
                try_with(number, event | {"marks": marks})
            try_with(number, event | {"rows": event["rows"] + 1}, must_fail=True)
            has_later_steps = number < len(lines) - 4
            if "stops" in event:
                try_with(number, event | {"stops": []}, must_fail=has_later_steps)
            elif event["rows"]:
                try_with(number, event | {"stops": [0]})
    assert outcomes["found"] > 20
    assert outcomes["harmless"] > 5


@pytest.mark.parametrize(
    "change", [{"marks": [[2, 5]]}, {"stops": [2]}, {"stops": [-1]}, {"marks": [[0, 2**31]]}]
)
def test_a_commit_of_rows_that_are_not_there_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "log"
    record_sharing(path)
    lines = path.read_text().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines) if '"commit"' in line)
    event = json.loads(lines[number])
    lines[number] = json.dumps(event | {"rows": 2} | change) + "\n"
    path.write_text("".join(lines))
    with pytest.raises(LogError, match=f":{number + 1}: "):
        replay(path)


def test_prompts_are_bounded_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short line may stand for a long prompt; but those that ended count no more."""
    monkeypatch.setattr("engine.runtime.replay.MAX_PROMPT_TOKENS", 60)
    path = tmp_path / "log"
    driver = Recorded(path)
    for _ in range(4):
        driver.ask(make_request("a", 20, max_tokens=1), make_request("b", 20, max_tokens=1))
        while not driver.state.is_idle:
            plan = driver.schedule()
            driver.recorder.schedule(plan)
            driver.recorder.commit(plan, StepTokens((1,) * len(plan.rows)))
            driver.commit(plan)
    driver.ask(make_request("c", 40), make_request("d", 21))
    driver.recorder.close()
    with pytest.raises(LogError, match="a prompt of 21 tokens makes more than 60 of all prompts"):
        replay(path)


REQUESTS = [make_request(name, (1, 2, 3, 4)) for name in "ab"]
ROW = PlanRow(REQUESTS[0], 1, 2, 3, (4, 5, 6), np.array([7, 8], np.int32), True, 9, None)
PLAN = StepPlan(
    step=1,
    rows=(ROW, ROW),
    block_copies=(BlockCopy(1, 2),),
    preempted=("c",),
    swap_outs=(SwapOut(3, 4, b"key"),),
    swap_ins=(SwapIn(5, 6),),
    erased_blocks=(7, 8),
    erased_slots=(9,),
)
OTHER_PLANS: dict[str, Any] = {
    "step": 2,
    "rows": (ROW,),
    "block_copies": (BlockCopy(2, 1),),
    "preempted": ("d",),
    "swap_outs": (SwapOut(3, 5, b"key"),),
    "swap_ins": (SwapIn(6, 5),),
    "erased_blocks": (7, 9),
    "erased_slots": (8,),
}
OTHER_ROWS: dict[str, Any] = {
    "request": REQUESTS[1],
    "slot": 2,
    "start": 3,
    "num_tokens": 4,
    "token_ids": (),
    "block_ids": np.array([7, 9], np.int32),
    "samples": False,
    "output_position": 8,
    "history": (),
    "logits_of": 0,
}


def test_a_digest_depends_on_every_field_of_a_plan() -> None:
    """A field that is added belongs in the digest, or on a list of those left out, here."""
    assert OTHER_PLANS.keys() == {field.name for field in dataclasses.fields(StepPlan)}
    assert set(OTHER_ROWS) == set(PlanRow._fields)
    plans = [PLAN]
    plans += [dataclasses.replace(PLAN, **{name: value}) for name, value in OTHER_PLANS.items()]
    for name, value in OTHER_ROWS.items():
        plans.append(dataclasses.replace(PLAN, rows=(ROW, ROW._replace(**{name: value}))))
    moved = {"block_copies": PLAN.swap_ins, "swap_ins": PLAN.block_copies}
    plans.append(dataclasses.replace(PLAN, **moved))  # type: ignore[bad-argument-type]
    assert len({plan_digest(plan) for plan in plans}) == len(plans)


def test_a_digest_depends_on_no_token_key_or_name_that_was_given() -> None:
    other = ROW._replace(token_ids=(1, 1, 1), request=REQUESTS[1])
    plan = dataclasses.replace(PLAN, rows=(other, other), swap_outs=(SwapOut(3, 4, b"other"),))

    def name(_: str) -> str:
        return "r0"

    assert plan_digest(plan, name) == plan_digest(PLAN, name)
