"""The page's files: as they are served, and as one file that holds a recording.

There is no build step: the one file has the modules in order, with their imports and exports
taken out, so they share no top-level names.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from engine.dashboard.frames import FORMAT

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# In order: a module imports only from those before it.
MODULES = (
    *("text.js", "colours.js", "model.js", "grid.js", "charts.js", "panel.js"),
    "app.js",
)
NAMES = ("index.html", "style.css", "icon.svg", *MODULES)

_STATIC = files("engine.dashboard") / "static"


def read(name: str) -> bytes:
    """One of the page's files."""
    return (_STATIC / name).read_bytes()


def single_file(
    title: str,
    recordings: Sequence[dict[str, Any]],
    *,
    unit: str,
    summary: str = "",
    figures: Sequence[Sequence[str]] = (),
) -> str:
    """The page with its recordings in it: it opens from a disk, and loads nothing.

    Args:
      recordings: `Recording.as_dict`, one for each that stands side by side.
      unit: of their time: "s" or "steps".
      summary: a line for the top.
      figures: rows of a table: a name, and a value for each recording.
    """
    document = {
        "format": FORMAT,
        "title": title,
        "unit": unit,
        "summary": summary,
        "figures": [list(row) for row in figures],
        "pools": list(recordings),
    }
    packed = gzip.compress(json.dumps(document, separators=(",", ":")).encode(), mtime=0)
    style = "\n" + read("style.css").decode()
    script = "\n" + "\n".join(_inlined(read(name).decode()) for name in MODULES)
    icon = base64.b64encode(read("icon.svg")).decode()
    policy = (
        f"default-src 'none'; script-src '{_sha256(script)}'; style-src '{_sha256(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    page = read("index.html").decode()
    for old, new in (
        ("<title>Octavo</title>", f"{head}\n<title>{html.escape(title)}</title>"),
        ('<link rel="stylesheet" href="style.css">', f"<style>{style}</style>"),
        ('href="icon.svg"', f'href="data:image/svg+xml;base64,{icon}"'),
        (
            '<script type="module" src="app.js"></script>',
            # Base64, so nothing in it can end the element, whatever clients call their requests.
            '<script type="application/octet-stream" id="recording">'
            f"{base64.b64encode(packed).decode()}</script>\n"
            f'<script type="module">{script}</script>',
        ),
    ):
        assert page.count(old) == 1, f"index.html has {old!r} {page.count(old)} times"
        page = page.replace(old, new)
    return page


def imports_of(module: str) -> Iterator[str]:
    """The names of the files that a module imports."""
    for found in re.finditer(r'^import [^;]*? from "\./([\w.]+)";$', module, re.MULTILINE):
        yield found[1]


def _inlined(module: str) -> str:
    """A module's text without its imports and exports."""
    module = re.sub(r'^import [^;]*? from "\./[\w.]+";\n', "", module, flags=re.MULTILINE)
    return re.sub(r"^export ", "", module, flags=re.MULTILINE)


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
