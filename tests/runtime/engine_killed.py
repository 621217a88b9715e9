"""Engines over a disk tier that answer the same requests until they are killed; run as a script.

``MODEL FOLDER EXPECTED CACHE``: a model's folder, the tier's, a JSON file with the right tokens of
each prompt, and a compile cache. For each line ``SECONDS`` on stdin an engine is started in a fork,
which saves the imports. It is killed that long after it answered every prompt once, and a half-
written file is seen, for which half a second is waited. A line says how it ended, and whether the
first answers found anything of their prompts, which came from the disk.
"""

from __future__ import annotations

import asyncio
import glob
import json
import os
import signal
import sys
import time
from pathlib import Path

from jax._src import xla_bridge

from engine.config_file import from_tree
from engine.frontend import Engine
from engine.loading import load_engine  # noqa: F401 - imported once for all that are forked
from engine.sampling import SamplingParams
from tests.runtime.tiny import config_tree, random_ids

WRONG_ANSWER = 3
PROMPTS = [random_ids(40 + 9 * number, seed=number) for number in range(8)]
SAMPLING = SamplingParams(temperature=0.8, seed=5, max_tokens=24, ignore_eos=True)


def make_engine(model: str, folder: str, cache: str) -> Engine:
    """Blocks leave a pool of 20 all the time, and a folder that holds 30 of the 44 there are."""
    options = {
        "cache.num_blocks": 20,
        "cache.host_memory": 32 * 8192,
        "cache.disk_path": folder,
        "cache.disk_size": 30 * 8324,
        "cache.swap": "always",
        "model.max_model_len": 256,
        "compile_cache": cache,
    }
    return Engine.from_config(from_tree(config_tree(Path(model), **options)))


async def answer(engine: Engine, prompt: tuple[int, ...]) -> tuple[list[int], int]:
    """The tokens, and how many of the prompt's came from the cache."""
    tokens: list[int] = []
    cached = 0
    async for delta in engine.generate(prompt, SAMPLING):
        tokens += delta.token_ids
        cached = delta.usage.cached_tokens if delta.usage else cached
    return tokens, cached


async def answer_for_ever(engine: Engine, expected: list[list[int]], ready: int) -> None:
    """End only at a wrong one."""
    first = True
    while True:
        answers = await asyncio.gather(*(answer(engine, prompt) for prompt in PROMPTS))
        if [tokens for tokens, _ in answers] != expected:
            os._exit(WRONG_ANSWER)
        if first:
            os.write(ready, b"w" if any(cached for _, cached in answers) else b"c")
        first = False


def main() -> None:
    """Fork, wait, kill, report; for each line of stdin."""
    model, folder, expected, cache = sys.argv[1:]
    right = json.loads(Path(expected).read_text())
    for seconds in sys.stdin:
        started, ready = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                engine = make_engine(model, folder, cache)
                asyncio.run(answer_for_ever(engine, right, ready))
            finally:
                os._exit(1)
        os.close(ready)
        heard = os.read(started, 1)  # nothing, if it ended by itself
        time.sleep(float(seconds))
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline and not any(glob.iglob(f"{folder}/??/*.tmp")):
            pass
        os.kill(child, signal.SIGKILL)
        end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(started)
        print(end, {b"w": "warm", b"c": "cold"}.get(heard, "none"), flush=True)


if __name__ == "__main__":
    assert not xla_bridge.backends_are_initialized()  # threads don't live through a fork
    main()
