"""From a config to a warm runner: files, mesh, memory, compiled programs.

Every size that was left open in the config is settled here, once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from engine.config import (
    Architecture,
    Config,
    ConfigError,
    resolve_source,
)
from engine.core.batching import bucket_set
from engine.core.scheduler import Limits
from engine.memory_plan import config_blocks
from engine.model.attention import Attention, resolve_backend
from engine.model.decoder import abstract_decoder
from engine.runtime import compiles
from engine.runtime.mesh import make_mesh, weight_shardings
from engine.runtime.runner import Runner, RunnerShape
from engine.text import Tokenizer
from engine.weights import Checkpoint, load_params, open_checkpoint

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class LoadedEngine:
    """Everything a step loop needs."""

    config: Config
    name: str
    architecture: Architecture
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    limits: Limits
    runner: Runner
    compiles_after_warmup: Callable[[], int]


def load_engine(config: Config, progress: Progress | None = None) -> LoadedEngine:
    """Load and warm up what the config describes.

    Raises:
      ConfigError: it asks for what the model or the machine doesn't have.
      WeightsError: the model's files are missing or broken.
    """
    show = progress or (lambda what, done, total: None)
    use_compile_cache(config.compile_cache)
    checkpoint = open_checkpoint(resolve_source(config))
    arch = checkpoint.architecture
    _check_architecture(config, arch)
    limits = make_limits(config, arch, checkpoint.fingerprint)
    mesh = make_mesh(config.mesh, arch)
    try:
        backend = resolve_backend(config.attention.backend, jax.default_backend())
    except ValueError as error:
        raise ConfigError(f"attention.backend: {error}") from None
    model = abstract_decoder(arch, jnp.dtype(config.model.dtype))
    weights = load_params(
        checkpoint,
        weight_shardings(model, mesh),
        functools.partial(show, "Loading weights"),
    )
    shape = RunnerShape(
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        max_num_seqs=limits.max_num_seqs,
        cache_dtype=jnp.dtype(config.cache.dtype or config.model.dtype),
        buckets=bucket_set(
            config.buckets, config.scheduler, -(-limits.max_model_len // limits.block_size)
        ),
    )
    runner = Runner(model, weights, mesh, Attention(backend, mesh), shape)
    runner.warm_up(functools.partial(show, "Compiling"))
    log.info(
        "%s: attention %s on %s, %d blocks of %d tokens, buckets %s",
        checkpoint.format,
        backend,
        jax.devices()[0].device_kind,
        limits.num_blocks,
        limits.block_size,
        [tuple(bucket[:2]) for bucket in shape.buckets],
    )
    return LoadedEngine(
        config=config,
        name=config.model.name or Path(config.model.source).stem,
        architecture=arch,
        tokenizer=_tokenizer(checkpoint),
        eos_token_ids=checkpoint.eos_token_ids,
        limits=limits,
        runner=runner,
        compiles_after_warmup=compiles.counter(),
    )


def make_limits(config: Config, arch: Architecture, fingerprint: str) -> Limits:
    """The scheduler's limits, with every size settled."""
    max_model_len = config.model.max_model_len or arch.max_position
    if max_model_len > arch.max_position:
        raise ConfigError(
            f"model.max_model_len is {max_model_len}, but the model was made for at most "
            f"{arch.max_position} tokens"
        )
    return Limits(
        num_blocks=config_blocks(config, arch),
        block_size=config.cache.block_size,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_step_tokens=config.scheduler.max_step_tokens,
        max_model_len=max_model_len,
        max_waiting=config.scheduler.max_waiting,
        prefix_reuse=config.cache.prefix_reuse,
        fingerprint=fingerprint,
    )


def use_compile_cache(folder: str) -> None:
    """Keep compiled programs in a folder, so that the next start finds them.

    A folder that can't be written costs a warning and nothing else: programs are then
    compiled at each start.
    """
    if not folder:
        jax.config.update("jax_compilation_cache_dir", None)
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        log.warning(
            "compile cache %s can't be written (%s); programs are compiled at every start. "
            "Free some space or set compile_cache to another folder.",
            path,
            error.strerror,
        )
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.metadata is not None:
        return Tokenizer.from_gguf(checkpoint.metadata)
    assert checkpoint.folder is not None  # a checkpoint has one of the two
    return Tokenizer.from_folder(checkpoint.folder)


def _check_architecture(config: Config, found: Architecture) -> None:
    """A config that states the architecture must agree with the model's files."""
    stated = config.model.architecture
    if stated is None or stated == found:
        return
    for field in dataclasses.fields(Architecture):
        ours, theirs = getattr(stated, field.name), getattr(found, field.name)
        if ours != theirs:
            raise ConfigError(
                f"model.architecture.{field.name} is {ours} in the config, but {theirs} in the "
                "model's files; correct the config or leave model.architecture out"
            )
