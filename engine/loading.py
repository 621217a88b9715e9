"""From a config to a warm runner: files, mesh, memory, compiled programs.

Every size that was left open in the config is settled here, once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from engine.backends import (
    check_attention,
    describe,
    device_kind,
    resolve_attention,
    resolve_products,
)
from engine.config import Architecture, Backend, Config, ConfigError, resolve_source
from engine.core.buckets import bucket_set
from engine.core.costs import keeping_pays
from engine.core.limits import Limits
from engine.memory_plan import config_blocks, host_blocks, kv_copies
from engine.model.attention import Attention
from engine.model.decoder import Decoder, abstract_decoder
from engine.model.products import Products, Resolved
from engine.model.sampler import MAX_STOP_IDS
from engine.runtime import compiles
from engine.runtime.disk_tier import DiskTier
from engine.runtime.measure import measure
from engine.runtime.mesh import kv_scales_sharding, make_mesh, weight_shardings
from engine.runtime.programs import Programs
from engine.runtime.runner import Runner, RunnerShape
from engine.runtime.step import Step
from engine.runtime.tiers import open_disk_tier
from engine.sampling import MAX_STOP_TOKENS
from engine.start_up import StartUp
from engine.text import Grammars, Tokenizer
from engine.trimming import find_trim
from engine.weights import Checkpoint, load_params, open_checkpoint, with_kv_copies
from engine.weights.kv_scales import load_scales, scales_fingerprint

log = logging.getLogger(__name__)

_MAX_PAGES = 2**31 - 1  # a page is one head's part of a block in one layer; its index is int32

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class LoadedEngine:
    """Everything an engine needs.

    `architecture` is the model's own: the runner's has each KV head as often as chips hold it.
    `attention` and `products` say which kernels run, and why where that may surprise; `start_up`
    says where the time went.
    """

    config: Config
    name: str
    architecture: Architecture
    attention: str
    products: str
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    weights_fingerprint: str
    limits: Limits
    runner: Runner
    compiles_after_warmup: Callable[[], int]
    grammars: Grammars
    start_up: StartUp
    disk: DiskTier | None = None


def load_engine(config: Config, progress: Progress | None = None) -> LoadedEngine:
    """Load and warm up what the config describes.

    Raises:
      ConfigError: it asks for what the model or the machine doesn't have.
      WeightsError: the model's files are missing or broken.
    """
    show = progress or (lambda what, done, total: None)
    start_up, from_cache, compiled = StartUp(), compiles.cache_counter(), compiles.counter()
    start_up.begin("model's files")
    use_compile_cache(config.compile_cache)
    checkpoint = open_checkpoint(resolve_source(config))
    arch, fingerprint = checkpoint.architecture, checkpoint.fingerprint
    _check_architecture(config, arch)
    tokenizer = tokenizer_of(checkpoint)
    eos_token_ids = eos_token_ids_of(checkpoint, tokenizer)
    start_up.begin("devices and kernels")
    resolved = resolve_attention(config)
    scales = load_scales(config, arch)
    _check_host_memory(config)
    limits = make_limits(config, arch, fingerprint, backend=resolved.backend, scales=scales)
    mesh = make_mesh(config.mesh, arch)
    check_attention(config, arch, resolved.backend)
    copies = kv_copies(arch, config.mesh.tensor)
    held = with_kv_copies(arch, copies)
    multiplied = resolve_products(config, held)
    disk = open_disk_tier(config, limits, held, resolved.backend, multiplied.backend)
    products = Products(multiplied.backend, config.model.quantization)
    model = abstract_decoder(held, jnp.dtype(config.model.dtype), products)
    shape = runner_shape(config, limits)
    attention = Attention(resolved.backend, mesh)
    if scales is not None:
        scales = np.repeat(scales, copies, axis=-1)
    with Programs(abstract_step(model, mesh, attention, shape, scales)) as programs:
        programs.begin(shape.buckets)
        start_up.begin("weights")
        smaller = "raise mesh.tensor or set model.dtype to bfloat16 or model.quantization to int8"
        with enough_memory("the weights don't fit", smaller):
            weights = read_weights(
                checkpoint, model, mesh, functools.partial(show, "Loading weights")
            )
        form = checkpoint.format
        del checkpoint  # what was read of its files counts as this process's memory until then
        start_up.begin("cache")
        smaller_cache = "cache.memory or cache.num_blocks (`octavo plan` shows what fits)"
        with enough_memory(
            f"the cache of {limits.num_blocks} blocks of {limits.block_size} tokens doesn't fit "
            "beside the weights",
            f"lower {smaller_cache}",
        ):
            runner = Runner(model, weights, mesh, attention, shape, scales, programs)
        start_up.begin("compiling and warming up")
        # A TPU's compiler already refuses what won't fit; a GPU's program fails when it runs.
        with enough_memory(
            "what a step computes doesn't fit beside the weights and the cache",
            f"lower scheduler.max_step_tokens or scheduler.max_num_seqs, or {smaller_cache}",
        ):
            runner.warm_up(functools.partial(show, "Compiling"))
    if (trim := find_trim()) is not None:
        trim(0)
    if runner.host is not None and config.cache.swap == "auto":
        start_up.begin("measuring swaps")
        costs = measure(runner, limits)
        limits = costs.apply(limits)
        block_bytes = runner.host.block_bytes
        log.info("swapping: %s", costs.describe(block_bytes, limits.block_size))
        if not keeping_pays(limits):
            log.warning(
                "computing a block is always quicker than bringing it back, so the host tier stays "
                "empty; leave cache.host_memory out"
            )
    start_up.end()
    start_up.programs = (compiled(), from_cache())
    log.info(
        "%s: attention %s (%s), products %s (%s) on %s, weights in %s, "
        "%d blocks of %d tokens in %s, buckets %s",
        form,
        *resolved[:2],
        *multiplied[:2],
        device_kind(),
        config.weight_dtype,
        limits.num_blocks,
        limits.block_size,
        config.cache_dtype,
        [tuple(bucket[:2]) for bucket in shape.buckets],
    )
    return LoadedEngine(
        config=config,
        name=_name(config),
        architecture=arch,
        attention=describe(resolved, config.attention.backend),
        products=_described(multiplied, config),
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        weights_fingerprint=fingerprint,
        limits=limits,
        runner=runner,
        compiles_after_warmup=compiles.counter(),
        grammars=Grammars(tokenizer, arch.vocab_size, eos_token_ids),
        start_up=start_up,
        disk=disk,
    )


def _described(multiplied: Resolved, config: Config) -> str:
    """The products' kernels, and what they multiply with if that isn't of the model's dtype."""
    name, held = describe(multiplied, config.matmul.backend), config.weight_dtype
    return name if held == config.model.dtype else f"{name}, with weights in {held}"


