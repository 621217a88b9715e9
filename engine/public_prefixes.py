"""The prompts that an operator declares public (`cache.public_prefixes`): from files to blocks.

Every domain finds their blocks in the cache, so a file must hold nothing that a client may not
know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from engine.config import Config, ConfigError, resolve_public_prefixes
from engine.runtime.inbox import EngineStopped
from engine.runtime.news import Rejected
from engine.sampling import InvalidRequest, SamplingParams
from engine.text import Message, Tokenizer
from engine.types import FinishReason, Request, StepOutput


class _Turn(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str


def read_public_prefixes(config: Config, tokenizer: Tokenizer) -> Iterator[Request]:
    """The requests that compute them. A file without a whole block is left out.

    A `.json` file holds the beginning of a chat, a list of {"role": …, "content": …}; any other is
    the beginning of a text prompt.

    Raises:
      ConfigError: a file can't be read, or the model's template doesn't take its chat.
    """
    for number, path in enumerate(resolve_public_prefixes(config)):
        ids = _token_ids(path, tokenizer)
        if len(ids) >= config.cache.block_size:
            yield Request(
                f"public-prefix.{number}",  # without a #, which those of streams have
                tuple(ids),
                SamplingParams(temperature=0.0),
                max_tokens=1,
                priority=-(2**31),
                is_public=True,
            )


def compute_public_prefixes(
    config: Config,
    tokenizer: Tokenizer,
    submit: Callable[[Request], None],
    next_news: Callable[[], StepOutput | Rejected],
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Put the operator's public prefixes into the cache, before anybody else is served.

    Args:
      config, tokenizer: as in `read_public_prefixes`.
      submit: hands a request to the step loop.
      next_news: waits for its one piece of news.
      progress: called with (what is being done, done, in all).

    Raises:
      ConfigError: a file can't be used, or its prompt can't be served.
      EngineStopped: a step failed.
    """
    requests = list(read_public_prefixes(config, tokenizer))
    for done, request in enumerate(requests):
        if progress:
            progress("Computing public prefixes", done, len(requests))
        submit(request)
        news = next_news()
        if isinstance(news, Rejected):
            path = config.cache.public_prefixes[done]
            raise ConfigError(f"cache.public_prefixes: {path}: {news.error}")
        if news.finish_reason is FinishReason.ERROR:
            raise EngineStopped("the step that computed a public prefix failed; see the log")
    if progress and requests:
        progress("Computing public prefixes", len(requests), len(requests))


def _token_ids(path: Path, tokenizer: Tokenizer) -> list[int]:
    key = "cache.public_prefixes"
    try:
        if path.suffix != ".json":
            return tokenizer.encode(path.read_text(encoding="utf-8"))
        turns = msgspec.json.decode(path.read_bytes(), type=list[_Turn])
        messages = [Message(turn.role, turn.content) for turn in turns]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    except OSError as error:
        raise ConfigError(f"{key}: can't read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{key}: {path} is not UTF-8 text") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f'{key}: {path} is no list of {{"role": …, "content": …}} ({error})'
        ) from None
    except InvalidRequest as error:
        raise ConfigError(f"{key}: {path}: {error.message}") from None
