"""A flush of one domain in a whole engine over a disk, and what a kill right after it leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

from engine.frontend import Engine
from engine.runtime.tiers import tag_of
from engine.sampling import SamplingParams
from engine.types import Domain
from tests.runtime.engine_killed import PROMPTS, make_engine

ALICE, BOB = Domain("default", "alice"), Domain("default", "bob")
ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1)


async def ask_all(engine: Engine, domain: Domain, *, share_prefix: bool = True) -> int:
    """The prompts' tokens that were found."""
    found = 0
    for prompt in PROMPTS[:4]:
        answer = engine.generate(prompt, ONE_TOKEN, domain=domain, share_prefix=share_prefix)
        deltas = [delta async for delta in answer]
        found += deltas[-1].usage.cached_tokens
    return found


def tags(folder: Path) -> set[str]:
    """Of the blocks on disk."""
    return {path.name.split(".")[0][64:] for path in folder.glob("??/*.blk")}


async def test_a_flush_of_one_domain_outlives_a_kill_and_leaves_the_other(
    tiny_model: Path, tmp_path: Path
) -> None:
    """A kill leaves the folder as it is when the flush is answered: a copy of it is opened."""
    cache = str(tmp_path / "compiled")
    folder, as_killed = tmp_path / "blocks", tmp_path / "as_killed"
    engine = make_engine(str(tiny_model), str(folder), cache)
    alice, bob = tag_of(ALICE).hex(), tag_of(BOB).hex()
    for domain in (ALICE, BOB):  # the pool and the host tier are too small for both
        assert await ask_all(engine, domain, share_prefix=False) == 0
        await ask_all(engine, domain)
    engine.close()
    assert tags(folder) == {alice, bob}, "what nobody can find is not written"
    engine = make_engine(str(tiny_model), str(folder), cache)
    assert await ask_all(engine, ALICE) > 0, "the control"
    await engine.flush(ALICE)
    shutil.copytree(folder, as_killed)
    engine.close()
    assert tags(as_killed) == {bob}
    engine = make_engine(str(tiny_model), str(as_killed), cache)
    assert await ask_all(engine, ALICE) == 0
    assert await ask_all(engine, BOB) > 0
    engine.close()
