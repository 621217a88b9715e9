"""`octavo calibrate`: the scales of an 8-bit KV cache, from prompts run with an exact one.

A scale maps the largest key, or value, that a KV head of a layer gave to the largest number
that the cache's dtype holds.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.backends import check_attention, resolve_attention
from engine.config import (
    CACHE_DTYPE_BYTES,
    Architecture,
    BucketConfig,
    CacheDtype,
    Config,
    ConfigError,
    SchedulerConfig,
    resolve_source,
)
from engine.core import batching, scheduler
from engine.core.limits import Limits
from engine.core.scheduler import SchedulerState
from engine.generate import LineError, parse_line, replacing
from engine.llm import AnyPrompt, as_prompt
from engine.loading import load_engine
from engine.resolve import Resolver
from engine.runtime.runner import Runner
from engine.sampling import InvalidRequest, SamplingParams
from engine.text import Message, Tokenizer
from engine.types import Domain, Request
from engine.weights import open_checkpoint
from engine.weights.kv_scales import LARGEST, encode_scales, scales_of

log = logging.getLogger(__name__)

MAX_PROMPT_TOKENS = 4096  # of each prompt; the pool is made for one such
_STEP_TOKENS = 512

# Prose, speech, code, numbers and several scripts: heads differ in what excites them.
DEFAULT_PROMPTS = (
    "The old harbour was quiet that morning. Fishermen mended their nets in the shade of the "
    "wall, gulls quarrelled over scraps, and far out a single white sail stood on the horizon.",
    "What is the difference between a virus and a bacterium, and why do antibiotics help "
    "against only one of them? Explain it to a child of ten.",
    "def fibonacci(n: int) -> list[int]:\n    numbers = [0, 1]\n    while len(numbers) < n:\n"
    "        numbers.append(numbers[-1] + numbers[-2])\n    return numbers[:n]\n",
    "Invoice 2024-0381: 12 x 3.75 = 45.00; 7 x 19.99 = 139.93; subtotal 184.93, 8.1% tax 14.98, "
    "total 199.91. Due on 2024-11-30. Account 0042 1187 9930.",
    '{"id": 17, "tags": ["a", "b"], "nested": {"ok": true, "ratio": 0.125, "note": null}}',
    "In 1687 Newton published the laws of motion; in 1905 Einstein showed that time itself "
    "depends on the observer, and in 1915 that mass bends the path of light.",
    "Die Würde des Menschen ist unantastbar. Je pense, donc je suis. En un lugar de la Mancha, "
    "de cuyo nombre no quiero acordarme. Тише едешь, дальше будешь.",
    "山路を登りながら、こう考えた。千里之行,始于足下。한국어 문장도 하나 있습니다. "
    "السلام عليكم ورحمة الله. नमस्ते दुनिया।",
    "1. Preheat the oven to 200 °C.\n2. Whisk two eggs with 100 g of sugar.\n3. Fold in the "
    "flour, a pinch at a time.\n4. Bake for 25 minutes and let it cool.",
    "yes no yes no yes no the the the the ... !!! ??? \n\n\n\t\t --- === *** <<< >>> ~~~",
)


class Calibration(NamedTuple):
    """What was found.

    Attributes:
      scales: float32 [L, 2, K], of keys and of values.
      dtype: of the cache that they are for.
      num_prompts, num_tokens: what they were found on.
    """

    scales: np.ndarray
    dtype: CacheDtype
    num_prompts: int
    num_tokens: int


def calibrate_file(
    config: Config,
    output: Path,
    *,
    dtype: CacheDtype | None = None,
    prompts: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Make a file for `cache.scales`; it is written whole at the end.

    Args:
      config: of the engine that will use it.
      output: the file to write.
      dtype: of the cache; by default the config's own if it has 8 bits, else int8.
      prompts: see `read_prompts`; by default `DEFAULT_PROMPTS`.
      progress: called with (what is being done, done, in all).

    Raises:
      ConfigError, WeightsError: the config or the model's files can't be used.
      OSError: a file can't be read or written.
      ValueError: a prompt can't be used, or the model gave a key or value that is not finite.
    """
    texts = None if prompts is None else read_prompts(prompts)
    with replacing(output) as file:  # before the model is loaded, which takes long
        found = calibrate(config, texts, dtype=dtype, progress=progress)
        file.write(encode_scales(found.scales, found.dtype))
    return found


