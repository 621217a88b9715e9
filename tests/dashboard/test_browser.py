"""The page in a headless Chromium: what is drawn, said, and done with the keys."""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine.core.picture import Frame, take_picture
from engine.dashboard import page
from engine.dashboard.recording import Recording
from engine.serve.run import background_loop
from engine.serve.server import Server
from engine.server_config import ServerConfig
from engine.types import Domain, Fork
from tests.core.driver import Driver, make_request
from tests.serve.fake_engine import FakeEngine

selenium = pytest.importorskip("selenium", reason="selenium is not installed: make setup")
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from tests.dashboard.browser import chromium, why_missing  # noqa: E402

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

_missing = why_missing()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(_missing is not None, reason=str(_missing)),
    # selenium leaves the pipes of its driver to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

HOSTILE = "<img src=x onerror=document.title='pwned'>"
NUM_BLOCKS, BLOCK_SIZE, HOST_SLOTS = 100, 8, 64


def frames(num_steps: int = 68, **limits: Any) -> list[Frame]:
    """A run in which blocks are shared, cached, swapped out and preempted."""
    settings: dict[str, Any] = {
        "num_blocks": NUM_BLOCKS,
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 12,
        "max_step_tokens": 256,
        "max_model_len": 512,
        "max_waiting": 100,
        "host_blocks": HOST_SLOTS,
        **limits,
    }
    driver = Driver(**settings)
    shares = driver.limits.allocator == "paged"
    found = []
    generated = preemptions = 0
    for step in range(num_steps):
        if step % 2 == 0 and step < 40:
            name = HOSTILE if step == 0 else f"request-{step}"
            prompt = (*range(30), *[step] * (40 + 3 * step))
            forks = (
                tuple(Fork(f"{name}.{n}", n) for n in (1, 2)) if shares and step % 6 == 0 else ()
            )
            domain = Domain("acme" if step % 4 else "globex")
            request = make_request(
                name, prompt, max_tokens=20 + 2 * step, domain=domain, forks=forks
            )
            driver.admit(request)
        plan = driver.step()
        generated += sum(row.samples for row in plan.rows)
        preemptions += len(plan.preempted)
        found.append(Frame(take_picture(driver.state), step / 2, generated, preemptions))
    return found


@pytest.fixture(scope="module")
def run() -> list[Frame]:
    found = frames()
    shared = [seq for frame in found for seq in frame.picture.running if "." in seq.request_id]
    assert shared
    assert any(len(frame.picture.cached) for frame in found)
    assert any(len(frame.picture.host) for frame in found)
    assert any(frame.num_preemptions for frame in found)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with chromium() as browser:
        yield browser


