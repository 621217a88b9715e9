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
from jax.experimental.compilation_cache import compilation_cache

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
from engine.model.sampler import MAX_STOP_IDS
from engine.runtime import compiles
from engine.runtime.mesh import make_mesh, weight_shardings
from engine.runtime.runner import Runner, RunnerShape
from engine.text import Tokenizer
from engine.types import MAX_STOP_TOKENS
from engine.weights import Checkpoint, load_params, open_checkpoint

log = logging.getLogger(__name__)

_MAX_PAGES = 2**31 - 1  # a page is one head's part of a block in one layer; its index is int32

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class LoadedEngine:
    """Everything an engine needs."""

    config: Config
    name: str
    architecture: Architecture
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    weights_fingerprint: str
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
    tokenizer = _tokenizer(checkpoint)
    eos_token_ids = _eos_token_ids(checkpoint, tokenizer)
    limits = make_limits(config, arch, checkpoint.fingerprint)
    mesh = make_mesh(config.mesh, arch)
    try:
        backend = resolve_backend(config.attention.backend, jax.default_backend())
    except ValueError as error:
        raise ConfigError(f"attention.backend: {error}") from None
    model = abstract_decoder(arch, jnp.dtype(config.model.dtype))
    shape = RunnerShape(
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        max_num_seqs=limits.max_num_seqs,
        cache_dtype=jnp.dtype(config.cache_dtype),
        buckets=bucket_set(
            config.buckets, config.scheduler, -(-limits.max_model_len // limits.block_size)
        ),
    )
    weights = load_params(
        checkpoint,
        weight_shardings(model, mesh),
        functools.partial(show, "Loading weights"),
    )
    try:
        runner = Runner(model, weights, mesh, Attention(backend, mesh), shape)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(
            f"the cache of {limits.num_blocks} blocks of {limits.block_size} tokens doesn't fit "
            f"into {jax.devices()[0].device_kind} memory beside the weights; lower cache.memory "
            "or cache.num_blocks (`octavo plan` shows what fits)"
        ) from error
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
        name=_name(config),
        architecture=arch,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        weights_fingerprint=checkpoint.fingerprint,
        limits=limits,
        runner=runner,
        compiles_after_warmup=compiles.counter(),
    )


def make_limits(config: Config, arch: Architecture, weights_fingerprint: str) -> Limits:
    """The scheduler's limits, with every size settled.

    Raises:
      ConfigError: the model or the device's integers don't reach that far.
    """
    max_model_len = config.model.max_model_len or arch.max_position
    if max_model_len > arch.max_position:
        raise ConfigError(
            f"model.max_model_len is {max_model_len}, but the model was made for at most "
            f"{arch.max_position} tokens"
        )
    num_blocks = config_blocks(config, arch)
    # The last token of a sequence is never fed back, so it takes no place in the cache.
    reach = num_blocks * config.cache.block_size + 1
    if max_model_len > reach:
        if config.model.max_model_len is not None:
            raise ConfigError(
                f"model.max_model_len is {max_model_len}, but the whole cache holds sequences of "
                f"at most {reach} tokens; lower it or enlarge the cache"
            )
        log.warning("sequences are limited to %d tokens, all that the cache holds", reach)
        max_model_len = reach
    most_blocks = _MAX_PAGES // (arch.num_layers * arch.num_kv_heads)
    if num_blocks > most_blocks:
        raise ConfigError(
            f"the cache would have {num_blocks} blocks, but of this model at most {most_blocks} "
            "can be addressed; lower cache.memory or cache.num_blocks, or raise cache.block_size"
        )
    return Limits(
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_step_tokens=config.scheduler.max_step_tokens,
        max_model_len=max_model_len,
        max_waiting=config.scheduler.max_waiting,
        prefix_reuse=config.cache.prefix_reuse,
        # Keys and values depend on how they are computed and held, not on the weights alone.
        fingerprint=f"{weights_fingerprint}:{config.model.dtype}:{config.cache_dtype}",
    )


def use_compile_cache(folder: str) -> None:
    """Keep compiled programs in a folder, so that the next start finds them.

    A folder that can't be written costs a warning and nothing else: programs are then
    compiled at each start.
    """
    compilation_cache.reset_cache()  # jax stays with the first folder otherwise
    jax.config.update("jax_compilation_cache_dir", None)
    if not folder:
        return
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        try:
            probe.write_bytes(b"x" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home folder
        log.warning(
            "compile cache %s can't be written (%s); programs are compiled at every start. "
            "Free some space or set compile_cache to another folder.",
            folder,
            getattr(error, "strerror", None) or error,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _name(config: Config) -> str:
    return config.model.name or Path(config.model.source).name.removesuffix(".gguf")


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.metadata is not None:
        return Tokenizer.from_gguf(checkpoint.metadata)
    assert checkpoint.folder is not None  # a checkpoint has one of the two
    return Tokenizer.from_folder(checkpoint.folder)


def _eos_token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token that the model's files name as the end of an answer, the main one first."""
    vocab_size = checkpoint.architecture.vocab_size
    tokens = [i for i in tokenizer.eos_token_ids if type(i) is int and 0 <= i < vocab_size]
    main = [i for i in checkpoint.eos_token_ids if 0 <= i < vocab_size]
    found = tuple(dict.fromkeys((*main, *sorted(tokens))))
    if len(found) > MAX_STOP_IDS - MAX_STOP_TOKENS:
        raise ConfigError(
            f"the model's files name {len(found)} end-of-sequence tokens, but at most "
            f"{MAX_STOP_IDS - MAX_STOP_TOKENS} are possible; correct eos_token_id in them"
        )
    return found


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
