"""The disk tier below a running engine: what comes back is what was, and nobody else waits."""

from __future__ import annotations

import dataclasses
import errno
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from engine.config import BucketConfig, SchedulerConfig
from engine.runtime import clocks, tiers
from engine.runtime.block_file import BlockLayout
from engine.runtime.disk_tier import DiskTier
from engine.runtime.loop import EngineLoop
from engine.runtime.replay import replay
from engine.runtime.runner import Launched
from engine.types import Domain, FinishReason, Fork, Request, StepPlan, SwapOut
from tests.engines import Result, SmallEngine, make_request, small_engine
from tests.runtime.fake_runner import Listener
from tests.runtime.tiny import random_ids

HOST_BLOCKS = 100
ALICE, BOB = Domain("alice"), Domain("bob")
MAX_BYTES = 2**26
FOREVER = 1e6  # seconds


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> SmallEngine:
    """The tiny model; 11 blocks are little more than its longest sequence takes."""
    return small_engine(
        tiny_model,
        num_blocks=64,
        block_size=16,
        max_model_len=160,
        config=SchedulerConfig(max_num_seqs=4, max_step_tokens=64),
        buckets=BucketConfig(decode_seqs=(4,), prefill_tokens=(64,), prefill_seqs=(4,)),
        host_blocks=HOST_BLOCKS,
    )


def layout_of(engine: SmallEngine, fingerprint: str = "tests") -> BlockLayout:
    assert engine.runner.host is not None
    block = engine.runner.host.block
    return BlockLayout(block.shape, block.dtype.name, fingerprint)


class Gate(DiskTier):
    """A disk whose fetches end when they are let, and then fail if told."""

    def __init__(self, folder: Path, layout: BlockLayout):
        super().__init__(folder, MAX_BYTES, layout)
        self.gate = threading.Event()
        self.error: Exception | None = None
        self.asked: list[Sequence[bytes]] = []
        self.threads: list[threading.Thread] = []

    def fetch(self, keys: Sequence[bytes]) -> Future[list[np.ndarray]]:
        self.asked.append(keys)
        future: Future[list[np.ndarray]] = Future()

        def answer() -> None:
            self.gate.wait()
            if not future.set_running_or_notify_cancel():
                return
            if self.error is not None:
                future.set_exception(self.error)
            else:
                found = [self.get(key) for key in keys]
                assert None not in [None if block is None else 0 for block in found]
                future.set_result([block for block in found if block is not None])

        self.threads.append(threading.Thread(target=answer))
        self.threads[-1].start()
        return future

    def end(self) -> None:
        self.gate.set()
        for thread in self.threads:
            thread.join()
        self.close()


def start(
    engine: SmallEngine, disk: DiskTier, *, record: str | None = None, **limits: Any
) -> tuple[EngineLoop, Listener]:
    """A loop on a fresh pool."""
    engine.runner.reset()
    listener = Listener()
    own = dataclasses.replace(engine.limits, **limits)
    return EngineLoop(engine.runner, own, listener, record, disk=disk), listener


def run(loop: EngineLoop, listener: Listener, requests: Sequence[Request]) -> list[Result]:
    """What becomes of requests that come at once, however slow the machine is."""
    all_are_there = threading.Event()
    loop.look(lambda _: all_are_there.wait())
    for request in requests:
        loop.submit(request)
    all_are_there.set()
    return listener.until_ended(*(request.request_id for request in requests))


def conversation(number: int, seed: int) -> Request:
    """Some with a prefix in common, some sampled."""
    shared = random_ids(32, seed=3)
    prompt = (shared if number % 2 else ()) + random_ids(17 + 2 * number, seed=seed)
    return make_request(
        f"r{number}", prompt, 70, seed=number, temperature=0.8 * (number % 3 > 0), ignore_eos=True
    )


