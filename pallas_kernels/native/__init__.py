"""The native code for CPUs: one library, which the package's build compiles (hatch_build.py).

Each op's sources lie beside it (`matmul/native`, `paged_attention/native`), what they share here.
They run on XLA's own threads, and take the best instructions that the processor has when they run.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

import jax

from pallas_kernels import native_sources
from pallas_kernels.native_sources import LIBRARY

INSTRUCTIONS = ("portable", "avx2", "avx512", "amx")  # as in processor.h
TARGETS = {"octavo_matmul": "OctavoMatmul", "octavo_attention": "OctavoAttention"}


def unavailable() -> str | None:
    """Why native code doesn't run here, or would not pay, or None."""
    if reason := native_sources.elsewhere():
        return reason
    if not LIBRARY.exists():
        return "native code was not compiled (`make native`, or install with a C++ compiler)"
    try:
        load()
    except (OSError, AttributeError, jax.errors.JaxRuntimeError) as error:
        return f"{LIBRARY.name} can't be loaded ({error}); compile it anew"
    digest, mark = native_sources.digest(), native_sources.mark_of(LIBRARY)
    if digest is not None and (mark is None or mark.digest != digest):
        return "native code was compiled from other sources (`make native`)"
    if instructions() == "portable":
        return f"native code is for AVX2 and better, which this {platform.machine()} lacks"
    return None


@cache
def instructions() -> str:
    """The best of INSTRUCTIONS that this processor has."""
    return INSTRUCTIONS[load().OctavoMostInstructions()]


@cache
def load() -> ctypes.CDLL:
    """The library, its calls known to XLA by the names of TARGETS."""
    library = ctypes.CDLL(str(LIBRARY))
    for target, symbol in TARGETS.items():
        capsule = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    return library
