"""Which kernels run, of attention and of matrix products: settled once, before anything is loaded.

`auto` takes what was made for the device. What was asked for and can't run is an error.
"""

from __future__ import annotations

import jax

from engine.config import Architecture, Backend, Config, ConfigError
from engine.memory_plan import kv_copies
from engine.model import attention, products
from engine.model.attention import Shape, check_supported
from engine.model.products import matrix_shapes


def resolve_attention(config: Config, device: jax.Device | None = None) -> attention.Resolved:
    """Which attention kernels the config means on a device, and why.

    Args:
      config: its `attention.backend` and `mesh`.
      device: by default, the first of this process.

    Raises:
      ConfigError: those that were asked for can't run there.
    """
    platform, kind = _device(device)
    try:
        return attention.resolve_backend(config.attention.backend, platform, kind)
    except ValueError as error:
        raise ConfigError(f"attention.backend: {error}") from None


def resolve_products(
    config: Config, arch: Architecture, device: jax.Device | None = None
) -> products.Resolved:
    """Which matrix products the config means for a model on a device, and why.

    Args:
      config: its `matmul.backend`, `mesh`, `model.dtype` and `model.quantization`.
      arch: of the model, with KV heads as often as chips hold them.
      device: by default, the first of this process.

    Raises:
      ConfigError: those that were asked for can't run there.
    """
    try:
        return products.resolve_backend(
            config.matmul.backend,
            _device(device)[0],
            num_devices=config.mesh.tensor * config.mesh.data,
            dtype=config.model.dtype,
            in_int8=config.model.quantization == "int8",
            shapes=matrix_shapes(arch),
        )
    except ValueError as error:
        raise ConfigError(f"matmul.backend: {error}") from None


def describe(resolved: attention.Resolved | products.Resolved, asked: str) -> str:
    """The kernels' name, and the reason where `auto` didn't find what the machine's owner hopes
    for: those that were written for its kind of device."""
    if asked == "auto" and resolved.is_fallback:
        return f"{resolved.backend}, as {resolved.reason}"
    return resolved.backend


def check_attention(
    config: Config, arch: Architecture, backend: Backend, device: jax.Device | None = None
) -> None:
    """Refuse what the kernels can't compute, before weights are read and programs compiled.

    Args:
      config, arch: what is asked for, and of which model.
      backend: the resolved one.
      device: by default, the first of this process.

    Raises:
      ConfigError: with what is supported instead.
    """
    assert backend != "auto"
    tensor = config.mesh.tensor
    shape = Shape(
        num_heads=arch.num_heads // tensor,
        num_kv_heads=arch.num_kv_heads * kv_copies(arch, tensor) // tensor,
        head_dim=arch.head_dim,
        block_size=config.cache.block_size,
        dtype=config.model.dtype,
        cache_dtype=config.cache_dtype,
    )
    try:
        check_supported(shape, backend, _device(device)[1])
    except ValueError as error:
        is_named = "xla" in str(error)
        way_out = "" if is_named or not _xla_takes(shape) else "; or set attention.backend to xla"
        raise ConfigError(f"{error}{way_out}") from None


def device_kind() -> str:
    """The name of this process's first device, as `TPU v5 lite` or `NVIDIA H100 80GB HBM3`."""
    return jax.devices()[0].device_kind


def _xla_takes(shape: Shape) -> bool:
    try:
        check_supported(shape, "xla")
    except ValueError:
        return False
    return True


def _device(device: jax.Device | None = None) -> tuple[str, str]:
    """Its platform and its kind."""
    if device is None:
        return jax.default_backend(), device_kind()
    return device.platform, device.device_kind