@pytest.mark.parametrize("seed", range(2))
def test_preempted_swapped_and_disk_restored_sequences_give_what_each_gives_alone(
    engine: SmallEngine, tmp_path: Path, seed: int
) -> None:
    """Over several lives of an engine on one folder, each with a pool of little more than one
    sequence, with follow-ups of what was said in earlier lives."""
    rng = random.Random(seed)
    alone: dict[str, Result] = {}
    preempted: set[str] = set()
    totals = {"in": 0, "out": 0, "restored": 0}
    said: list[tuple[int, ...]] = []
    launch = engine.runner.launch

    def watched(plan: Any, batch: Any) -> Any:
        preempted.update(plan.preempted)
        return launch(plan, batch)

    for life in range(3):
        requests = [
            dataclasses.replace(conversation(number, seed), request_id=f"{life}/{number}")
            for number in rng.sample(range(8), 5)
        ]
        requests += [
            make_request(f"{life}/again{n}", text[:100], 50, seed=n, temperature=0.7)
            for n, text in enumerate(said[-3:])
        ]
        for request in requests:
            alone[request.request_id] = engine.run_one(request)
        disk = DiskTier(tmp_path / "blocks", MAX_BYTES, layout_of(engine))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.runner, "launch", watched)
            loop, listener = start(
                engine,
                disk,
                record=str(tmp_path / f"log{life}"),
                num_blocks=rng.choice((11, 12)),
                host_blocks=rng.choice((4, 12, HOST_BLOCKS)),
                compute_ns=rng.choice((0, 0, 0, 1000)),
                swap_in_ns=rng.choice((0, 9000)),
            )
            results = run(loop, listener, requests)
            loop.close()
        assert disk.close(FOREVER)
        for request, result in zip(requests, results, strict=True):
            assert result.token_ids == alone[request.request_id].token_ids, request.request_id
            said.append(request.prompt_ids + result.token_ids)
        totals["in"] += loop.totals.swapped_in_blocks
        totals["out"] += loop.totals.swapped_out_blocks
        totals["restored"] += loop.tiers.num_restored
        assert replay(tmp_path / f"log{life}").requests == len(requests)
    assert (
        len(preempted) >= 5
    )  # how many depends on when they arrive; `test_stateful_engine` has all
    assert min(totals.values()) > 5, totals


def warm_up(engine: SmallEngine, folder: Path, request: Request) -> Result:
    """Run a request in an engine that is closed in the end."""
    disk = DiskTier(folder, MAX_BYTES, layout_of(engine))
    loop, listener = start(engine, disk)
    (result,) = run(loop, listener, [request])
    loop.close()
    assert disk.close(FOREVER)
    return result


