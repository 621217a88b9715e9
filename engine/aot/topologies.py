"""The TPUs that are compiled for, and the environment that libtpu needs to do so without one.

`prepare_environment` must run before jax is imported; a process that did so can compile, but
should not compute.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jax.sharding import Mesh

# What tells libtpu not to look for a chip. The last two only silence its warnings.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# What makes it compile without one.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true", **NO_TPU}


class AotError(RuntimeError):
    """What stands in the way of compiling ahead of time, and the way out."""


class Generation(NamedTuple):
    """One kind of chip.

    Attributes:
      name: as topologies are named.
      smallest: the smallest topology that libtpu knows of it.
      hbm_bytes: memory of one device that programs may use, as the compiler says when one
        doesn't fit (libtpu 0.0.50.1); a little less than what is advertised. A v4
        or tpu7x chip is two devices, its TensorCores, each with half of the chip's memory.
    """

    name: str
    smallest: str
    hbm_bytes: int


_GIB = 2**30
GENERATIONS = (
    Generation("v4", "v4:2x2x1", int(15.25 * _GIB)),
    Generation("v5e", "v5e:2x2", int(15.75 * _GIB)),
    Generation("v5p", "v5p:2x2x1", int(95.73 * _GIB)),
    Generation("v6e", "v6e:2x2", int(31.24 * _GIB)),
    Generation("tpu7x", "tpu7x:2x2x1", int(94.74 * _GIB)),
)


def generation(topology: str) -> Generation:
    """The generation of a topology such as `v5e:2x4`.

    Raises:
      AotError: it is none of `GENERATIONS`.
    """
    name, _, shape = topology.partition(":")
    for known in GENERATIONS:
        if known.name == name and shape:
            return known
    raise AotError(
        f"{topology!r} is no topology; write GENERATION:SHAPE, such as v5e:2x4 or v5p:2x2x2, with "
        f"one of {', '.join(known.name for known in GENERATIONS)}"
    )


def quiet_libtpu(root: Path = Path("/")) -> None:
    """Tell libtpu that there is no TPU, where that is certain, before jax is imported: it is
    installed with the development tools, JAX asks it for devices, and it warns at length.

    Args:
      root: of the file system.
    """
    try:
        bus = [path.joinpath("vendor").read_text() for path in root.glob("sys/bus/pci/devices/*")]
        # TPUs' files; a container may have these and hide the bus, or what is on it.
        files = [*root.glob("dev/accel*"), *root.glob("dev/vfio/[0-9]*")]
    except OSError:
        return
    if bus and not files and not any(vendor.strip() == "0x1ae0" for vendor in bus):  # Google's
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)


def prepare_environment(dump_to: str = "") -> None:
    """Set what libtpu reads when it is loaded.

    Args:
      dump_to: a folder for the compiler's final bundles; see `engine.aot.schedule`.

    Raises:
      AotError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise AotError(
            "ahead-of-time compiles need libtpu, which exists for Linux on x86-64: "
            "pip install 'octavo[tpu]' (or make setup, whose dev extra has it)"
        )
    os.environ.update(ENVIRONMENT)
    if dump_to:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={dump_to} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=final_bundles"
        )


def first_lines(error: Exception) -> str:
    """What a compiler's error says first, in one line; the rest is advice and its own stack."""
    return " ".join(line.strip() for line in str(error).split("\n")[:3])


@functools.cache
def describe(topology: str):
    """jax's description of a topology, which has its devices.

    Raises:
      AotError: libtpu doesn't know it; says what libtpu says.
    """
    import jax
    from jax.experimental import topologies

    generation(topology)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise AotError(
            f"libtpu doesn't know the topology {topology!r}: {first_lines(error)}"
        ) from None


def one_chip(topology: str) -> Mesh:
    """A mesh of a topology's first device, for kernels."""
    import numpy as np
    from jax.sharding import Mesh

    return Mesh(np.array(describe(topology).devices[:1]), ("x",))
