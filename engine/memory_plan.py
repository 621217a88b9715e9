"""The arithmetic of `octavo plan`: where a chip's memory goes, and how many users that serves.

Pure integers from a config and an architecture, no jax and no weights, so that a plan for a
pod is made on a laptop; everything is in bytes and tokens, for one replica of `mesh.tensor`
chips. `plan_tables.render` shows it on a terminal.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import NamedTuple

from engine.config import (
    CACHE_DTYPE_BYTES,
    Architecture,
    Backend,
    Config,
    ConfigError,
)
from engine.plan_weights import num_parameters, weight_bytes_per_chip

HEADROOM = 0.10
"""Part of a chip's memory left to activations, logits, programs and fragmentation."""


def kv_bytes_per_token(arch: Architecture, dtype: str) -> int:
    """Bytes of one token's keys and values in all layers, without padding or copies.

    Args:
      dtype: of the cache.
    """
    return 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * CACHE_DTYPE_BYTES[dtype]


def kv_bytes_per_token_per_chip(
    arch: Architecture, dtype: str, *, tensor: int, backend: Backend
) -> int:
    """Bytes that one token's keys and values take in all layers on one of `tensor` chips.

    Chips beyond the KV heads hold copies of them, and a backend may pad the heads.
    """
    heads = _ceil_div(arch.num_kv_heads, tensor)
    width = cache_width(arch.head_dim, backend)
    return 2 * arch.num_layers * heads * width * CACHE_DTYPE_BYTES[dtype]


def cache_width(head_dim: int, backend: Backend) -> int:
    """Entries that a head's keys take in the cache, and its values as many.

    `auto` is counted as the widest that it may turn out to be, which is `tpu`. The rule is the
    kernels' own (`head_width`), written again because this file runs without jax; a test
    compares the two.
    """
    if backend == "gpu":
        return 64 * _ceil_div(head_dim, 64)
    if backend == "cpu":
        return 16 * _ceil_div(head_dim, 16)
    if backend in ("tpu", "auto"):
        return 64 if head_dim <= 64 else 128 * _ceil_div(head_dim, 128)
    return head_dim


def sampler_bytes(arch: Architecture, max_num_seqs: int) -> int:
    """Bytes of the sampler's state, which every chip holds whole.

    Per slot and vocabulary entry a count (int32), a bias (float32) and whether the prompt has
    it (bool). One slot more than sequences is the sink of padded rows.
    """
    return (max_num_seqs + 1) * arch.vocab_size * (4 + 4 + 1)


def config_blocks(config: Config, arch: Architecture, backend: Backend | None = None) -> int:
    """Blocks of the pool that a config asks for, in blocks or in bytes of one replica.

    Args:
      config, arch: what is asked for, and of which model.
      backend: what `attention.backend` turned out to be; None takes it from the config.

    Raises:
      ConfigError: `cache.memory` doesn't hold a single block.
    """
    if config.cache.num_blocks is not None:
        return config.cache.num_blocks
    assert config.cache.memory is not None  # Config checks that one of the two is given
    return _blocks_in("memory", config, arch, backend or config.attention.backend)


def host_blocks(config: Config, arch: Architecture, backend: Backend) -> int:
    """Blocks of the host tier that a config asks for; copies and padding are kept there too.

    Raises:
      ConfigError: `cache.host_memory` doesn't hold a single block.
    """
    return _blocks_in("host_memory", config, arch, backend) if config.cache.host_memory else 0


def _blocks_in(key: str, config: Config, arch: Architecture, backend: Backend) -> int:
    """Blocks that the memory under a key of `cache` holds."""
    memory = getattr(config.cache, key)
    block = _block_bytes_per_chip(config, arch, backend) * config.mesh.tensor
    if memory < block:
        raise ConfigError(
            f"cache.{key} is {memory} bytes, but one block of {config.cache.block_size} tokens "
            f"takes {block}; raise it or lower cache.block_size"
        )
    return memory // block


