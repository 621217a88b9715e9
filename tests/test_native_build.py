"""The build's own step: what a wheel and a source distribution hold, and which library is used.

The compiler is a stand-in that joins what it is given: what the real one makes is run by the tests
of `matmul` and of `paged_attention`.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pallas_kernels import native, native_sources
from scripts import build_native

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "pallas_kernels/native/_octavo.so"
needs_linux_x86_64 = pytest.mark.skipif(
    native_sources.elsewhere() is not None, reason=str(native_sources.elsewhere())
)
# `-c SOURCE -o OBJECT` copies, and a link joins; every call is counted.
COMPILER = """#!/bin/sh
echo called >> "$(dirname "$0")/calls"
for last; do :; done
case " $* " in
    *" -shared "*) for file; do case $file in *.o) cat "$file" ;; esac; done > "$last" ;;
    *) while [ "$1" != -c ]; do shift; done; cat "$2" > "$last" ;;
esac
"""
# A process with nothing but the standard library, as one that builds may be.
BARE = (sys.executable, "-I", "-S", "-c")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What CXX names."""
    path = tmp_path / "compiler/c++"
    path.parent.mkdir()
    path.write_text(COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.delenv("OCTAVO_NATIVE", raising=False)
    return path


def calls(compiler: Path) -> int:
    log = compiler.with_name("calls")
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build takes, without a library."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "_octavo.*", ".*cache")
    for folder in ("engine", "pallas_kernels", "scripts"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def build(checkout: Path, tmp_path: Path) -> Callable[..., Path]:
    """Builds a target of the copy and returns the file, or raises what was printed."""
    pytest.importorskip("hatchling", reason="hatchling builds wheels; pip fetches it by itself")

    def build(target: str = "wheel") -> Path:
        folder = tmp_path / "dist"
        shutil.rmtree(folder, ignore_errors=True)
        command = (sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder))
        done = subprocess.run(
            command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stdout)
        (built,) = folder.iterdir()
        built.with_suffix(".log").write_text(done.stdout)
        return built

    return build


def said(built: Path) -> str:
    return built.with_suffix(".log").read_text()


def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def metadata(wheel: Path) -> str:
    (name,) = (name for name in names(wheel) if name.endswith(".dist-info/WHEEL"))
    return zipfile.ZipFile(wheel).read(name).decode()


@needs_linux_x86_64
def test_a_wheel_with_native_code_is_for_its_platform_and_any_python(
    build: Callable[..., Path], compiler: Path, checkout: Path
) -> None:
    wheel = build()
    assert LIBRARY in names(wheel)
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    assert "Root-Is-Purelib: false" in metadata(wheel)
    assert zipfile.ZipFile(wheel).read(LIBRARY) == (checkout / LIBRARY).read_bytes()
    assert calls(compiler) == len(build_native.SOURCES) + 2  # the mark, and the link


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CXX": "/nonexistent/c++"}, "no C++ compiler was found"),
        ({"CXX": "false"}, "xla"),  # a compiler that fails
        ({"OCTAVO_NATIVE": "no"}, "OCTAVO_NATIVE=no"),
    ],
    ids=["none", "fails", "no"],
)
def test_a_wheel_without_native_code_is_for_any_platform_and_says_why(
    build: Callable[..., Path],
    compiler: Path,
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    why: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (checkout / LIBRARY).write_text("of an earlier build, which must not get in")
    wheel = build()
    assert not [name for name in names(wheel) if "_octavo" in name]
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true" in metadata(wheel)
    assert "native code is left out" in said(wheel)
    if native_sources.elsewhere() is None:
        assert why in said(wheel)


def test_a_wheel_has_no_sources_and_a_source_distribution_all_that_a_build_takes(
    build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_NATIVE", "no")
    assert not [name for name in names(build()) if name.endswith(native_sources.SUFFIXES)]
    with tarfile.open(build("sdist")) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in native_sources.sources()}
    assert sources >= {path.as_posix() for path in build_native.SOURCES}
    assert held >= sources | {"hatch_build.py", "scripts/build_native.py", "pyproject.toml"}
    assert LIBRARY not in held


@needs_linux_x86_64
def test_a_library_is_compiled_again_only_when_its_sources_change(
    build: Callable[..., Path], compiler: Path, checkout: Path
) -> None:
    build("wheel:editable")
    assert (checkout / LIBRARY).exists()
    once = calls(compiler)
    build("wheel:editable")  # pip builds twice, for the metadata first
    build()
    os.utime(checkout / "pallas_kernels/native/processor.h")
    build("wheel:editable")
    assert calls(compiler) == once
    with (checkout / "pallas_kernels/native/processor.h").open("a") as header:
        header.write("// changed\n")
    build("wheel:editable")
    assert calls(compiler) == 2 * once


def test_an_editable_installation_without_native_code_loses_an_earlier_library(
    build: Callable[..., Path], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / LIBRARY).write_text("of an earlier build")
    monkeypatch.setenv("OCTAVO_NATIVE", "no")
    build("wheel:editable")
    assert not (checkout / LIBRARY).exists()


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("require", "no C\\+\\+ compiler was found|is for Linux on x86-64"),
        ("yes", "OCTAVO_NATIVE='yes' is not one of auto, require, no"),
    ],
)
def test_a_build_that_can_t_have_what_was_asked_for_fails(
    build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, value: str, problem: str
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("OCTAVO_NATIVE", value)
    with pytest.raises(RuntimeError, match=problem):
        build()


def test_a_build_takes_jaxlib_only_to_compile(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")

    def wanted() -> list[str]:
        return wheel.WheelBuilder(str(ROOT)).config.dependencies

    compiles = native_sources.elsewhere() is None
    lowest = (ROOT / "pyproject.toml").read_text().partition('"jaxlib>=')[2].partition(",")[0]
    assert wanted() == ([f"jaxlib=={lowest}"] if compiles else [])
    monkeypatch.setenv("OCTAVO_NATIVE", "no")
    assert wanted() == []
    monkeypatch.setenv("OCTAVO_NATIVE", "require")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert wanted() == []


@pytest.mark.parametrize("module", ["pallas_kernels.native_sources", "scripts.build_native"])
def test_a_build_needs_nothing_to_find_out_what_it_needs(module: str) -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}"
    subprocess.run((*BARE, program), check=True)


def test_on_another_machine_nothing_is_compiled(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not build_native.provide(tmp_path / "_octavo.so")
    assert f"this is {sys.platform} on aarch64" in capsys.readouterr().out
    assert calls(compiler) == 0
    assert f"this is {sys.platform} on aarch64" in str(native.unavailable())


@needs_linux_x86_64
@pytest.mark.parametrize(
    ("jaxlib", "reason"),
    [("99.1", r"compiled for jaxlib 99\.1, and this is"), ("0.9.10", r"can't be loaded")],
)
def test_a_library_for_a_newer_jaxlib_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jaxlib: str, reason: str
) -> None:
    mark = native_sources.Mark("0" * 64, jaxlib)
    (tmp_path / "_octavo.so").write_text(f"no library, with a mark: {mark}")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_octavo.so")
    monkeypatch.setattr(native, "load", native.load.__wrapped__)  # as if for the first time
    monkeypatch.setattr(native_sources, "digest", lambda: mark.digest)
    assert re.search(reason, str(native.unavailable()))


@needs_linux_x86_64
def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := native.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(native_sources, "digest", lambda: "0" * 64)
    assert native.unavailable() == "native code was compiled from other sources (`make native`)"
    monkeypatch.setattr(native_sources, "digest", lambda: None)  # as in a wheel
    assert native.unavailable() is None


@pytest.mark.parametrize("name", ["scripts/build_native.py", "pallas_kernels/native/threads.h"])
def test_the_digest_is_of_every_byte_and_of_nothing_else(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here = native_sources.digest()
    monkeypatch.setattr(native_sources, "PACKAGE", checkout / "pallas_kernels")
    monkeypatch.setattr(native_sources, "BUILD", checkout / "scripts/build_native.py")
    assert native_sources.digest() == here
    (checkout / "pallas_kernels/native/notes.txt").write_text("not compiled")
    assert native_sources.digest() == here
    with (checkout / name).open("a") as file:
        file.write("\n")
    assert native_sources.digest() not in (here, None)
    shutil.rmtree(checkout / "scripts")
    assert native_sources.digest() is None


@pytest.mark.skipif(
    os.environ.get("OCTAVO_NATIVE") != "require", reason="OCTAVO_NATIVE=require isn't set"
)
def test_native_code_runs_where_it_is_required() -> None:
    """So that a hundred tests aren't skipped in silence (.ci/run)."""
    assert native.unavailable() is None
