"""Compiles the native code for CPUs (`make native`), for those who ask for it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "pallas_kernels/native/_octavo.so"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi", "-Ipallas_kernels/native")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"),
    "-mprefer-vector-width=512",
)
MATMUL = Path("pallas_kernels/matmul/native")
ATTENTION = Path("pallas_kernels/paged_attention/native")
SOURCES: dict[Path, Sequence[str]] = {
    Path("pallas_kernels/native/processor.cc"): (),
    MATMUL / "matmul.cc": (),
    MATMUL / "portable.cc": (),
    ATTENTION / "attention.cc": (),
    ATTENTION / "portable.cc": (),
}
X86_64_SOURCES: dict[Path, Sequence[str]] = {
    MATMUL / "avx2.cc": AVX2,
    MATMUL / "avx512.cc": AVX512,
    MATMUL / "amx.cc": (*AVX512, "-mamx-tile", "-mamx-bf16"),
    ATTENTION / "avx2.cc": AVX2,
    ATTENTION / "avx512.cc": AVX512,
}


class CannotCompile(Exception):
    """Native code can't be compiled here."""


def compile_native(library: Path = LIBRARY) -> None:
    """Compile all sources, and put the library in its place when it is whole.

    Raises:
      CannotCompile: there is no compiler, or it fails.
    """
    if sys.platform == "win32":
        raise CannotCompile("it is for Linux and macOS")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise CannotCompile("no C++ compiler was found (c++, g++, clang++, or what CXX names)")
    jaxlib = importlib.util.find_spec("jaxlib")
    if jaxlib is None or jaxlib.origin is None:
        raise CannotCompile("jaxlib is not installed, whose headers it needs")
    headers = f"-isystem{Path(jaxlib.origin).parent / 'include'}"
    sources = dict(SOURCES)
    if platform.machine() in ("x86_64", "AMD64"):
        sources |= X86_64_SOURCES
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as threads:

        def compile_one(source: Path) -> str:
            target = f"{folder}/{'-'.join(source.with_suffix('.o').parts)}"
            flags = (*FLAGS, headers, *sources[source])
            _run((*compiler.split(), *flags, "-c", str(source), "-o", target))
            return target

        objects = list(threads.map(compile_one, sources))
        built = library.with_suffix(".building")
        _run((*compiler.split(), "-shared", *objects, "-o", str(built)))
        built.replace(library)  # an engine that runs keeps the one it has opened


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotCompile(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise CannotCompile(f"{' '.join(command)}\n{done.stderr.strip()}")


if __name__ == "__main__":
    try:
        compile_native()
    except CannotCompile as error:
        sys.exit(f"native code can't be compiled: {error}")
    print(f"compiled {LIBRARY.relative_to(ROOT)}")