def calibrate(
    config: Config,
    prompts: list[AnyPrompt] | None = None,
    *,
    dtype: CacheDtype | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Find scales by running prompts, one after the other. See `calibrate_file`.

    The cache's own dtype and scales in `config` are left aside: values are seen as the model
    computes them. Up to MAX_PROMPT_TOKENS of each prompt are used.
    """
    if dtype is None:
        is_narrow = CACHE_DTYPE_BYTES[config.cache_dtype] == 1
        dtype = config.cache_dtype if is_narrow else "int8"
    if dtype not in LARGEST:
        raise ConfigError(f"a cache of {dtype} takes no scales; {' and '.join(LARGEST)} do")
    show = progress or (lambda what, done, total: None)
    arch = open_checkpoint(resolve_source(config)).architecture
    loaded = load_engine(_unquantised(config, arch), progress)
    runner, limits = loaded.runner, loaded.limits
    resolver = Resolver(
        loaded.tokenizer,
        dataclasses.replace(limits, max_model_len=2**31 - 1),  # long prompts are cut below
        loaded.architecture.vocab_size,
        loaded.eos_token_ids,
        config.cache,
        loaded.grammars,
    )
    if prompts is None:
        prompts = _default_prompts(loaded.tokenizer)
    requests = [
        _request(resolver, prompt, number, limits.max_model_len - 1)
        for number, prompt in enumerate(prompts, 1)
    ]
    # The pool starts as zeros, and what an earlier prompt left in it was seen already: the
    # largest of everything is that of what was written.
    largest = np.zeros(())
    for done, request in enumerate(requests):
        show("Calibrating", done, len(requests))
        _prefill(runner, limits, request)
        largest = np.maximum(largest, _largest(runner))  # NaN stays NaN
    show("Calibrating", len(requests), len(requests))
    copies = runner.arch.num_kv_heads // loaded.architecture.num_kv_heads
    return Calibration(
        scales=scales_of(largest[:, :, ::copies], dtype),
        dtype=dtype,
        num_prompts=len(requests),
        num_tokens=sum(len(request.prompt_ids) for request in requests),
    )


def read_prompts(path: Path) -> list[AnyPrompt]:
    """Prompts of a file: of the lines of `octavo generate` if its name ends in .jsonl, whose
    sampling fields don't matter here; otherwise every line is a text.

    Raises:
      OSError: it can't be read.
      ValueError: a line is no request, the file is not UTF-8, or has no prompt.
    """
    prompts: list[AnyPrompt] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            is_json = path.suffix == ".jsonl"
            prompts.append(parse_line(line, number, 0).prompt if is_json else line.decode())
        except (LineError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
    if not prompts:
        raise ValueError(f"{path} has no prompt; give at least one line")
    return prompts


def _default_prompts(tokenizer: Tokenizer) -> list[AnyPrompt]:
    """Each as a text and, where the model has chats, as a question: their marks count too."""
    prompts: list[AnyPrompt] = list(DEFAULT_PROMPTS)
    if tokenizer.has_chat_template:
        prompts += [(Message("user", text),) for text in DEFAULT_PROMPTS]
    return prompts


def _unquantised(config: Config, arch: Architecture) -> Config:
    """The same model with an exact cache for one sequence, and two programs."""
    limit = min(config.model.max_model_len or arch.max_position, MAX_PROMPT_TOKENS + 1)
    tokens = min(config.scheduler.max_step_tokens, _STEP_TOKENS)
    exact = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, max_model_len=limit),
        cache=dataclasses.replace(
            config.cache,
            num_blocks=-(-limit // config.cache.block_size),
            memory=None,
            dtype=None,
            scales="",
            prefix_reuse=False,
            host_memory=0,
        ),
        scheduler=SchedulerConfig(max_num_seqs=1, max_step_tokens=tokens),
        buckets=BucketConfig(decode_seqs=(1,), prefill_tokens=(tokens,), prefill_seqs=(1,)),
    )
    return _with_kernels(exact, arch)


def _with_kernels(config: Config, arch: Architecture) -> Config:
    """The same with kernels that take it: those for the 8-bit cache may take no exact one."""
    backend = resolve_attention(config).backend
    try:
        check_attention(config, arch, backend)
    except ConfigError as refusal:
        try:
            check_attention(config, arch, "xla")
        except ConfigError:
            return config  # loading says why
        log.warning("calibrating with attention.backend xla: %s", refusal)
        attention = dataclasses.replace(config.attention, backend="xla")
        return dataclasses.replace(config, attention=attention)
    return config


def _request(resolver: Resolver, prompt: AnyPrompt, number: int, most: int) -> Request:
    """A prompt as a request that ends with its first token."""
    try:
        request = resolver.resolve(
            f"prompt {number}",
            as_prompt(prompt),
            SamplingParams(temperature=0.0, max_tokens=1),
            domain=Domain(),
            priority=0,
            deadline=None,
        )
    except InvalidRequest as error:
        raise ValueError(f"prompt {number}: {error}") from None
    return dataclasses.replace(request, prompt_ids=request.prompt_ids[:most])


def _prefill(runner: Runner, limits: Limits, request: Request) -> None:
    """Run one request, step by step."""
    state = scheduler.admit(SchedulerState.initial(limits), limits, request)
    while not state.is_idle:
        state, plan = scheduler.schedule(state, limits)
        batch = batching.build(plan, runner.shape.buckets, runner.sink_slot)
        tokens = runner.launch(plan, batch).wait()
        state, _ = scheduler.commit(state, plan, tokens, limits)


def _largest(runner: Runner) -> np.ndarray:
    """The largest absolute key and value in the pool, float [L, 2, K]."""
    largest = _largest_in(
        runner.kv_pool, num_layers=runner.arch.num_layers, head_dim=runner.arch.head_dim
    )
    return np.asarray(largest, np.float64)


@functools.partial(jax.jit, static_argnames=("num_layers", "head_dim"))
def _largest_in(pool: jax.Array, *, num_layers: int, head_dim: int) -> jax.Array:
    _, num_kv_heads, block_size, width = pool.shape
    parts = pool.reshape(num_layers, -1, num_kv_heads, block_size, 2, width // 2)
    largest_LK2 = jnp.max(jnp.abs(parts[..., :head_dim]), axis=(1, 3, 5))
    return largest_LK2.swapaxes(1, 2).astype(jnp.float32)
