"""`octavo chat`: a conversation on the terminal, over the gRPC service.

The answer goes to stdout and everything else to stderr, so that `octavo chat -m … > file`
keeps the answer alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from typing import TextIO

from engine.client import DEFAULT_ADDRESS, AsyncClient, ServiceError
from engine.credentials import Credentials
from engine.sampling import InvalidRequest, SamplingParams
from engine.types import FinishReason

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells do

_HELP = "Ctrl-C stops an answer, /new starts over, Ctrl-D ends."
# Neither a model's output nor a server's words are trusted to steer the terminal: C0 but for
# tab and line feed, DEL, C1.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def chat(
    address: str = DEFAULT_ADDRESS,
    message: str | None = None,
    *,
    system: str | None = None,
    sampling: SamplingParams | None = None,
    credentials: Credentials | None = None,
) -> int:
    """Talk to a server. The implementation of `octavo chat`.

    Args:
      address: `host:port` of the server.
      message: what to say; None starts a conversation that reads from stdin.
      system: a system message that comes before everything else.
      sampling: how tokens are chosen; the engine's defaults if None.
      credentials: for servers that ask who one is.

    Returns:
      The exit code: 0, 1 after an error, or 130 if Ctrl-C ended the only answer.
    """
    client = AsyncClient(address, credentials)
    conversation = _Conversation(client, system, sampling or SamplingParams())
    # The runner turns Ctrl-C into a cancellation of what it runs, and the loop lives on.
    with asyncio.Runner() as runner:
        runner.run(conversation.connect())
        try:
            if message is None:
                return _converse(runner, conversation)
            return _say(runner, conversation, message)
        finally:
            runner.run(conversation.close())


def _say(runner: asyncio.Runner, conversation: _Conversation, message: str) -> int:
    """Say one thing and print the answer. Returns an exit code."""
    try:
        runner.run(conversation.say(message))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (ServiceError, InvalidRequest) as error:
        _complain(error)
        return EXIT_FAILED
    return 0


def _converse(runner: asyncio.Runner, conversation: _Conversation) -> int:
    """Read and answer until the input ends. Errors and Ctrl-C end an answer only."""
    try:
        _note(f"{runner.run(conversation.model_name())}. {_HELP}")
    except ServiceError as error:
        _complain(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing in input(); absent on Windows)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if line == "/new":
            conversation.forget()
        elif line:
            _say(runner, conversation, line)


class _Conversation:
    """The messages so far, and the server that answers them."""

    def __init__(self, client: AsyncClient, system: str | None, sampling: SamplingParams):
        self._client = client
        self._system = system
        self._sampling = sampling
        self._messages: list[dict[str, str]] = []
        self.forget()

    def forget(self) -> None:
        """Start over with the system message alone."""
        self._messages = [] if self._system is None else [_message("system", self._system)]

    async def connect(self) -> None:
        await self._client.__aenter__()

    async def close(self) -> None:
        await self._client.__aexit__()

    async def model_name(self) -> str:
        return (await self._client.model_info()).name

    async def say(self, text: str) -> None:
        """Print the answer to `text` as it comes, and remember both.

        What was said before an interruption stays in the conversation, for the user has read
        it. A turn without an answer is forgotten, so that an error doesn't repeat itself.
        """
        turn = [*self._messages, _message("user", text)]
        answer = ""
        stream = self._client.generate(turn, self._sampling)
        try:
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    answer += delta.text
                    _print_part(delta.text)
                    if delta.finish_reason is FinishReason.ABORT:
                        _note("\nthe answer was aborted")
        except asyncio.CancelledError:
            if not answer:
                _note("")  # the terminal's line holds its ^C
            raise
        finally:
            if answer:
                print(flush=True)
                self._messages = [*turn, _message("assistant", answer)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _print_part(text: str) -> None:
    sys.stdout.write(_shown(text, sys.stdout))
    sys.stdout.flush()


def _note(text: str) -> None:
    print(_shown(text, sys.stderr), file=sys.stderr, flush=True)


def _shown(text: str, stream: TextIO) -> str:
    """The text as the stream may have it: a terminal gets no control characters."""
    return _CONTROLS.sub("", text) if stream.isatty() else text


def _complain(error: Exception) -> None:
    details = error.details if isinstance(error, ServiceError) else str(error)
    _note(f"octavo: {details}")
