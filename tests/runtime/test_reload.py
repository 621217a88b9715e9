"""Weights exchanged under a running engine: no answer is a mix, and failures change nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from engine import reload as reloading
from engine.config import ConfigError
from engine.config_file import from_tree
from engine.frontend import Engine
from engine.runtime.replay import replay
from engine.sampling import SamplingParams
from engine.types import Domain, FinishReason, QueueFull
from engine.weights import WeightsError
from tests.model.numpy_llama import forward
from tests.runtime import tiny

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
LONG = dataclasses.replace(GREEDY, max_tokens=60)
PROMPTS = [tiny.random_ids(length, seed=3) for length in (20, 40, 50, 70)]


def other_weights() -> dict[str, np.ndarray]:
    """Those of another model of the same architecture."""
    rng = np.random.default_rng(7)
    return {
        name: value + (rng.normal(size=value.shape) * value.std() * 0.5).astype(np.float32)
        for name, value in tiny.weights().items()
    }


def alone(weights: dict[str, np.ndarray], prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """What a model says by itself, by NumPy."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(np.argmax(forward(tiny.ARCH, weights, np.array(ids))[-1])))
    return tuple(ids[len(prompt) :])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one architecture."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("old", "new")}
    tiny.write_model(folders["old"])
    with pytest.MonkeyPatch.context() as patch:
        weights = other_weights()
        patch.setattr(tiny, "weights", lambda: weights)
        tiny.write_model(folders["new"])
    return folders


@pytest.fixture
def link(tmp_path: Path, both: dict[str, Path]) -> Path:
    """The source of the config: what an operator points elsewhere."""
    (tmp_path / "model").symlink_to(both["old"])
    return tmp_path / "model"


def point(link: Path, to: Path) -> None:
    """Exchange the files as operators do."""
    link.unlink()
    link.symlink_to(to)


@pytest.fixture
def engine(link: Path, tmp_path: Path) -> Iterator[Engine]:
    tree = tiny.config_tree(
        link,
        **{
            "cache.host_memory": 2**20,
            "cache.disk_path": str(tmp_path / "disk"),
            "cache.disk_size": 8 * 2**20,
            "cache.swap": "always",
        },
    )
    engine = Engine.from_config(from_tree(tree), record=str(tmp_path / "log"))
    yield engine
    engine.close()


async def answer(engine: Engine, prompt: Any, sampling: SamplingParams = GREEDY) -> tuple[int, ...]:
    deltas = [delta async for delta in engine.generate(prompt, sampling)]
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    return tuple(token for delta in deltas for token in delta.token_ids)