def test_a_restart_finds_its_blocks(engine: SmallEngine, tmp_path: Path) -> None:
    """Nothing had to leave the pool: it is written at the close."""
    request = make_request("a", random_ids(100), 8)
    first = warm_up(engine, tmp_path / "blocks", request)
    again = warm_up(engine, tmp_path / "blocks", request)
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 96)
    assert again.token_ids == first.token_ids


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rotten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [torn, rotten])
def test_a_damaged_file_is_a_miss(
    engine: SmallEngine, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    request = make_request("a", random_ids(100), 8)
    first = warm_up(engine, tmp_path / "blocks", request)
    files = list((tmp_path / "blocks").glob("*/*.blk"))
    assert len(files) >= 6
    for path in files:
        damage(path)
    disk = DiskTier(tmp_path / "blocks", MAX_BYTES, layout_of(engine))
    loop, listener = start(engine, disk)
    (again,) = run(loop, listener, [request])
    assert sum(disk.counts().misses.values()) > 0  # they were looked at
    loop.close()
    disk.close()
    assert (again.num_cached_tokens, again.token_ids) == (0, first.token_ids)


def test_blocks_of_another_model_are_misses(engine: SmallEngine, tmp_path: Path) -> None:
    request = make_request("a", random_ids(100), 8)
    warm_up(engine, tmp_path / "blocks", request)
    disk = DiskTier(tmp_path / "blocks", MAX_BYTES, layout_of(engine, "others"))
    loop, listener = start(engine, disk)
    (again,) = run(loop, listener, [request])
    loop.close()
    disk.close()
    assert again.num_cached_tokens == 0


@pytest.fixture
def held(engine: SmallEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A loop on a warm folder, whose reads wait: loop, listener, disk, the request, its tokens."""
    monkeypatch.setattr(tiers, "MAX_HELD_SECONDS", FOREVER)  # a slow test is not given up
    request = make_request("a", random_ids(100), 8, domain=ALICE)
    expected = warm_up(engine, tmp_path / "blocks", request).token_ids
    disk = Gate(tmp_path / "blocks", layout_of(engine))
    loop, listener = start(engine, disk, record=str(tmp_path / "log"))
    yield loop, listener, disk, request, expected
    loop.close()
    disk.end()
    replay(tmp_path / "log", check=True)


def until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.001)


def test_who_waits_for_a_disk_holds_nobody_back(held: Any) -> None:
    loop, listener, disk, request, expected = held
    loop.submit(request)
    until(lambda: disk.asked)
    until(lambda: loop.tiers.num_held)
    assert loop.gauges[:2] == (0, 1)
    (other,) = run(loop, listener, [make_request("b", random_ids(40, seed=9), 4)])
    assert other.finish_reason is FinishReason.LENGTH
    assert listener.results["a"].finish_reason is None
    disk.gate.set()  # nothing runs, so this must wake the loop
    (result,) = listener.until_ended("a")
    assert result.waited is not None
    assert 0 < result.waited.held["disk"].seconds <= result.waited.seconds
    assert (result.num_cached_tokens, result.token_ids) == (96, expected)


def test_who_waits_can_be_aborted_and_its_forks_alone(held: Any) -> None:
    loop, listener, disk, request, expected = held
    forks = (Fork("f1", 0), Fork("f2", 0))
    loop.submit(dataclasses.replace(request, forks=forks))
    until(lambda: disk.asked)
    assert loop.gauges[:2] == (0, 3)
    loop.abort("f1")
    ended = listener.until_ended("a", "f1", "f2")
    assert [one.finish_reason for one in ended][1] is FinishReason.ABORT
    assert [ended[0].token_ids, ended[2].token_ids] == [expected, expected]
    assert ended[0].num_cached_tokens == 0  # it was not waited for


def test_a_deadline_ends_who_waits(held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, listener, disk, request, _ = held
    now = time.monotonic()
    monkeypatch.setattr(clocks, "time", SimpleNamespace(monotonic=lambda: now))
    loop.submit(dataclasses.replace(request, deadline=now + 0.05))
    until(lambda: disk.asked)
    now += 0.05
    (result,) = listener.until_ended("a")
    assert result.finish_reason is FinishReason.DEADLINE


def test_close_ends_who_waits(held: Any) -> None:
    loop, listener, disk, request, _ = held
    loop.submit(request)
    until(lambda: disk.asked)
    loop.close()
    (result,) = listener.until_ended("a")
    assert result.finish_reason is FinishReason.ABORT


def test_a_slow_disk_is_given_up(held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, listener, _, request, expected = held
    monkeypatch.setattr(tiers, "MAX_HELD_SECONDS", 0.02)
    (result,) = run(loop, listener, [request])
    assert (result.num_cached_tokens, result.token_ids) == (0, expected)


def test_a_disk_that_fails_costs_the_blocks_only(
    held: Any, caplog: pytest.LogCaptureFixture
) -> None:
    loop, listener, disk, request, expected = held
    disk.error = OSError("gone")
    disk.gate.set()
    (result,) = run(loop, listener, [request])
    assert (result.num_cached_tokens, result.token_ids) == (0, expected)
    assert "they are computed" in caplog.text


def test_a_second_request_of_the_same_name_is_the_one_refused(held: Any) -> None:
    loop, listener, disk, request, expected = held
    loop.submit(request)
    until(lambda: disk.asked)
    loop.submit(make_request("a", random_ids(20), 4))
    until(lambda: "a" in listener.rejected)
    until(lambda: listener.results["a"].finish_reason)
    assert listener.results["a"].token_ids == expected


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize(("flushed", "cached"), [(BOB, 96), (ALICE, 0), (None, 0)])
def test_who_waits_for_a_disk_at_a_flush_finds_nothing_and_leaves_nothing(
    held: Any, flushed: Domain | None, cached: int, is_read: bool
) -> None:
    """Whether its blocks have come by then, which the loop hasn't seen, or not."""
    loop, listener, disk, request, expected = held
    loop.submit(request)
    until(lambda: disk.asked)
    # Of what was asked for, all that is read is what was there before.
    found = [disk.get(key) for key in disk.asked[0]]
    disk.get = dict(zip(disk.asked[0], found, strict=True)).__getitem__
    entered, leave = threading.Event(), threading.Event()
    loop.look(lambda _: (entered.set(), leave.wait()))
    assert entered.wait(30)
    (waiting,) = loop.tiers._requests()
    if is_read:  # right before the flush, on the loop's thread
        loop.look(lambda _: (disk.gate.set(), until(lambda: waiting.blocks)))
    done = loop.flush(flushed)
    leave.set()
    done.result(30)
    disk.gate.set()
    (result,) = listener.until_ended("a")
    assert (result.num_cached_tokens, result.token_ids) == (cached, expected)
    (again,) = run(loop, listener, [dataclasses.replace(request, request_id="again")])
    assert (again.num_cached_tokens, again.token_ids) == (cached, expected)


def domains_run(
    engine: SmallEngine, folder: Path, requests: Sequence[Request], *flushed: Domain | None
) -> list[int]:
    """How many prompt tokens of each request are found by an engine on a folder, which forgets
    those domains and is closed."""
    disk = DiskTier(folder, MAX_BYTES, layout_of(engine))
    loop, listener = start(engine, disk)
    found = [one.num_cached_tokens for one in run(loop, listener, requests)]
    for domain in flushed:
        loop.flush(domain).result(30)
    loop.close()
    assert disk.close(FOREVER)
    return found


def test_a_flush_leaves_the_other_domains_on_disk(engine: SmallEngine, tmp_path: Path) -> None:
    """What was written by earlier engines is forgotten too, and what lies in memory."""
    folder = tmp_path / "blocks"
    prompt = random_ids(100)
    alice, bob, salted = (
        make_request(domain.salt or domain.tenant, prompt, 2, domain=domain)
        for domain in (ALICE, BOB, Domain("alice", "salt"))
    )
    everyone = (alice, bob, salted)
    assert domains_run(engine, folder, everyone) == [0, 0, 0]
    assert domains_run(engine, folder, everyone) == [96, 96, 96], "the control"
    assert domains_run(engine, folder, (), ALICE) == []
    assert domains_run(engine, folder, everyone, ALICE) == [0, 96, 96]
    assert domains_run(engine, folder, everyone, None) == [0, 96, 96]
    assert domains_run(engine, folder, everyone) == [0, 0, 0]


def test_what_went_out_with_a_step_before_a_flush_is_not_written_after_it(
    engine: SmallEngine, tmp_path: Path
) -> None:
    """A step is on its way, with blocks of two domains, when one of them is flushed."""
    disk = DiskTier(tmp_path / "blocks", MAX_BYTES, layout_of(engine))
    assert engine.runner.host is not None
    own = tiers.Tiers(disk, engine.runner.host, engine.limits, lambda: None, lambda: 0.0)
    blocks = [np.zeros(disk.layout.shape, disk.layout.dtype)] * 3
    key = [bytes([number]) * 32 for number in range(3)]
    swaps = [SwapOut(0, n, key[n], 0, domain) for n, domain in enumerate((ALICE, BOB, None))]

    def keep(step: int) -> list[bool]:
        outgoing = SimpleNamespace(finish=lambda: list(zip(swaps, blocks, strict=True)))
        own.keep(cast(Launched, SimpleNamespace(plan=StepPlan(step, ()), outgoing=outgoing)))
        assert disk.flush(30)
        tags = map(tiers.tag_of, (ALICE, BOB, None))
        return [key[n] + tag in disk for n, tag in enumerate(tags)]

    own.flush(ALICE, 7).result(30)
    assert keep(6) == [False, True, True]
    own.flush(None, 8).result(30)
    assert keep(7) == [False, False, True]
    assert keep(8) == [True, True, True]
    assert disk.close(FOREVER)


def test_a_flush_reaches_what_a_tier_of_old_weights_still_writes(
    engine: SmallEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, may_write = tmp_path / "blocks", threading.Event()
    old, new = (
        DiskTier(folder, MAX_BYTES, layout_of(engine, fingerprint)) for fingerprint in ("a", "b")
    )
    write = old._folder.write
    monkeypatch.setattr(old._folder, "write", lambda *args: may_write.wait(30) and write(*args))
    own = tiers.Tiers(old, engine.runner.host, engine.limits, lambda: None, lambda: 0.0)
    block = np.zeros(old.layout.shape, old.layout.dtype)
    for domain in (ALICE, BOB):
        assert old.put(bytes(32) + tiers.tag_of(domain), block)
    own.exchange(engine.limits, new)
    flushed = own.flush(ALICE, 1)
    assert new.flush(30)  # whose part is done
    assert not flushed.done()
    may_write.set()
    flushed.result(30)
    assert old.close(30)
    [left] = folder.glob("??/*.blk")
    assert tiers.tag_of(BOB).hex() in left.name
    own.flush(BOB, 2).result(30)  # though the old one is closed
    assert not list(folder.glob("??/*.blk"))
    assert new.close(30)


def test_blocks_that_only_one_request_could_find_are_not_written(
    engine: SmallEngine, tmp_path: Path
) -> None:
    folder = tmp_path / "blocks"
    requests = [
        make_request(f"r{n}", random_ids(100, seed=n), 2, is_private=True) for n in range(3)
    ]
    disk = DiskTier(folder, MAX_BYTES, layout_of(engine))
    loop, listener = start(engine, disk, num_blocks=11)
    run(loop, listener, requests)
    assert loop.totals.swapped_out_blocks == 0, "they went to the host tier"
    loop.close()
    assert disk.close(FOREVER)
    assert list(folder.rglob("*.blk")) == []


def test_what_has_expired_is_not_found_after_a_restart(engine: SmallEngine, tmp_path: Path) -> None:
    folder = tmp_path / "blocks"
    prompts = [random_ids(100, seed=number) for number in range(2)]
    short, long = (
        make_request(f"r{time_to_live}", prompt, 2, cache_ttl=time_to_live)
        for prompt, time_to_live in zip(prompts, (1_000_000, 3_000_000), strict=True)
    )
    assert domains_run(engine, folder, (short, long)) == [0, 0]
    written = list(folder.rglob("*.blk"))
    assert len(written) >= 12
    now = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now + 2000)
        assert domains_run(engine, folder, (short, long)) == [0, 96]


def test_a_flush_that_nobody_waits_for_any_more_costs_nothing(
    held: Any, caplog: pytest.LogCaptureFixture
) -> None:
    loop, listener, _, _, _ = held
    entered, leave = threading.Event(), threading.Event()
    loop.look(lambda _: (entered.set(), leave.wait()))
    assert entered.wait(30)
    flushed = loop.flush(ALICE)
    assert flushed.cancel()
    leave.set()
    (other,) = run(loop, listener, [make_request("b", random_ids(40, seed=9), 4)])
    assert other.finish_reason is FinishReason.LENGTH
    assert loop.is_alive
    assert loop.flush(BOB).result(30) == 0  # the disk answers in order
    assert caplog.records == []


def test_who_flushes_hears_that_the_disk_failed(held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _, disk, _, _ = held

    def refuse(name: str) -> bool:
        raise OSError("read-only")

    monkeypatch.setattr(disk._folder, "remove", refuse)
    with pytest.raises(OSError, match="can't be removed"):
        loop.flush(ALICE).result(30)
    assert loop.flush(BOB).result(30) == 0
    assert loop.is_alive


def test_a_read_that_takes_longer_than_computing_is_not_begun(
    engine: SmallEngine, tmp_path: Path
) -> None:
    """A gigabyte a second is assumed: eight microseconds for a block of eight kilobytes."""
    request = make_request("a", random_ids(100), 8)
    warm_up(engine, tmp_path / "blocks", request)
    for compute_ns, cached in ((400, 0), (10**9, 96)):
        disk = DiskTier(tmp_path / "blocks", MAX_BYTES, layout_of(engine))
        loop, listener = start(engine, disk, compute_ns=compute_ns)
        (result,) = run(loop, listener, [request])
        loop.close()
        disk.close()
        assert result.num_cached_tokens == cached, compute_ns


def test_the_step_loop_survives_a_failed_step_with_blocks_from_disk(
    held: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The blocks lie in the host's memory, so a device that failed doesn't take them along."""
    loop, listener, disk, request, expected = held
    runner = loop._runner
    launch = runner.launch
    disk.gate.set()
    monkeypatch.setattr(runner, "launch", lambda *_: 1 / 0)
    (failed,) = run(loop, listener, [request])
    assert failed.finish_reason is FinishReason.ERROR
    monkeypatch.setattr(runner, "launch", launch)
    (again,) = run(loop, listener, [dataclasses.replace(request, request_id="b")])
    assert (again.num_cached_tokens, again.token_ids) == (96, expected)


def test_the_time_of_a_read_is_that_of_the_blocks_that_came(
    engine: SmallEngine, tmp_path: Path
) -> None:
    disk = DiskTier(tmp_path / "blocks", MAX_BYTES, layout_of(engine))
    own = tiers.Tiers(disk, engine.runner.host, engine.limits, lambda: None, lambda: 0.0)
    keys = [bytes([number]) * 40 for number in range(3)]
    block = np.zeros(disk.layout.shape, disk.layout.dtype)
    for key in keys[:2]:
        assert disk.put(key, block)
    waiting = tiers._Held(make_request("a", random_ids(100), 8), 0, tuple(keys), 0.0)
    waiting.future = disk.fetch(keys)
    own._held["a"] = waiting
    own._take(waiting, waiting.future)
    waiting.seconds = 0.008
    before = own._read_ns
    (arrival,) = own.release()
    assert len(arrival.blocks) == 2
    assert own._read_ns == before + (4_000_000 - before) // 4
    assert disk.close(FOREVER)


def test_flushes_while_nothing_runs_are_not_remembered_without_end(
    engine: SmallEngine, tmp_path: Path
) -> None:
    """Only steps make that they are forgotten. A client can invent domains without end."""
    disk = DiskTier(tmp_path / "blocks", MAX_BYTES, layout_of(engine))
    own = tiers.Tiers(disk, engine.runner.host, engine.limits, lambda: None, lambda: 0.0)
    for number in range(3000):
        own.flush(Domain("alice", str(number)), 7)
        assert len(own._flushed) <= 1024
    assert disk.close(FOREVER)


@pytest.mark.parametrize(("failed", "cached"), [(ALICE, [0, 96]), (BOB, [96, 0])])
def test_a_close_writes_the_others_blocks_though_a_flush_failed(
    engine: SmallEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failed: Domain,
    cached: list[int],
) -> None:
    """What can't be written for one domain, whose old blocks may be there, ends nothing else."""
    folder = tmp_path / "blocks"
    prompts = [random_ids(100, seed=number) for number in range(2)]
    requests = [
        make_request(domain.tenant, prompt, 2, domain=domain)
        for domain, prompt in zip((ALICE, BOB), prompts, strict=True)
    ]
    disk = DiskTier(folder, MAX_BYTES, layout_of(engine))
    loop, listener = start(engine, disk)
    with monkeypatch.context() as patch:
        patch.setattr(disk._folder, "names", raise_too_many_files)
        with pytest.raises(OSError, match="Too many open files"):
            loop.flush(failed).result(30)
    run(loop, listener, requests)
    loop.close()
    assert disk.close(FOREVER)
    assert domains_run(engine, folder, requests) == cached


def raise_too_many_files(**_: bool) -> list[str]:
    raise OSError(errno.EMFILE, "Too many open files")
