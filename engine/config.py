"""The configuration: what an engine is made from, as frozen values that check themselves.

A config is never changed after it is made: resolving a default makes a new value. `config_file`
reads one from YAML.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from engine.config_error import ConfigError
from engine.server_config import ServerConfig, check_server

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# What keys and values can be held in; those of one byte are quantised, see `CacheConfig.scales`.
CACHE_DTYPE_BYTES = {**DTYPE_BYTES, "float8_e4m3fn": 1, "int8": 1}
Dtype = Literal["float32", "bfloat16"]
CacheDtype = Literal["float32", "bfloat16", "float8_e4m3fn", "int8"]
MAX_TIME_TO_LIVE = 10 * 366 * 24 * 3600  # seconds
Quantization = Literal["none", "int8"]
Isolation = Literal["domain", "none"]
Observability = Literal["open", "constant"]
Backend = Literal["auto", "tpu", "gpu", "cpu", "xla", "reference"]
MatmulBackend = Literal["auto", "cpu", "xla", "reference"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3's frequency-dependent rope scaling (transformers: `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        _check_positive("architecture.rope_scaling", self)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"architecture.rope_scaling: high_freq_factor ({self.high_freq_factor:g}) must be "
                f"above low_freq_factor ({self.low_freq_factor:g})"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What makes one decoder differ from another. Differences are values, not subclasses.

    Read from the model's own files; a config may state it too, so that `octavo plan` works
    without the weights, and then the two must agree.
    """

    family: Literal["llama", "qwen2", "qwen3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        _check_positive("architecture", self)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"architecture: {self.num_heads} query heads can't share {self.num_kv_heads} "
                "KV heads evenly"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"architecture.head_dim is {self.head_dim}; rotary positions need it even"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is held.

    Attributes:
      source: a .gguf file, a folder with safetensors or an orbax checkpoint, or
        `hf:org/name[@revision]`. Relative paths start at the config file's folder.
      name: what clients see; by default the source's last part.
      dtype: of weights and activations.
      quantization: `int8` holds the matrices that rows are multiplied with in 8 bits, with a scale
        a column, and multiplies with rows that are put into int8 as they come, with a second int8
        for what that leaves of each entry. Norms, biases and an embedding table that isn't the
        output projection too stay in `dtype`. Any checkpoint does: they are quantised when they
        are loaded.
      max_model_len: most tokens of prompt and output together; by default the model's own.
      architecture: see `Architecture`.
    """

    source: str
    name: str = ""
    dtype: Dtype = "bfloat16"
    quantization: Quantization = "none"
    max_model_len: int | None = None
    architecture: Architecture | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """How many chips, by use: `data` replicas of `tensor` shards.

    `tensor` must divide the query heads. It divides the KV heads, or is a multiple of them:
    then each chip holds a copy of one KV head, weights and cache.
    """

    data: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The KV cache: its block size, and its size in blocks or in bytes (exactly one).

    Attributes:
      block_size: tokens in one block; a power of two from 8 to 256.
      num_blocks: blocks in the pool.
      memory: bytes for the pool, over all chips of one replica; copies of KV heads and the
        padding that a backend asks for are counted.
      dtype: of keys and values; by default the model's.
      scales: a .safetensors file from `octavo calibrate`, with what a key or value of each
        layer and KV head is divided by before it is held in 8 bits. int8 needs it; without
        it, float8_e4m3fn holds values as they are. A relative path starts at the config
        file's folder.
      prefix_reuse: whether finished blocks are kept for requests with the same prefix.
      time_to_live: seconds after which what a request leaves is erased if nobody uses it; 0: it
        stays until its place is needed.
      tenant_time_to_live: the same for single tenants.
      public_prefixes: files with the beginnings of prompts that every domain may share: texts, or
        chats in .json. Their blocks are computed at the start and kept; nothing in them is
        secret. Relative paths start at the config file's folder.
      isolation: who may share blocks: `domain`, those of one tenant and cache salt, or `none`, all
        who reach the server. That is a leak, for `octavo leakcheck` to find; loopback only.
      observability: `open`, a prompt that is found in the cache starts sooner, and the reply says
        so; or `constant`, every prompt is computed as if it were the first, and blocks of equal
        contents are merged afterwards, while their requests run (docs/isolation.md).
      host_memory: bytes of the host's memory for blocks that had to leave the pool: they come
        back by a transfer where they would be computed again. 0: none.
      disk_path: a folder, for this user alone, for blocks that left the pool, and at the end for
        those that didn't: a restart finds them. They come back through the host's memory, so it
        takes host_memory. A relative path starts at the config file's folder. Empty: none.
      disk_size: most bytes of files in that folder, whatever models they are of.
      swap: `auto` brings a block back where that is quicker than computing it, by what both took
        at the start; `always` brings it back, and measures nothing.
    """

    block_size: int = 16
    num_blocks: int | None = None
    memory: int | None = None
    dtype: CacheDtype | None = None
    scales: str = ""
    prefix_reuse: bool = True
    time_to_live: int = 0
    tenant_time_to_live: dict[str, int] = dataclasses.field(default_factory=dict)
    public_prefixes: tuple[str, ...] = ()
    isolation: Isolation = "domain"
    observability: Observability = "open"
    host_memory: int = 0
    disk_path: str = ""
    disk_size: int = 0
    swap: Literal["auto", "always"] = "auto"

    def milliseconds_to_live(self, tenant: str) -> int:
        """How long what a tenant's requests leave may stay unused; 0: without limit."""
        return 1000 * self.tenant_time_to_live.get(tenant, self.time_to_live)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of the scheduler.

    Attributes:
      max_num_seqs: sequences that run at once (the slots of the device state).
      max_step_tokens: token budget of a step; prompts are cut into chunks that fit.
      max_waiting: requests that may queue; one more is refused (RESOURCE_EXHAUSTED).
      max_waiting_tokens: tokens of their prompts together, likewise; one prompt may always queue.
    """

    max_num_seqs: int = 64
    max_step_tokens: int = 512
    max_waiting: int = 1024
    max_waiting_tokens: int = 2**20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BucketConfig:
    """The static shapes that are compiled. Empty: powers of four up to the limits.

    Attributes:
      decode_seqs: sequence counts of steps in which every sequence has one token.
      prefill_tokens: token counts of the other steps.
      prefill_seqs: sequence counts of the other steps.
    """

    decode_seqs: tuple[int, ...] = ()
    prefill_tokens: tuple[int, ...] = ()
    prefill_seqs: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Which attention kernels.

    Attributes:
      backend: `tpu`, `gpu` (Hopper) and `cpu` (native code) are written for their device, `xla`
        runs on any, `reference` is the slow oracle. `auto` takes the device's own, or else
        `xla`; it is settled at the start, and what was asked for and can't run is an error.
    """

    backend: Backend = "auto"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MatmulConfig:
    """What multiplies with the weights.

    Attributes:
      backend: `xla` is the compiler's own, on any device; `cpu` is native code for bfloat16 and
        int8 on x86-64, with weights packed when they are loaded; `reference` is the slow oracle.
        `auto` takes `cpu` where that runs, or else `xla`.
    """

    backend: MatmulBackend = "auto"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything an engine is made from.

    `compile_cache` is a folder that keeps compiled programs between starts; empty turns it
    off. `path` is the file this was read from.
    """

    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    buckets: BucketConfig = BucketConfig()
    attention: AttentionConfig = AttentionConfig()
    matmul: MatmulConfig = MatmulConfig()
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    compile_cache: str = "~/.cache/octavo/compiled"
    path: str = ""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def weight_dtype(self) -> str:
        """Of the matrices that rows are multiplied with: the model's, or int8."""
        return self.model.dtype if self.model.quantization == "none" else self.model.quantization

    @property
    def cache_dtype(self) -> CacheDtype:
        """Of keys and values: the cache's own, or the model's."""
        return self.cache.dtype or self.model.dtype


def resolve_source(config: Config) -> str:
    """The model source with a relative path taken from the config file's folder."""
    source = config.model.source
    return source if ":" in source else str(_beside(config, source))


def resolve_scales(config: Config) -> Path | None:
    """The file of `cache.scales`, taken from the config file's folder; None if there is none."""
    return _beside(config, config.cache.scales) if config.cache.scales else None


def resolve_public_prefixes(config: Config) -> list[Path]:
    """The files of `cache.public_prefixes`, taken from the config file's folder."""
    return [_beside(config, path) for path in config.cache.public_prefixes]


def resolve_disk_path(config: Config) -> Path | None:
    """The folder of `cache.disk_path`, taken from the config file's folder; None without one."""
    return _beside(config, config.cache.disk_path) if config.cache.disk_path else None


def resolve_server(config: Config) -> ServerConfig:
    """The server's section, with the paths in it taken from the config file's folder."""
    server = config.server
    if server.access:
        server = dataclasses.replace(server, access=str(_beside(config, server.access)))
    if server.tls is not None:
        found = {
            name: str(_beside(config, path))
            for name, path in dataclasses.asdict(server.tls).items()
            if path
        }
        server = dataclasses.replace(server, tls=dataclasses.replace(server.tls, **found))
    return server


def _beside(config: Config, path: str) -> Path:
    """A path in a config: a relative one starts at the config file's folder."""
    expanded = Path(path).expanduser()
    if expanded.is_absolute() or not config.path:
        return expanded
    return (Path(config.path).parent / path).resolve()


def _check_positive(name: str, value: Any) -> None:
    """Refuse numbers that are zero, negative or not finite in any field of a dataclass."""
    for field in dataclasses.fields(value):
        number = getattr(value, field.name)
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            if isinstance(number, int) and number < 1:
                raise ConfigError(f"{name}.{field.name} is {number}; it must be at least 1")
            if not (math.isfinite(number) and number > 0):
                raise ConfigError(f"{name}.{field.name} is {number}; it must be above zero")


def _check(config: Config) -> None:
    cache, scheduler, mesh = config.cache, config.scheduler, config.mesh
    block = cache.block_size
    if not 8 <= block <= 256 or block & (block - 1):
        raise ConfigError(f"cache.block_size is {block}; it must be a power of two from 8 to 256")
    if (cache.num_blocks is None) == (cache.memory is None):
        raise ConfigError("give the cache's size as either cache.num_blocks or cache.memory")
    if cache.scales and CACHE_DTYPE_BYTES[config.cache_dtype] > 1:
        raise ConfigError(
            f"cache.scales is {cache.scales!r}, but the cache is held in {config.cache_dtype}, "
            "which takes none; leave it out or set cache.dtype to int8 or float8_e4m3fn"
        )
    if cache.host_memory < 0:
        raise ConfigError(f"cache.host_memory is {cache.host_memory}; it must be at least 0")
    times = {"cache.time_to_live": cache.time_to_live} | {
        f"cache.tenant_time_to_live.{name}": time
        for name, time in cache.tenant_time_to_live.items()
    }
    for key, seconds in times.items():
        if not 0 <= seconds <= MAX_TIME_TO_LIVE:
            raise ConfigError(f"{key} is {seconds}; it must be 0 to {MAX_TIME_TO_LIVE} seconds")
    if cache.public_prefixes and cache.observability == "constant":
        raise ConfigError(
            "cache.observability is constant, so no prompt is looked up and nothing would find "
            "cache.public_prefixes; leave one of the two out"
        )
    if cache.public_prefixes and not cache.prefix_reuse:
        raise ConfigError(
            "cache.public_prefixes are blocks that requests reuse; turn cache.prefix_reuse on or "
            "leave them out"
        )
    if cache.host_memory and not cache.prefix_reuse:
        raise ConfigError(
            "cache.host_memory keeps blocks by what they hold, which takes cache.prefix_reuse; "
            "turn that on or leave the memory out"
        )
    if cache.observability == "constant" and not cache.prefix_reuse:
        raise ConfigError(
            "cache.observability is constant, which shares blocks in its own way, but "
            "cache.prefix_reuse is off; leave one of the two out"
        )
    if cache.observability == "constant" and cache.host_memory:
        raise ConfigError(
            "cache.observability is constant, so no prompt is looked up and nothing would come "
            "back from cache.host_memory; leave one of the two out"
        )
    if cache.disk_size < 0:
        raise ConfigError(f"cache.disk_size is {cache.disk_size}; it must be at least 0")
    if bool(cache.disk_path) != bool(cache.disk_size):
        given, other = ("path", "size") if cache.disk_path else ("size", "path")
        raise ConfigError(
            f"cache.disk_{given} is given, but a disk tier takes cache.disk_{other} too; "
            "give both or neither"
        )
    if cache.disk_path and not cache.host_memory:
        raise ConfigError(
            "cache.disk_path keeps blocks that come back through the host's memory; give "
            "cache.host_memory too, or leave the disk out"
        )
    positive: Sequence[tuple[str, int | None]] = (
        ("cache.num_blocks", cache.num_blocks),
        ("cache.memory", cache.memory),
        ("model.max_model_len", config.model.max_model_len),
        ("scheduler.max_num_seqs", scheduler.max_num_seqs),
        ("scheduler.max_step_tokens", scheduler.max_step_tokens),
        ("scheduler.max_waiting", scheduler.max_waiting),
        ("scheduler.max_waiting_tokens", scheduler.max_waiting_tokens),
        ("mesh.data", mesh.data),
        ("mesh.tensor", mesh.tensor),
    )
    for key, value in positive:
        if value is not None and value < 1:
            raise ConfigError(f"{key} is {value}; it must be at least 1")
    if scheduler.max_step_tokens < scheduler.max_num_seqs:
        raise ConfigError(
            f"scheduler.max_step_tokens ({scheduler.max_step_tokens}) is below max_num_seqs "
            f"({scheduler.max_num_seqs}), so a step could not take one token of each sequence"
        )
    check_server(config.server)
    _check_buckets("decode_seqs", config.buckets.decode_seqs, scheduler.max_num_seqs)
    _check_buckets("prefill_tokens", config.buckets.prefill_tokens, scheduler.max_step_tokens)
    _check_buckets("prefill_seqs", config.buckets.prefill_seqs, scheduler.max_num_seqs)


def _check_buckets(name: str, sizes: tuple[int, ...], largest: int) -> None:
    if sizes and (list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != largest):
        fitting = [*sorted({size for size in sizes if 0 < size < largest}), largest]
        raise ConfigError(
            f"buckets.{name} is {list(sizes)}; it must rise strictly and end at {largest}, "
            f"the scheduler's limit; --set 'buckets.{name}={fitting}' does"
        )
