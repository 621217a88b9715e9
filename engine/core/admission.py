"""Whether a request can ever run, and may queue now: every check before the scheduler takes it."""

from __future__ import annotations

from engine.core import beams
from engine.core.core import Core
from engine.core.limits import MAX_INT32, Limits
from engine.sampling import InvalidRequest
from engine.types import QueueFull, Request


def tokens_waiting(tokens: int, num_prompt: int, most: int) -> str:
    """What a client is told whose prompt the queue has no room for."""
    return (
        f"prompts of {tokens} tokens are waiting already, and with the {num_prompt} of this one it "
        f"would be more than {most} (scheduler.max_waiting_tokens); try again later"
    )


def check_request(core: Core, limits: Limits, request: Request) -> int:
    """Raise what `scheduler.admit` raises; else return how long prompt and output may get."""
    num_prompt = len(request.prompt_ids)
    names = request.names
    for index, name in enumerate(names):
        if name in core.sequences or name in names[:index]:
            raise InvalidRequest("request_id", f"{name!r} is already running")
    width = request.sampling.beam_width
    field, what = ("beam_width", "beams") if width > 1 else ("n", "samples")
    if width > 1 and len(names) != width:
        raise InvalidRequest(field, f"is {width}, but the request has {len(names)} sequences")
    if request.forks and limits.allocator == "contiguous":
        raise InvalidRequest(field, f"the contiguous allocator shares no prompt; ask for no {what}")
    if len(names) > limits.max_num_seqs:
        raise InvalidRequest(
            field,
            f"{len(names)} {what} of a prompt run at once, but the engine runs at most "
            f"{limits.max_num_seqs} sequences; lower {field} or raise scheduler.max_num_seqs",
        )
    if num_prompt == 0:
        raise InvalidRequest("prompt", "is empty; give at least one token")
    if num_prompt + 1 > limits.max_model_len:
        raise InvalidRequest(
            "prompt",
            f"has {num_prompt} tokens, but with one token of output the model takes at most "
            f"{limits.max_model_len - 1}; shorten it or raise model.max_model_len",
        )
    for token in (min(request.prompt_ids), max(request.prompt_ids)):
        if not 0 <= token <= MAX_INT32:
            raise InvalidRequest("prompt", f"token id {token} is not in [0, {MAX_INT32}]")
    if request.max_tokens < 1:
        raise InvalidRequest(
            "max_tokens", f"{request.max_tokens} is below 1; ask for at least one token"
        )
    max_total = min(num_prompt + request.max_tokens, limits.max_model_len)
    longest = max_total - 1  # the last token is sampled but never fed back into the cache
    num_blocks = limits.num_blocks - len(core.public.keys)
    if -(-longest // limits.block_size) > num_blocks:
        raise InvalidRequest(
            "max_tokens",
            f"prompt and output may reach {longest} tokens, but the whole cache holds "
            f"{num_blocks * limits.block_size}; lower max_tokens or enlarge the cache",
        )
    most = beams.most_blocks(num_prompt, max_total, width, limits.block_size)
    if most > num_blocks:
        raise InvalidRequest(
            "beam_width",
            f"{width} beams of up to {longest} tokens may take {most} blocks, but the whole cache "
            f"has {num_blocks}; lower beam_width or max_tokens, or enlarge the cache",
        )
    num_waiting = len(core.sequences) - len(core.running)
    if num_waiting + len(request.forks) >= limits.max_waiting:
        raise QueueFull(f"{limits.max_waiting} requests are waiting already; try again later")
    if limits.max_waiting_tokens is not None and num_waiting:
        tokens = core.waiting.num_tokens
        if tokens and tokens + num_prompt > limits.max_waiting_tokens:
            raise QueueFull(tokens_waiting(tokens, num_prompt, limits.max_waiting_tokens))
    if request.is_public:
        others = (seq.request for seq in core.sequences.values())
        core.public.check_admission(request, limits, others)
    return max_total