@pytest.fixture(autouse=True)
def _nothing_goes_wrong(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    browser: Chrome = request.getfixturevalue("browser")
    log = [entry["message"] for entry in browser.get_log("browser")]
    # Chromium's advice about what the tests read back from the canvas.
    assert [message for message in log if "willReadFrequently" not in message] == []
    assert browser.title != "pwned"


def until(browser: Chrome, script: str) -> Any:
    """Wait for a script to give something."""
    return WebDriverWait(browser, 600, 0.05).until(lambda _: browser.execute_script(script))


def drawn(browser: Chrome) -> None:
    """Wait until what was changed is drawn."""
    browser.execute_async_script(
        "const done = arguments[0];"
        "requestAnimationFrame(() => requestAnimationFrame(() => done()));"
    )


def open_recording(browser: Chrome, tmp_path: Path, *runs: list[Frame]) -> None:
    recordings = []
    for number, frames in enumerate(runs):
        recording = Recording(("paged", "contiguous")[number])
        for frame in frames:
            recording.add(frame.time, lambda frame=frame: frame)
        recordings.append(recording.as_dict())
    path = tmp_path / "out.html"
    figures = [
        ("useful", *("12.3%" for _ in runs)),
        *[("a longer name", *("1,234,567" for _ in runs))] * 3,
    ]
    text = page.single_file("a run", recordings, unit="s", summary="all is well", figures=figures)
    path.write_text(text, encoding="utf-8")
    browser.get(path.as_uri())
    until(browser, "return document.documentElement.dataset.drawn")
    drawn(browser)


def slide(browser: Chrome, time: float, end: float) -> None:
    browser.execute_script(
        "const slider = document.getElementById('slider');"
        "slider.value = arguments[0]; slider.dispatchEvent(new Event('input'));",
        math.ceil(1000 * time / end),  # not just before it
    )
    drawn(browser)


# The mean colour of each block on the canvas, and how bright its brightest and darkest pixel are.
BLOCKS = """
const panel = document.querySelectorAll('.panel')[arguments[0]];
const element = panel.querySelectorAll('.grid')[arguments[1]];
const canvas = element.querySelector('canvas');
const columns = Math.floor(canvas.width / arguments[2]);
const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
const found = [];
for (let block = 0; block < arguments[3]; block += 1) {
  const left = (block % columns) * arguments[2];
  const top = Math.floor(block / columns) * arguments[2];
  const kinds = new Map();
  for (let y = 0; y < arguments[2]; y += 1) for (let x = 0; x < arguments[2]; x += 1) {
    const at = 4 * ((top + y) * canvas.width + left + x);
    const key = `${data[at]},${data[at + 1]},${data[at + 2]}`;
    kinds.set(key, (kinds.get(key) ?? 0) + 1);
  }
  found.push(Object.fromEntries(kinds));
}
return found;
"""


def looks(
    browser: Chrome, num_blocks: int = NUM_BLOCKS, panel: int = 0, grid: int = 0
) -> list[dict[str, int]]:
    """The pixels of each block by colour."""
    size = browser.execute_script(
        "const light = document.querySelectorAll('.panel')[arguments[0]]"
        ".querySelectorAll('.grid')[arguments[1]].querySelector('.light');"
        "return [light.width, light.height];",
        panel,
        grid,
    )
    for cell in range(20, 2, -1):
        columns, rest = divmod(size[0], cell)
        if not rest and -(-num_blocks // columns) * cell == size[1]:
            return browser.execute_script(BLOCKS, panel, grid, cell, num_blocks)
    raise AssertionError(f"no grid of {num_blocks} blocks has {size} pixels")


def states(frame: Frame) -> dict[str, list[int]]:
    """Blocks by what they must look like."""
    picture = frame.picture
    refs = [0] * picture.num_blocks
    full = [False] * picture.num_blocks
    for seq in picture.running:
        for position, block in enumerate(seq.block_ids.tolist()):
            refs[block] += 1
            full[block] |= seq.num_computed >= (position + 1) * picture.block_size
    cached = set(picture.cached.tolist())
    found: dict[str, list[int]] = {"free": [], "cached": [], "full": [], "shared": [], "part": []}
    for block, count in enumerate(refs):
        if count > 1:
            kind = "shared"
        elif count:
            kind = "full" if full[block] else "part"
        else:
            kind = "cached" if block in cached else "free"
        found[kind].append(block)
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_block_looks_like_what_it_is(
    browser: Chrome, run: list[Frame], tmp_path: Path, theme: str
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": theme}]},
    )
    open_recording(browser, tmp_path, run)
    frame = next(f for f in run[15:] if all(states(f).values()))
    slide(browser, frame.time, run[-1].time)
    seen = looks(browser)
    kinds = states(frame)
    (free,) = {json.dumps(seen[block], sort_keys=True) for block in kinds["free"]}
    (cached,) = {json.dumps(seen[block], sort_keys=True) for block in kinds["cached"]}
    assert free != cached
    ground = max(json.loads(free), key=json.loads(free).get)
    assert (sum(map(int, ground.split(","))) < 3 * 128) == (theme == "dark")
    empty = {block: look.get(ground, 0) for block, look in enumerate(seen)}
    for block in kinds["full"]:
        assert len(seen[block]) == 2, "one colour, and the ground between blocks"
        assert empty[block] < min(empty[other] for other in kinds["free"] + kinds["cached"])
    for block in kinds["shared"]:
        assert empty[block] > empty[kinds["full"][0]], "the number of its owners is cut out"
    for block in kinds["part"]:
        assert len(seen[block]) >= 3, "outline or filling, and the part without tokens"
    assert len({json.dumps(seen[block]) for block in kinds["full"]}) > 3, "owners differ"


def test_moments_can_be_shown_in_any_order(
    browser: Chrome, run: list[Frame], tmp_path: Path
) -> None:
    open_recording(browser, tmp_path, run)
    first: dict[int, Any] = {}
    forwards = list(range(1, len(run), 3))
    for index in forwards + random.Random(1).sample(forwards, len(forwards)):
        slide(browser, run[index].time, run[-1].time)
        seen = looks(browser)
        assert first.setdefault(index, seen) == seen
        kinds = states(run[index])
        assert len({json.dumps(seen[block]) for block in kinds["free"]}) <= 1
        text = browser.find_element("css selector", ".legend").text
        share = len(kinds["free"]) / NUM_BLOCKS
        assert f"{share:.1%} free" in " ".join(text.split())


def test_the_host_tier_has_a_grid_of_its_own(
    browser: Chrome, run: list[Frame], tmp_path: Path
) -> None:
    open_recording(browser, tmp_path, run)
    frame = run[-1]
    slide(browser, frame.time, frame.time)
    used = set(frame.picture.host.tolist())
    seen = looks(browser, HOST_SLOTS, grid=1)
    assert len({json.dumps(look) for look in seen}) == 1 + (len(used) < HOST_SLOTS)
    text = browser.find_element("css selector", ".host h3").text
    assert f"{len(used)} of {HOST_SLOTS} slots" in text


def test_a_block_under_the_pointer_is_explained(
    browser: Chrome, run: list[Frame], tmp_path: Path
) -> None:
    open_recording(browser, tmp_path, run)
    frame = next(f for f in run if states(f)["shared"])
    slide(browser, frame.time, run[-1].time)
    block = states(frame)["shared"][0]
    owners = [seq for seq in frame.picture.running if block in seq.block_ids]
    light = browser.find_element("css selector", ".light")
    browser.execute_script(
        "const [light, block] = arguments;"
        "const columns = light.clientWidth / arguments[2];"
        "const box = light.getBoundingClientRect();"
        "light.dispatchEvent(new PointerEvent('pointermove', {"
        "clientX: box.left + (block % columns + 0.5) * arguments[2],"
        "clientY: box.top + (Math.floor(block / columns) + 0.5) * arguments[2]}));",
        light,
        block,
        cell_size(browser),
    )
    text = browser.find_element("css selector", ".inspector").text
    assert f"Block {block}: shared by {len(owners)} sequences" in text
    position = owners[0].block_ids.tolist().index(block)
    assert f"{owners[0].request_id} ({owners[0].domain}): block {position + 1} of " in text
    assert f"positions {position * BLOCK_SIZE}" in text


def cell_size(browser: Chrome) -> int:
    """CSS pixels of a block, from the numbers of the rows."""
    size = browser.execute_script(
        "const light = document.querySelector('.light'); return [light.width, light.height]"
    )
    return next(
        cell
        for cell in range(20, 2, -1)
        if size[0] % cell == 0 and -(-NUM_BLOCKS // (size[0] // cell)) * cell == size[1]
    )


def test_the_grid_is_walked_with_keys(browser: Chrome, run: list[Frame], tmp_path: Path) -> None:
    open_recording(browser, tmp_path, run)
    frame = run[30]
    slide(browser, frame.time, run[-1].time)
    light = browser.find_element("css selector", ".light")
    columns = browser.execute_script("return arguments[0].clientWidth", light) // cell_size(browser)

    def said() -> int:
        text = browser.find_element("css selector", ".inspector .what").text
        return int(text.partition(":")[0].removeprefix("Block ").replace(",", ""))

    light.send_keys(Keys.ARROW_RIGHT)
    assert said() == 1
    light.send_keys(Keys.ARROW_DOWN)
    assert said() == columns + 1
    light.send_keys(Keys.END)
    assert said() == 2 * columns - 1
    light.send_keys(Keys.HOME, Keys.ARROW_UP, Keys.ARROW_LEFT)
    assert said() == 0
    table = next(seq for seq in frame.picture.running if 0 in seq.block_ids).block_ids.tolist()
    position = table.index(0)
    if position + 1 < len(table):
        light.send_keys("]")
        assert said() == table[position + 1]
        light.send_keys("[")
    assert said() == 0
    light.send_keys(Keys.ENTER)
    pressed = "[aria-pressed=true]"
    assert len(browser.find_elements("css selector", pressed)) == 1
    light.send_keys(Keys.ESCAPE)
    assert browser.find_elements("css selector", pressed) == []


def test_a_sequence_in_the_light_leaves_the_others_in_the_dark(
    browser: Chrome, run: list[Frame], tmp_path: Path
) -> None:
    open_recording(browser, tmp_path, run)
    slide(browser, run[30].time, run[-1].time)
    lit = (
        "const light = document.querySelector('.light');"
        "const data = light.getContext('2d').getImageData(0, 0, light.width, light.height).data;"
        "let count = 0; for (let at = 3; at < data.length; at += 4) count += data[at] > 0;"
        "return data.length / 4 - count;"
    )
    all_pixels = browser.execute_script(lit)
    browser.find_element("css selector", ".rows li").click()
    num_blocks = len(run[30].picture.running[0].block_ids)
    assert browser.execute_script(lit) == num_blocks * cell_size(browser) ** 2 < all_pixels / 2


def test_time_goes_on_with_space_and_step_by_step(
    browser: Chrome, run: list[Frame], tmp_path: Path
) -> None:
    open_recording(browser, tmp_path, run)
    slide(browser, 10.0, run[-1].time)
    body = browser.find_element("css selector", "body")
    clock = browser.find_element("id", "clock")
    body.send_keys(".")
    drawn(browser)
    assert clock.text.startswith("10.5 s")
    body.send_keys(",")
    drawn(browser)
    assert clock.text.startswith("10.0 s")
    assert browser.find_element("id", "play").text == "Play"
    body.send_keys(Keys.SPACE)
    assert browser.find_element("id", "play").text == "Pause"
    until(browser, "return !document.getElementById('clock').textContent.startsWith('10.0 s')")
    body.send_keys(Keys.SPACE)
    assert browser.find_element("id", "play").text == "Play"
    slider = browser.find_element("id", "slider")
    slider.send_keys(Keys.END)
    drawn(browser)
    assert clock.text == f"{run[-1].time:.1f} s of {run[-1].time:.1f} s"


def test_two_pools_stand_side_by_side_on_one_slider(
    browser: Chrome, run: list[Frame], tmp_path: Path
) -> None:
    naive = frames(allocator="contiguous", prefix_reuse=False, host_blocks=0)
    open_recording(browser, tmp_path, run, naive)
    slide(browser, run[12].time, run[-1].time)
    names = [each.text for each in browser.find_elements("css selector", ".panel h2")]
    assert names == ["paged", "contiguous"]
    left, right = (each.location["x"] for each in browser.find_elements("css selector", ".panel"))
    assert right > left + 400
    for panel, frame in enumerate((run[12], naive[12])):
        seen = looks(browser, panel=panel)
        kinds = states(frame)
        assert len({json.dumps(seen[block]) for block in kinds["free"]}) == 1
        assert all(len(seen[block]) >= 3 for block in kinds["part"])
    assert len(states(naive[12])["part"]) > 2 * len(states(run[12])["part"])
    assert browser.find_element("id", "summary").text == "all is well"
    assert (
        browser.find_element("css selector", "#figures tr:last-child").text
        == "contiguous 12.3%" + 3 * " 1,234,567"
    )


def test_the_theme_can_be_chosen(browser: Chrome, run: list[Frame], tmp_path: Path) -> None:
    open_recording(browser, tmp_path, run)
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    until(browser, "return document.documentElement.dataset.drawn")
    grounds = {}
    for theme in ("light", "dark"):
        button = browser.find_element("id", "theme")
        button.click()
        drawn(browser)
        assert button.text == f"Theme: {theme}"
        grounds[theme] = browser.execute_script(
            "const canvas = document.querySelector('.grid canvas');"
            "const gap = canvas.width - 1;"
            "return [...canvas.getContext('2d').getImageData(gap, 0, 1, 1).data];"
        )
    assert sum(grounds["light"][:3]) > 600 > 200 > sum(grounds["dark"][:3])
    browser.find_element("id", "theme").click()


@pytest.mark.parametrize("width", [360, 800, 1900])
def test_nothing_sticks_out_at_any_width(
    browser: Chrome, run: list[Frame], tmp_path: Path, width: int
) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        open_recording(browser, tmp_path, run, run)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**metrics, "width": 1400})


class LiveEngine(FakeEngine):
    """Shows the frames of a run, one a picture, and then the last one again and again."""

    def __init__(self, run: list[Frame]) -> None:
        super().__init__()
        self.run = run
        self.shown = 0
        self.may_go_on = threading.Event()

    async def picture(self) -> Frame:
        while self.shown >= 10 and not self.may_go_on.is_set():
            await asyncio.sleep(0.01)
        frame = self.run[min(self.shown, len(self.run) - 1)]
        self.shown += 1
        return frame._replace(time=self.shown / 5)


Serve = Callable[[LiveEngine], str]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setattr("engine.dashboard.viewers.INTERVAL_S", 0.02)
    stops = []
    with background_loop() as run:

        def start(engine: LiveEngine) -> str:
            server = Server(ServerConfig(port=0, grace=0.05, http="127.0.0.1:0"))
            run(server.start())
            stops.append(server)
            run(server.set_engine(engine))
            assert server.page is not None
            return server.page

        yield start
        for server in stops:
            run(server.stop())


def test_the_live_page_follows_the_engine(browser: Chrome, run: list[Frame], serve: Serve) -> None:
    engine = LiveEngine(run)
    browser.get(serve(engine))
    until(browser, "return document.getElementById('status').textContent === 'live'")
    engine.may_go_on.set()
    last = run[-1]
    until(
        browser, f"return document.getElementById('clock').textContent.includes('step {len(run)}')"
    )
    drawn(browser)
    kinds = states(last)
    seen = looks(browser)
    assert len({json.dumps(seen[block]) for block in kinds["free"]}) == 1
    names = [each.text for each in browser.find_elements("css selector", ".rows .id")]
    assert names == [seq.request_id for seq in last.picture.running]
    browser.get("about:blank")


def test_a_paused_page_stands_still_and_then_catches_up(
    browser: Chrome, run: list[Frame], serve: Serve
) -> None:
    engine = LiveEngine(run)
    browser.get(serve(engine))
    until(browser, "return document.getElementById('clock').textContent.includes('step 10')")
    body = browser.find_element("css selector", "body")
    body.send_keys(Keys.SPACE)
    assert browser.find_element("id", "status").text == "paused"
    drawn(browser)
    before = looks(browser)
    engine.may_go_on.set()
    WebDriverWait(browser, 600, 0.05).until(lambda _: engine.shown > 40)
    assert looks(browser) == before
    assert "step 10" in browser.find_element("id", "clock").text
    body.send_keys(Keys.SPACE)
    until(
        browser, f"return document.getElementById('clock').textContent.includes('step {len(run)}')"
    )
    browser.get("about:blank")
