"""Draw docs/images/ anew: pages of simulated runs, photographed by a headless Chromium.

python -m scripts.screenshots FOLDER        (`make screenshots`; takes about a minute)
"""

from __future__ import annotations

import io
import random
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from selenium.webdriver import Chrome

from engine.core import scheduler
from engine.core.limits import Limits
from engine.core.picture import Frame, take_picture
from engine.core.scheduler import SchedulerState
from engine.dashboard.page import single_file
from engine.dashboard.recording import Recording
from engine.sampling import SamplingParams
from engine.simulate.command import simulate
from engine.types import Domain, Fork, Request, StepTokens
from tests.dashboard.browser import chromium, why_missing

# A pool of 3,000 blocks is small enough to see each of them.
SIDE_BY_SIDE = {"requests": 600, "num_blocks": 3000, "max_num_seqs": 256}


def made_up_run() -> Recording:
    """A load that shows everything: shared prompts, several samples, a full pool, a host tier."""
    limits = Limits(
        num_blocks=960,
        block_size=16,
        max_num_seqs=40,
        max_step_tokens=512,
        max_model_len=2048,
        host_blocks=320,
    )
    rng = random.Random(4)
    recording = Recording("paged")
    state = SchedulerState.initial(limits)
    generated = preempted = number = 0
    for step in range(900):
        while state.num_waiting < 4 and rng.random() < 0.2:
            tenant = rng.choice(("acme", "globex", "initech"))
            system = tuple(range(100, 100 + 16 * {"acme": 14, "globex": 9, "initech": 5}[tenant]))
            talk = tuple(rng.randrange(1000, 30_000) for _ in range(rng.randrange(20, 400)))
            name = f"chat-{number:03}"
            forks = tuple(Fork(f"{name}.{n}", n) for n in range(1, rng.choice((1, 1, 2, 4))))
            request = Request(
                *(name, system + talk, SamplingParams(), rng.randrange(40, 400)),
                domain=Domain(tenant),
                forks=forks,
            )
            state = scheduler.admit(state, limits, request)
            number += 1
        state, plan = scheduler.schedule(state, limits)
        tokens = StepTokens(tuple(rng.randrange(1000, 30_000) for _ in plan.rows))
        state, outputs = scheduler.commit(state, plan, tokens, limits)
        generated += sum(len(output.token_ids) for output in outputs)
        preempted += len(plan.preempted)
        frame = Frame(take_picture(state), step / 40, generated, preempted)
        recording.add(frame.time, lambda frame=frame: frame)
    return recording


def photograph(
    browser: Chrome, page: Path, image: Path, *, theme: str, time: float, row: int | None = None
) -> None:
    """One picture: of a page at a part of its time, with a running sequence in the light."""
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())
    browser.execute_async_script(
        "const [part, row, done] = arguments;"
        "const wait = () => document.documentElement.dataset.drawn ? go() : setTimeout(wait, 50);"
        "const go = () => {"
        "  const slider = document.getElementById('slider');"
        "  slider.value = 1000 * part; slider.dispatchEvent(new Event('input'));"
        "  setTimeout(() => {"
        "    if (row !== null) document.querySelectorAll('.rows li')[row].click();"
        "    setTimeout(done, 100);"
        "  }, 300);"
        "};"
        "wait();",
        time,
        row,
    )
    image.write_bytes(browser.get_screenshot_as_png())


def main(folder: Path) -> None:
    """Write all pictures into a folder."""
    if missing := why_missing():
        sys.exit(missing)
    folder.mkdir(parents=True, exist_ok=True)
    quiet = Console(file=io.StringIO())
    with tempfile.TemporaryDirectory() as scratch, chromium(width=1440, height=1000) as browser:
        both, one = Path(scratch, "both.html"), Path(scratch, "one.html")
        simulate(**SIDE_BY_SIDE, html=both, console=quiet)  # type: ignore[bad-argument-type]
        title = "a made-up load of three tenants"
        one.write_text(single_file(title, [made_up_run().as_dict()], unit="s"), encoding="utf-8")
        photograph(browser, both, folder / "side-by-side.png", theme="light", time=0.15)
        photograph(browser, one, folder / "pool-light.png", theme="light", time=0.6)
        photograph(browser, one, folder / "pool-dark.png", theme="dark", time=0.6, row=5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