def abstract_step(
    model: Decoder, mesh: Mesh, attention: Attention, shape: RunnerShape, scales: np.ndarray | None
) -> Step:
    """What the runner will run, from shapes alone, so that it is compiled while weights are read.

    Args:
      model, mesh, attention, shape: as the runner takes them.
      scales: float32 [L, 2, K] of an 8-bit pool, or None.
    """
    weights = model.products.packed(weight_shardings(model, mesh))
    placed = None
    if scales is not None:
        placed = jax.ShapeDtypeStruct(scales.shape, scales.dtype, sharding=kv_scales_sharding(mesh))
    return Step(model, weights, mesh, attention, shape, placed)


def read_weights(
    checkpoint: Checkpoint,
    model: Decoder,
    mesh: Mesh,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, jax.Array]:
    """A model's weights on its mesh, packed as its products want them.

    Args:
      checkpoint: of the model, with each KV head once.
      model: abstract, with KV heads as often as chips hold them.
      mesh: where its weights go.
      progress: called with bytes read and bytes in all.

    Raises:
      WeightsError: they can't be read.
    """
    placed = weight_shardings(model, mesh)
    copies = model.arch.num_kv_heads // checkpoint.architecture.num_kv_heads
    return model.products.pack(load_params(checkpoint, placed, progress, kv_copies=copies))


def make_limits(
    config: Config,
    arch: Architecture,
    weights_fingerprint: str,
    *,
    backend: Backend,
    scales: np.ndarray | None = None,
) -> Limits:
    """The scheduler's limits, with every size settled.

    Args:
      config, arch: what is asked for, and of which model.
      weights_fingerprint: from the checkpoint.
      backend: the resolved one; it decides how wide a block is.
      scales: from `load_scales`.

    Raises:
      ConfigError: the model or the device's integers don't reach that far.
    """
    max_model_len = config.model.max_model_len or arch.max_position
    if max_model_len > arch.max_position:
        raise ConfigError(
            f"model.max_model_len is {max_model_len}, but the model was made for at most "
            f"{arch.max_position} tokens"
        )
    num_blocks = config_blocks(config, arch, backend)
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
    merges = config.cache.observability == "constant"
    quantised = () if config.model.quantization == "none" else (f"weights: {config.weight_dtype}",)
    # What a server without isolation leaves in a tier is not for one that has it.
    isolation = () if config.cache.isolation == "domain" else ("isolation: none",)
    return Limits(
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_step_tokens=config.scheduler.max_step_tokens,
        max_model_len=max_model_len,
        max_waiting=config.scheduler.max_waiting,
        max_waiting_tokens=config.scheduler.max_waiting_tokens,
        prefix_reuse=config.cache.prefix_reuse and not merges,
        merge_blocks=merges,
        host_blocks=host_blocks(config, arch, backend),
        # Keys and values depend on how they are computed and held, not on the weights alone.
        fingerprint=":".join(
            (
                weights_fingerprint,
                config.model.dtype,
                config.cache_dtype,
                scales_fingerprint(scales),
                *quantised,
                *isolation,
            )
        ),
    )


def runner_shape(config: Config, limits: Limits) -> RunnerShape:
    """The sizes of device memory and of every program, from settled limits."""
    return RunnerShape(
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        max_num_seqs=limits.max_num_seqs,
        cache_dtype=jnp.dtype(config.cache_dtype),
        buckets=bucket_set(
            config.buckets, config.scheduler, -(-limits.max_model_len // limits.block_size)
        ),
        host_blocks=limits.host_blocks,
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


def _check_host_memory(config: Config) -> None:
    """Refuse a host tier beyond the machine's memory: it would swap, and take longer than
    computing its blocks anew."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if config.cache.host_memory > memory:
        raise ConfigError(
            f"cache.host_memory is {config.cache.host_memory} bytes, but this machine has "
            f"{memory}; lower it"
        )


@contextlib.contextmanager
def enough_memory(problem: str, way_out: str) -> Iterator[None]:
    """Turn a lack of device memory into a ConfigError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{problem} in the memory of {device_kind()} ({reason:.300}); {way_out}"
        ) from error


def _name(config: Config) -> str:
    return config.model.name or Path(config.model.source).name.removesuffix(".gguf")


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.metadata is not None:
        return Tokenizer.from_gguf(checkpoint.metadata)
    assert checkpoint.folder is not None  # a checkpoint has one of the two
    return Tokenizer.from_folder(checkpoint.folder)


def eos_token_ids_of(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[int, ...]:
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
