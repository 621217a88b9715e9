"""What the picture costs: taking and encoding it, and drawing it in a browser.

python -m benchmarks.picture [BLOCKS]       (needs a Chromium, as `make browser` does)
"""

from __future__ import annotations

import dataclasses
import functools
import http.server
import statistics
import sys
import threading
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import msgspec
import numpy as np

from engine.bench import machine
from engine.core import scheduler
from engine.core.limits import Limits
from engine.core.picture import Frame, Picture, take_picture
from engine.core.scheduler import SchedulerState
from engine.dashboard.frames import encode
from engine.sampling import SamplingParams
from engine.types import Request, StepTokens

NUM_SEQS = 256
REPEATS = 30


def busy_pool(num_blocks: int) -> tuple[SchedulerState, Limits]:
    """A pool of which 256 sequences own four fifths, and most of the rest is cached."""
    share = int(0.8 * num_blocks / NUM_SEQS) * 16
    limits = Limits(
        num_blocks=num_blocks,
        block_size=16,
        max_num_seqs=NUM_SEQS,
        max_step_tokens=2**20,
        max_model_len=2 * share,
    )
    state = SchedulerState.initial(limits)
    for number in range(NUM_SEQS + 50):
        if number == 50:  # the first fifty end, and their blocks stay
            state, plan = scheduler.schedule(state, limits)
            tokens = StepTokens((0,) * len(plan.rows))
            state, _ = scheduler.commit(state, plan, tokens, limits)
            for ended in range(50):
                state, _ = scheduler.abort(state, f"r{ended}")
        prompt = (number,) * (share - 100)
        request = Request(f"r{number}", prompt, SamplingParams(), max_tokens=100)
        state = scheduler.admit(state, limits, request)
    state, plan = scheduler.schedule(state, limits)
    tokens = StepTokens((0,) * len(plan.rows))
    return scheduler.commit(state, plan, tokens, limits).state, limits


def _scattered(picture: Picture) -> Picture:
    """The same with other blocks, as in a pool that has run for long: no two follow each other."""
    order = np.random.default_rng(0).permutation(picture.num_blocks).astype(np.int32)
    running = tuple(seq._replace(block_ids=order[seq.block_ids]) for seq in picture.running)
    return dataclasses.replace(picture, running=running, cached=np.sort(order[picture.cached]))


def median_ms(work: Callable[[], object]) -> float:
    """Milliseconds that something takes, the median of some times."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


# In the page: `frame` becomes a panel, and parts of drawing it are timed.
_DRAWING = """
const [frame, repeats, done] = arguments;
Promise.all(['colours', 'model', 'panel'].map((name) => import(`./${name}.js`))).then(
  ([{ Colours }, { Pool, Series }, { Panel }]) => {
    const panel = new Panel(document.getElementById('panel'), { name: 'pool', unit: 's' });
    document.getElementById('panels').replaceChildren(panel.element);
    const pool = new Pool();
    const series = new Series();
    const median = (work) => {
      const times = [];
      for (let each = 0; each < repeats; each += 1) {
        const begin = performance.now();
        work();
        times.push(performance.now() - begin);
      }
      return times.sort((a, b) => a - b)[repeats >> 1];
    };
    const curves = (key) => ({
      times: series.time, values: series.curves[key], from: 0, to: 1, top: 1, at: null, index: 0,
    });
    const found = {};
    found['read all of it'] = median(() => pool.apply(frame));
    found['work out owners'] = median(() => pool.derive());
    series.add(pool);
    panel.layout(pool, new Colours(), { width: panel.width, height: 560 });
    panel.draw(pool, curves);
    found['paint every block'] = median(() => { panel.grid.seen.fill(-1); panel.grid.draw(pool); });
    found['paint 256 blocks'] = median(() => {
      for (let each = 0; each < 256; each += 1) panel.grid.seen[(each * 389) % pool.numBlocks] = -1;
      panel.grid.draw(pool);
    });
    found['draw the panel, as live'] = median(() => panel.draw(pool, curves));
    done(found);
  });
"""


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def drawing_ms(frame: dict[str, Any]) -> dict[str, float]:
    """Milliseconds for each part of showing a frame in a browser, medians."""
    from tests.dashboard.browser import chromium

    handler = functools.partial(_Files, directory=str(files("engine.dashboard") / "static"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with chromium() as browser:
        browser.get(f"http://127.0.0.1:{server.server_port}/index.html")
        found = browser.execute_async_script(_DRAWING, frame, REPEATS)
    server.shutdown()
    return found


def main(num_blocks: int) -> None:
    """Print the figures."""
    state, _ = busy_pool(num_blocks)
    frame = Frame(_scattered(take_picture(state)), 0.0, 0, 0)
    hardware = machine.hardware()
    print(f"{hardware['cpu']}, {hardware['cores']} cores; {num_blocks:,} blocks")
    print(f"{state.num_running} running, {state.pool}")
    whole = encode(frame, None)
    rows = {
        "take a picture": median_ms(lambda: take_picture(state)),
        "encode all of it": median_ms(lambda: msgspec.json.encode(encode(frame, None))),
        "encode that nothing changed": median_ms(lambda: msgspec.json.encode(encode(frame, frame))),
    }
    for name, value in rows.items():
        print(f"{name:30} {value:8.2f} ms")
    print(f"{'all of it as JSON':30} {len(msgspec.json.encode(whole)) / 1024:8.0f} KiB")
    for name, value in drawing_ms(whole).items():
        print(f"{name:30} {value:8.2f} ms")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
