"""Has grammars tried out in processes of their own, which may crash, hang and take memory.

A process is started when it is first needed, in some tenths of a second, and serves one grammar
after the other in about a millisecond each; the next one takes the place of one that was lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.sampling import Constraint, InvalidRequest

SCRIPT = Path(__file__).with_name("grammar_trial.py")
# A trial ends itself after seconds of processor time; this is for a machine that has none to give.
MAX_WAIT = 60.0
# How grammars end a process: no time left, no stack, no memory.
_BY_GRAMMARS = tuple(
    -number for number in (signal.SIGPROF, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)
)


class Trial(NamedTuple):
    """A grammar that passed.

    Attributes:
      lark: for llguidance.
      num_bytes: that it takes when compiled, about.
    """

    lark: str
    num_bytes: int


class NoAnswer(InvalidRequest):
    """A trial had no answer: it took too much. On a machine that is less busy it may have one."""


class Trials:
    """Tries out constraints. Any thread may call it.

    Args:
      tokens, special, eos: as `grammar_trial.make_tokenizer` takes them.

    Attributes:
      seconds: of processor time that a trial may take.
    """

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], eos: Sequence[int]):
        self.seconds = 2.0
        self._vocabulary = {
            "tokens": [token.decode("latin-1") for token in tokens],  # JSON has no bytes
            "special": special,
            "eos": eos,
        }
        self._is_closed = False
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
        self._at_work: set[_Process] = set()

    def try_out(self, constraint: Constraint) -> Trial:
        """A constraint as a grammar that can be compiled here without danger.

        Raises:
          InvalidRequest: it is no grammar; the message is the parser's.
          NoAnswer: it takes too much.
          RuntimeError: no process can be started, or the machine is too busy.
        """
        trial = dataclasses.asdict(constraint) | {"seconds": self.seconds}
        try:
            "".join((constraint.text, *constraint.choices)).encode()
        except UnicodeEncodeError:
            raise _refusal(constraint, "has half of a surrogate pair; repair it") from None
        try:
            process, is_new = self._idle.get_nowait(), False
        except queue.Empty:
            process, is_new = _Process(self._vocabulary), True
        self._at_work.add(process)
        try:
            answer = process.ask(trial)
        except BaseException:
            process.close()
            raise
        finally:
            self._at_work.discard(process)
        if answer is None:
            status = process.close(MAX_WAIT)  # it is about to end, but may have to wait for a core
            if self._is_closed:
                raise RuntimeError("the engine was closed before a grammar was compiled")
            if not is_new and status not in _BY_GRAMMARS:  # somebody killed it while it was idle
                return self.try_out(constraint)
            raise NoAnswer("constraint", f"{constraint.kind}: {_why_it_ended(status)}")
        self._idle.put(process)
        if self._is_closed:
            self.close()
        if "error" in answer:
            raise _refusal(constraint, answer["error"])
        return Trial(answer["lark"], answer["bytes"])

    def close(self) -> None:
        """End all processes. What is tried out later has one that ends with its trial."""
        self._is_closed = True
        for process in tuple(self._at_work):
            process.kill()
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()


def _refusal(constraint: Constraint, why: str) -> InvalidRequest:
    return InvalidRequest("constraint", f"{constraint.kind}: {why}")


def _why_it_ended(status: int) -> str:
    """Why a trial had no answer, for its client."""
    if status == -signal.SIGPROF:
        return "takes too long to compile; make it simpler"
    if status in (*_BY_GRAMMARS, -signal.SIGKILL):
        return "is nested too deeply, or too large when compiled; make it simpler"
    raise RuntimeError(f"the process that compiles grammars ended with status {status}")


class _Process:
    def __init__(self, vocabulary: Mapping[str, Any]):
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Nothing else of the environment, which may hold secrets.
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # an interrupt from the terminal is not for it
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        try:
            self._send(vocabulary)
        except BaseException:
            self.close()
            raise

    def ask(self, trial: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the process answers, or None if it ended."""
        self._send(trial)
        answer = bytearray()
        assert self._process.stdout is not None
        out = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(out, select.POLLIN)
        while not answer.endswith(b"\n"):
            if not poll.poll(1000 * MAX_WAIT):
                raise RuntimeError(f"a grammar was not compiled within {MAX_WAIT:g} seconds")
            if not (part := os.read(out, 2**16)):
                return None
            answer += part
        return json.loads(answer)

    def kill(self) -> None:
        """Have it end at once; whoever asks it gets no answer."""
        self._process.kill()

    def close(self, seconds: float = 1.0) -> int:
        """End the process, by force after so many seconds. Returns its exit status."""
        pipes = (self._process.stdin, self._process.stdout)
        for pipe in pipes:
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _send(self, message: Mapping[str, Any]) -> None:
        """Send it, or have it wait for at most `MAX_WAIT` seconds each time that its pipe is full.

        Raises:
          RuntimeError: it reads nothing.
        """
        assert self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLOUT)
        left = memoryview(json.dumps(message).encode() + b"\n")
        with contextlib.suppress(BrokenPipeError):  # it ended; `ask` finds no answer
            while left:
                if not poll.poll(1000 * MAX_WAIT):
                    raise RuntimeError(
                        f"the process that compiles grammars took nothing for {MAX_WAIT:g} seconds"
                    )
                left = left[os.write(pipe, left) :]
