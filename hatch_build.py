"""The build's own step: compiles native code where it can be, and says what the wheel is for.

OCTAVO_NATIVE has its say, see scripts/build_native.py.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
# For its headers, of the lowest version that pyproject.toml allows: XLA takes what older headers
# gave and refuses what newer ones gave. A library by 0.11.2's was tried: it passes its tests on
# 0.12.0.1. One by those of 0.12.0.1 is refused on 0.11.2 (API 0.5 for 0.4).
HEADERS = "jaxlib==0.11.2"


class NativeCode(BuildHookInterface):
    """Compiles the library; the wheel is then for a platform, otherwise for any."""

    def dependencies(self) -> list[str]:
        """jaxlib, but only for those who will compile with it: it is large."""
        build_native = _build_native()
        return [HEADERS] if build_native.wanted() != "no" and not build_native.obstacle() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and have a wheel take what came of it; an editable one finds it in its place."""
        build_native = _build_native()
        if version == "editable":
            build_native.provide_in_place()
        elif build_native.provide():
            library = build_native.LIBRARY.relative_to(ROOT).as_posix()
            # It is opened by ctypes, and so for any Python.
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["artifacts"].append(library)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"


def _build_native() -> Any:
    if str(ROOT) not in sys.path:  # a build backend starts without the project's folder
        sys.path.insert(0, str(ROOT))
    from scripts import build_native

    return build_native