async def test_answers_are_of_the_old_weights_or_the_new_and_never_of_both(
    engine: Engine,
    link: Path,
    both: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = tiny.weights(), other_weights()
    before = [await answer(engine, prompt) for prompt in PROMPTS]
    assert before == [alone(old, prompt, 24) for prompt in PROMPTS]
    fingerprint = engine.model_info().weights_fingerprint
    # Some have begun when the new weights are there; others come then, and wait for those.
    launch, may_launch = engine._loaded.runner.launch, threading.Semaphore(0)
    monkeypatch.setattr(
        engine._loaded.runner, "launch", lambda *step: may_launch.acquire() and launch(*step)
    )
    begun = [asyncio.create_task(answer(engine, (*PROMPTS[0], n), LONG)) for n in range(3)]
    while engine.stats().running + engine.stats().waiting < 3:
        await asyncio.sleep(0.001)
    may_launch.release(4)
    while engine.stats().running < 3:
        await asyncio.sleep(0.001)
    point(link, both["new"])
    exchange = asyncio.create_task(engine.reload())
    await asyncio.sleep(0)
    pausing = asyncio.create_task(engine.life.pause())
    await asyncio.sleep(0)
    may_launch.release(10**6)
    await pausing
    while engine._loop._exchange is None:
        await asyncio.sleep(0.001)
    queued = [asyncio.create_task(answer(engine, prompt)) for prompt in PROMPTS]
    while engine.stats().waiting < len(PROMPTS):
        await asyncio.sleep(0.001)
    assert engine.stats().running == 3
    await engine.life.resume()
    assert await exchange
    found = await asyncio.gather(*begun)
    assert found == [alone(old, (*PROMPTS[0], n), LONG.max_tokens or 0) for n in range(3)]
    expected = [alone(new, prompt, 24) for prompt in PROMPTS]
    assert expected != before
    assert await asyncio.gather(*queued) == expected  # though all were cached in every tier
    assert [await answer(engine, prompt) for prompt in PROMPTS] == expected
    assert engine.model_info().weights_fingerprint != fingerprint
    assert engine.stats().compiles_after_warmup == 0
    # And back: what the disk has of the old ones is theirs again.
    point(link, both["old"])
    assert await engine.reload()
    assert [await answer(engine, prompt) for prompt in PROMPTS] == before
    engine.close()
    assert replay(tmp_path / "log", check=True).requests == engine.stats().finished["length"]


async def test_a_flush_reaches_what_other_weights_left_on_disk(
    engine: Engine, link: Path, both: dict[str, Path]
) -> None:
    async def cached() -> int:
        deltas = [delta async for delta in engine.generate(PROMPTS[3], GREEDY)]
        return deltas[-1].usage.cached_tokens

    for folder in (both["new"], both["old"]):  # what is in memory is written when it is evicted
        assert await cached() == 0
        for seed in range(6):
            await answer(engine, tiny.random_ids(200, seed=seed))
        point(link, folder)
        assert await engine.reload()
    assert await cached() > 0, "the control"
    point(link, both["new"])
    assert await engine.reload()
    await engine.flush(Domain())
    assert await cached() == 0
    point(link, both["old"])
    assert await engine.reload()
    assert await cached() == 0


async def test_a_reload_that_is_asked_for_in_a_pause_is_refused(engine: Engine) -> None:
    await engine.life.pause()
    with pytest.raises(ConfigError, match="paused; resume it first"):
        await engine.reload()
    await engine.life.resume()
    assert not await engine.reload()


async def test_new_weights_beside_which_the_pool_finds_no_room_leave_the_old_ones(
    engine: Engine, link: Path, both: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [await answer(engine, prompt) for prompt in PROMPTS]
    engine.life.watch(step_timeout=60.0, recovery_timeout=60.0, max_failed_steps=3)
    runner = engine._loaded.runner
    reset, failures = runner.reset, iter(range(2))

    def failing() -> None:
        runner._kv_pool = runner._state = None
        if next(failures, None) is not None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")
        reset()

    monkeypatch.setattr(runner, "reset", failing)
    point(link, both["new"])
    with pytest.raises(ConfigError, match="doesn't fit beside both weights"):
        await engine.reload()
    assert [await answer(engine, prompt) for prompt in PROMPTS] == before
    assert engine.is_alive


async def test_the_same_weights_are_not_read_again(engine: Engine) -> None:
    before = [await answer(engine, prompt) for prompt in PROMPTS]
    assert not await engine.reload()
    assert engine.stats().cached_blocks
    assert [await answer(engine, prompt) for prompt in PROMPTS] == before


async def test_what_can_not_take_their_place_leaves_the_old_weights_serving(
    engine: Engine, link: Path, both: dict[str, Path], tmp_path: Path
) -> None:
    before = [await answer(engine, prompt) for prompt in PROMPTS]
    other = tmp_path / "other"
    shutil.copytree(both["new"], other)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace("10000.0", "20000.0"))
    point(link, other)
    with pytest.raises(ConfigError, match="rope_theta is 20000"):
        await engine.reload()
    (other / "config.json").write_text(text)
    tokenizer = (other / "tokenizer_config.json").read_text()
    (other / "tokenizer_config.json").write_text(tokenizer.replace("assistant:", "model:"))
    with pytest.raises(ConfigError, match="another tokenizer, chat template"):
        await engine.reload()
    for file in other.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(WeightsError):
        await engine.reload()
    assert [await answer(engine, prompt) for prompt in PROMPTS] == before
    point(link, both["new"])
    assert await engine.reload()


@pytest.fixture
async def slow_reading(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[asyncio.Event]:
    """Reading waits until this is set."""
    may_read, event_loop = asyncio.Event(), asyncio.get_running_loop()
    read_again = reloading.read_again

    def wait(loaded: Any) -> Any:
        asyncio.run_coroutine_threadsafe(may_read.wait(), event_loop).result()
        return read_again(loaded)

    monkeypatch.setattr(reloading, "read_again", wait)
    yield may_read
    may_read.set()


async def test_one_reload_at_a_time_and_requests_go_on_while_files_are_read(
    engine: Engine, link: Path, both: dict[str, Path], slow_reading: asyncio.Event
) -> None:
    point(link, both["new"])
    exchange = asyncio.create_task(engine.reload())
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="being reloaded already"):
        await engine.reload()
    assert await answer(engine, PROMPTS[0]) == alone(tiny.weights(), PROMPTS[0], 24)
    exchange.cancel()  # whoever asked has left: it is done all the same
    with pytest.raises(asyncio.CancelledError):
        await exchange
    slow_reading.set()
    expected = alone(other_weights(), PROMPTS[0], 24)
    while await answer(engine, PROMPTS[0]) != expected:
        await asyncio.sleep(0.01)
