"""The native code for CPUs: one library, which the package's build compiles (hatch_build.py).

Each op's sources lie beside it (`matmul/native`, `paged_attention/native`), what they share here.
They run on XLA's own threads, and take the best instructions that the processor has when they run.
"""

from __future__ import annotations

import ctypes
import platform
import re
from functools import cache
from importlib.metadata import version
from typing import Any

import jax

from pallas_kernels import native_sources
from pallas_kernels.native_sources import LIBRARY

INSTRUCTIONS = ("portable", "avx2", "avx512", "amx")  # as in processor.h
TARGETS = {
    "octavo_attention": "OctavoAttention",
    "octavo_feed_forward": "OctavoFeedForward",
    "octavo_matmul": "OctavoMatmul",
    "octavo_rotate": "OctavoRotate",
    "octavo_scores": "OctavoScores",
    "octavo_zeros": "OctavoZeros",
}


def unavailable() -> str | None:
    """Why native code doesn't run here, or would not pay, or None."""
    if reason := native_sources.elsewhere():
        return reason
    if not LIBRARY.exists():
        return "native code was not compiled (`make native`, or install with a C++ compiler)"
    mark, digest = native_sources.mark_of(LIBRARY), native_sources.digest()
    if mark is None:
        return f"{LIBRARY.name} can't be loaded (it is no library of ours); compile it anew"
    if digest not in (None, mark.digest):
        return "native code was compiled from other sources (`make native`)"
    # XLA refuses it too, but only when it starts, and does not start then.
    installed = version("jaxlib")
    if _numbers(mark.jaxlib) > _numbers(installed):
        return f"native code was compiled for jaxlib {mark.jaxlib}, and this is {installed}"
    try:
        load()
    except (OSError, AttributeError, jax.errors.JaxRuntimeError) as error:
        return f"{LIBRARY.name} can't be loaded ({error}); compile it anew"
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


def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """`jnp.zeros` on a CPU, but only what is written later takes memory: for `jax.jit`'s result."""
    load()
    return jax.ffi.ffi_call("octavo_zeros", jax.ShapeDtypeStruct(shape, dtype))()


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
