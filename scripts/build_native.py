"""Compiles the native code for CPUs: what hatch_build.py does in a build, and `make` in a checkout.

OCTAVO_NATIVE says whether: `auto`, the default, where it can be; `require` makes it an error where
it can't; `no` leaves it out. A library that these sources gave is left as it is. Builds run this
with the standard library and jaxlib's headers alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pallas_kernels import native_sources
from pallas_kernels.native_sources import LIBRARY, Mark

ROOT = Path(__file__).resolve().parents[1]
WANTED = ("auto", "require", "no")
# What is compiled runs on any x86-64: instructions beyond it only in the files that are named for
# them, which are called after a look at the processor.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"),
    "-Ipallas_kernels/native",
)
AVX2 = ("-mavx2", "-mfma")
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mavx512vnni"),
    "-mprefer-vector-width=512",
)
AMX = ("-mamx-tile", "-mamx-bf16", "-mamx-int8")
# The C++ library is the system's own, which jaxlib needs too. Linked statically, Debian 12's would
# need glibc 2.35; without it glibc 2.32 does, and libstdc++ with GLIBCXX_3.4.29, which is GCC 11's.
LINK = ("-shared", "-Wl,--no-undefined")
EXPORTS = "{ global: Octavo*; local: *; };\n"  # hides what -fvisibility does not: parts of std
MATMUL = Path("pallas_kernels/matmul/native")
ATTENTION = Path("pallas_kernels/paged_attention/native")
# In this order to the linker, which keeps the first of an inline function's copies: the one with
# the fewest instructions.
SOURCES: dict[Path, Sequence[str]] = {
    Path("pallas_kernels/native/processor.cc"): (),
    Path("pallas_kernels/native/zeros.cc"): (),
    MATMUL / "matmul.cc": (),
    MATMUL / "feed_forward.cc": (),
    MATMUL / "scores.cc": (),
    MATMUL / "portable.cc": (),
    ATTENTION / "attention.cc": (),
    ATTENTION / "rotate.cc": (),
    ATTENTION / "portable.cc": (),
    MATMUL / "avx2.cc": AVX2,
    ATTENTION / "avx2.cc": AVX2,
    MATMUL / "avx512.cc": AVX512,
    ATTENTION / "avx512.cc": AVX512,
    MATMUL / "amx.cc": (*AVX512, *AMX),
    ATTENTION / "amx.cc": (*AVX512, *AMX),
}


class CannotCompile(Exception):
    """Native code can't be compiled here."""


def wanted() -> str:
    """What OCTAVO_NATIVE asks for, one of WANTED.

    Raises:
      ValueError: it says something else.
    """
    value = os.environ.get("OCTAVO_NATIVE") or "auto"
    if value not in WANTED:
        raise ValueError(f"OCTAVO_NATIVE={value!r} is not one of {', '.join(WANTED)}")
    return value


def obstacle() -> str | None:
    """Why native code can't be compiled here, as far as that shows without trying, or None."""
    if elsewhere := native_sources.elsewhere():
        return elsewhere
    if not _compiler():
        return "no C++ compiler was found (c++, g++, clang++, or what CXX names)"
    return None


def provide(library: Path = LIBRARY) -> bool:
    """Compile native code as OCTAVO_NATIVE asks for it, unless that has been done.

    Returns:
      Whether the library is there now, compiled from these sources. If not, says why in a line.

    Raises:
      CannotCompile: OCTAVO_NATIVE is `require`.
      ValueError: OCTAVO_NATIVE is none of WANTED.
    """
    if wanted() == "no":
        print("native code is left out: OCTAVO_NATIVE=no")
        return False
    try:
        if reason := obstacle():
            raise CannotCompile(reason)
        if native_sources.mark_of(library) != _mark():
            compile_native(library)
            print(f"compiled {library.name}, the native code for CPUs")
    except CannotCompile as error:
        mark = native_sources.mark_of(library)
        if mark is None or mark.digest != native_sources.digest():
            library.unlink(missing_ok=True)
        if wanted() == "require":
            raise
        print(f"native code is left out, and `xla` will run instead: {error}")
        return False
    return True


def provide_in_place() -> None:
    """`provide` for a checkout that is used as it lies: `no` removes what was compiled before.

    Raises:
      CannotCompile, ValueError: as `provide` does.
    """
    provide()
    if wanted() == "no":
        LIBRARY.unlink(missing_ok=True)


def compile_native(library: Path = LIBRARY) -> None:
    """Compile all sources, and put the library in its place when it is whole.

    Raises:
      CannotCompile: there is no compiler, or it fails.
    """
    if reason := obstacle():
        raise CannotCompile(reason)
    mark, headers = _mark(), f"-isystem{_jaxlib() / 'include'}"
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as threads:

        def compile_one(source: Path, *flags: str) -> str:
            target = f"{folder}/{'-'.join(source.with_suffix('.o').parts[-3:])}"
            _run((*_compiler(), *FLAGS, *flags, "-c", str(source), "-o", target))
            return target

        objects = list(
            threads.map(lambda source: compile_one(source, headers, *SOURCES[source]), SOURCES)
        )
        marked = Path(folder, "mark.cc")
        name = '__attribute__((visibility("default"))) const char OctavoMark[]'
        marked.write_text(f'extern "C" {{\nextern {name};\n{name} = "{mark}";\n}}\n')
        exports = Path(folder, "exports.map")
        exports.write_text(EXPORTS)
        script, built = f"-Wl,--version-script={exports}", Path(folder, library.name)
        _run((*_compiler(), *LINK, script, *objects, compile_one(marked), "-o", str(built)))
        if native_sources.digest() != mark.digest:
            raise CannotCompile("the sources changed meanwhile")
        # Beside it first: an engine that runs keeps the one it has opened.
        beside = library.with_suffix(f".{os.getpid()}")
        shutil.copy(built, beside)
        beside.replace(library)


def _mark() -> Mark:
    _jaxlib()
    digest = native_sources.digest()
    if digest is None:
        raise CannotCompile("the sources are not here")
    return Mark(digest, importlib.metadata.version("jaxlib"))


def _jaxlib() -> Path:
    found = importlib.util.find_spec("jaxlib")
    if found is None or found.origin is None:
        raise CannotCompile("jaxlib is not installed, whose headers it needs")
    return Path(found.origin).parent


def _compiler() -> list[str]:
    """The command, or nothing."""
    asked_for = os.environ.get("CXX", "").split()
    if asked_for:
        return asked_for if shutil.which(asked_for[0]) else []
    return [command for command in ("c++", "g++", "clang++") if shutil.which(command)][:1]


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotCompile(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise CannotCompile(f"{' '.join(command)}\n{done.stderr.strip()}")


if __name__ == "__main__":
    try:
        provide_in_place()
    except (CannotCompile, ValueError) as error:
        sys.exit(f"make: native code can't be compiled: {error}")