def kv_copies(arch: Architecture, tensor: int) -> int:
    """How many of `tensor` chips hold each KV head."""
    return max(1, tensor // arch.num_kv_heads)


def format_bytes(count: int) -> str:
    """`1536` as `1.50 KiB`: the largest binary unit not above the value, two decimals."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"


class LengthFit(NamedTuple):
    """How many sequences of one length the pool holds at once.

    Attributes:
      length: tokens of prompt and output together.
      blocks: blocks that one of them takes.
      paged: sequences, each rounded up to whole blocks.
      contiguous: sequences, each reserving `max_model_len` tokens as a contiguous cache must.
    """

    length: int
    blocks: int
    paged: int
    contiguous: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the memory of one replica goes. Bytes are of one chip where the name says so.

    Attributes:
      model, dtype, quantization, cache_dtype: what is planned for.
      attention: the backend that is planned for, as the config names it.
      head_dim, cache_width: of the model, and as the backend's cache has it.
      data, tensor: replicas, and chips in each.
      num_parameters: elements of the weights.
      weight_bytes, weight_bytes_per_chip: once, and with what every chip repeats.
      kv_bytes_per_token: of one token's cache, once and without padding.
      kv_bytes_per_token_per_chip: the same with copies and padding, on one chip.
      kv_copies: chips that hold each KV head; above 1 when chips outnumber KV heads.
      sampler_bytes_per_chip: counts, biases and prompt marks of the slots.
      block_size, block_bytes_per_chip: tokens, and bytes, of a block.
      config_blocks, config_pool_bytes_per_chip: the pool that the config asks for.
      hbm, headroom_bytes_per_chip: memory of a chip, and the part of it left free; None and
        0 if no chip was named.
      available_bytes_per_chip: what is left for the pool; below zero if the rest is too
        much already. None if no chip was named.
      num_blocks, num_tokens: the pool that `lengths` is about: what fits in `hbm`, or the
        config's if no chip was named.
      max_model_len, max_num_seqs: limits of one sequence (tokens) and of the batch.
      lengths: what the pool holds, by length.
      mean_length, paged_at_mean, contiguous_at_mean: sequences whose lengths average
        `mean_length`; the last block of each is half empty on average.
      problems: why this can't run, and the way out. Empty if it can.
    """

    model: str
    dtype: str
    quantization: str
    cache_dtype: str
    attention: str
    head_dim: int
    cache_width: int
    data: int
    tensor: int
    num_parameters: int
    weight_bytes: int
    weight_bytes_per_chip: int
    kv_bytes_per_token: int
    kv_bytes_per_token_per_chip: int
    kv_copies: int
    sampler_bytes_per_chip: int
    block_size: int
    block_bytes_per_chip: int
    config_blocks: int
    config_pool_bytes_per_chip: int
    hbm: int | None
    headroom_bytes_per_chip: int
    available_bytes_per_chip: int | None
    num_blocks: int
    num_tokens: int
    max_model_len: int
    max_num_seqs: int
    lengths: tuple[LengthFit, ...]
    mean_length: int
    paged_at_mean: int
    contiguous_at_mean: int
    problems: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether an engine could start and serve the longest sequence it admits."""
        return not self.problems

    def as_json(self) -> str:
        """Every field, `lengths` as objects, as indented JSON."""
        tree = dataclasses.asdict(self)
        tree["lengths"] = [fit._asdict() for fit in self.lengths]
        return json.dumps({**tree, "fits": self.fits}, indent=2)


def plan(
    config: Config,
    arch: Architecture | None = None,
    *,
    hbm: int | None = None,
    headroom: float = HEADROOM,
    lengths: Sequence[int] = (128, 512, 2048, 8192, 32768, 131072),
    mean_length: int | None = None,
) -> MemoryPlan:
    """Work out where memory goes and what the cache holds.

    Args:
      config: mesh, cache and scheduler limits are taken from it.
      arch: the model; by default `model.architecture` of the config.
      hbm: bytes of memory of one chip; None plans the config's own pool.
      headroom: part of `hbm` left free, from 0 to below 1.
      lengths: sequence lengths in tokens to report; those above the model's limit are left
        out and the limit itself is added.
      mean_length: mean tokens of a sequence; by default an eighth of the limit.

    Raises:
      ConfigError: the architecture is unknown, can't be cut over `mesh.tensor` chips, or an
        argument is out of range.
    """
    arch = arch or config.model.architecture
    if arch is None:
        raise ConfigError(
            "model.architecture is not in the config, so it takes the model's files to plan; "
            "fetch them, or state the architecture"
        )
    tensor = config.mesh.tensor
    check_split(arch, tensor)
    limit = config.model.max_model_len or arch.max_position
    mean = mean_length if mean_length is not None else max(1, limit // 8)
    _check_arguments(hbm, headroom, (*lengths, mean), limit, mean)

    cache_dtype = config.cache_dtype
    weight_bytes = weight_bytes_per_chip(config.model, arch, tensor)
    sampler = sampler_bytes(arch, config.scheduler.max_num_seqs)
    backend = config.attention.backend
    block_bytes = _block_bytes_per_chip(config, arch, backend)
    asked = config_blocks(config, arch)

    reserved = int(hbm * headroom) if hbm is not None else 0
    available = None if hbm is None else hbm - reserved - weight_bytes - sampler
    num_blocks = asked if available is None else max(0, available // block_bytes)
    block_size = config.cache.block_size
    num_tokens = num_blocks * block_size
    shown = sorted({length for length in lengths if length < limit} | {limit})
    # A sequence that ends anywhere in its last block leaves (block_size - 1) / 2 tokens of it
    # empty on average; twice both sides keeps the division exact.
    paged_at_mean = 2 * num_tokens // (2 * mean + block_size - 1)
    return MemoryPlan(
        model=config.model.name or config.model.source,
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        cache_dtype=cache_dtype,
        attention=backend,
        head_dim=arch.head_dim,
        cache_width=cache_width(arch.head_dim, backend),
        data=config.mesh.data,
        tensor=tensor,
        num_parameters=num_parameters(arch),
        weight_bytes=weight_bytes_per_chip(config.model, arch, 1),
        weight_bytes_per_chip=weight_bytes,
        kv_bytes_per_token=kv_bytes_per_token(arch, cache_dtype),
        kv_bytes_per_token_per_chip=kv_bytes_per_token_per_chip(
            arch, cache_dtype, tensor=tensor, backend=backend
        ),
        kv_copies=kv_copies(arch, tensor),
        sampler_bytes_per_chip=sampler,
        block_size=block_size,
        block_bytes_per_chip=block_bytes,
        config_blocks=asked,
        config_pool_bytes_per_chip=asked * block_bytes,
        hbm=hbm,
        headroom_bytes_per_chip=reserved,
        available_bytes_per_chip=available,
        num_blocks=num_blocks,
        num_tokens=num_tokens,
        max_model_len=limit,
        max_num_seqs=config.scheduler.max_num_seqs,
        lengths=tuple(_fit(length, num_blocks, block_size, limit) for length in shown),
        mean_length=mean,
        paged_at_mean=paged_at_mean,
        contiguous_at_mean=num_tokens // limit,
        problems=_problems(hbm, available, asked, block_bytes, block_size, limit),
    )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _block_bytes_per_chip(config: Config, arch: Architecture, backend: Backend) -> int:
    return config.cache.block_size * kv_bytes_per_token_per_chip(
        arch, config.cache_dtype, tensor=config.mesh.tensor, backend=backend
    )


def _fit(length: int, num_blocks: int, block_size: int, limit: int) -> LengthFit:
    blocks = _ceil_div(length, block_size)
    return LengthFit(length, blocks, num_blocks // blocks, num_blocks * block_size // limit)


def check_split(arch: Architecture, tensor: int) -> None:
    """Refuse a number of chips that the model can't be cut over. Raises ConfigError."""
    for name, count in (
        ("query heads", arch.num_heads),
        ("FFN columns", arch.intermediate_size),
        ("tokens of the vocabulary", arch.vocab_size),
    ):
        if count % tensor:
            raise ConfigError(
                f"mesh.tensor is {tensor}, which can't cut {count} {name} evenly; "
                f"choose a divisor of {count}"
            )
    if arch.num_kv_heads % tensor and tensor % arch.num_kv_heads:
        raise ConfigError(
            f"mesh.tensor is {tensor}, which neither divides {arch.num_kv_heads} KV heads nor "
            "is a multiple of them; choose one that does"
        )


def _check_arguments(
    hbm: int | None, headroom: float, lengths: Sequence[int], limit: int, mean: int
) -> None:
    if hbm is not None and hbm < 1:
        raise ConfigError(f"--hbm is {hbm} bytes; give the memory of one chip, such as 16GiB")
    if not 0 <= headroom < 1:
        raise ConfigError(f"headroom is {headroom}; it must be from 0 to below 1")
    if min(lengths) < 1:
        raise ConfigError(f"a sequence length of {min(lengths)} tokens; it must be at least 1")
    if mean > limit:
        raise ConfigError(
            f"the mean length is {mean} tokens, but no sequence is longer than {limit}; "
            "lower it or raise model.max_model_len"
        )


def _problems(
    hbm: int | None,
    available: int | None,
    asked: int,
    block_bytes: int,
    block_size: int,
    limit: int,
) -> tuple[str, ...]:
    """Why the plan can't run: what is too much, by how much, and the way out."""
    problems = []
    if hbm is not None and available is not None and available < block_bytes:
        needed = hbm - available + block_bytes
        problems.append(
            f"weights, sampler state, headroom and one block take {format_bytes(needed)} of a "
            f"chip, {format_bytes(needed - hbm)} more than its {format_bytes(hbm)}; "
            "raise mesh.tensor or take chips with more memory"
        )
    elif available is not None and asked * block_bytes > available:
        problems.append(
            f"the config's pool of {asked} blocks takes {format_bytes(asked * block_bytes)} a "
            f"chip, {format_bytes(asked * block_bytes - available)} more than is left; "
            f"ask for at most {available // block_bytes} blocks"
        )
    if asked * block_size < limit:
        problems.append(
            f"the config's pool holds {asked * block_size} tokens, {limit - asked * block_size} "
            f"too few for one sequence of max_model_len ({limit}); "
            "raise the cache or lower model.max_model_len"
        )
    return tuple(problems)
