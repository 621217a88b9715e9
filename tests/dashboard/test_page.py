"""The page's files: complete in a wheel, and safe as one file whatever clients call themselves."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from engine.core.picture import Frame, take_picture
from engine.dashboard import page
from engine.dashboard.recording import Recording
from tests.conftest import ROOT
from tests.core.driver import Driver, make_request
from tests.dashboard.reader import recordings

HOSTILE = "</script><script>document.title='pwned'</script>"


def one_file(title: str = "a run") -> str:
    driver = Driver()
    driver.admit(make_request(HOSTILE, 5))
    driver.step()
    recording = Recording("paged")
    recording.add(0.0, lambda: Frame(take_picture(driver.state), 0.0, 1, 0))
    return page.single_file(title, [recording.as_dict()], unit="s")


def test_the_page_names_every_file_there_is() -> None:
    folder = ROOT / "engine" / "dashboard" / "static"
    assert sorted(page.NAMES) == sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", page.NAMES)
def test_no_file_loads_anything_from_elsewhere(name: str) -> None:
    text = page.read(name).decode()
    links = set(re.findall(r"https?://[^\s\"')]+", text))
    assert links <= {"http://www.w3.org/2000/svg", "https://bottosson.github.io/posts/oklab/"}
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in text


def test_modules_import_only_those_before_them() -> None:
    for index, name in enumerate(page.MODULES):
        imported = set(page.imports_of(page.read(name).decode()))
        assert imported <= set(page.MODULES[:index]), name
        assert text_imports(name) == len(imported), f"an import of {name} isn't understood"


def text_imports(name: str) -> int:
    return len(re.findall(r"^import\b", page.read(name).decode(), re.MULTILINE))


def test_what_clients_write_cannot_leave_the_recording() -> None:
    text = one_file(title=HOSTILE)
    assert HOSTILE not in text
    assert text.count("<script") == 2
    assert recordings(text)[0]["frames"][0]["running"][0][6] == HOSTILE


def test_the_one_file_allows_exactly_its_own_script_and_style() -> None:
    text = one_file()
    script = (
        text[text.index('<script type="module">') :].partition(">")[2].partition("</script>")[0]
    )
    style = text.partition("<style>")[2].partition("</style>")[0]
    for part in (script, style):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in text
    assert "import " not in re.sub(r"//.*", "", script).split("class")[0]
    assert not re.search(r"^export ", script, re.MULTILINE)
    assert "unsafe" not in text


@pytest.mark.slow
def test_a_wheel_holds_the_page(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling builds wheels; pip fetches it by itself")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    environment = {**os.environ, "OCTAVO_NATIVE": "no"}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"engine/dashboard/static/{name}" for name in page.NAMES} <= set(names)
