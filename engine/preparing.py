"""The time before a request reaches the step loop: it is read, beside the streams if that takes
long, and whoever waits for it can leave, abort it, or run out of time meanwhile.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable

from engine.fair_threads import FairThreads
from engine.sampling import Constraint
from engine.streams import Stream
from engine.text import Grammars
from engine.types import Domain, FinishReason, Request

# Of one tenant that no trial has seen yet. Each may take two seconds of a processor.
MAX_NEW_GRAMMARS = 128


class Readers:
    """Reads requests. Everything but `close` runs on the requests' event loops.

    Args:
      grammars: the model's.
      max_texts: of one tenant that may be read, or wait for that, at once.
    """

    def __init__(self, grammars: Grammars, max_texts: int):
        self._grammars = grammars
        self._texts = FairThreads("long texts", 3, max_texts)
        # Of their own, as chats and grammars that are known wait for none that is not.
        self._new_grammars = FairThreads("new grammars", 2, MAX_NEW_GRAMMARS)

    async def read(
        self,
        stream: Stream,
        resolve: Callable[[], Request],
        constraint: Constraint | None,
        domain: Domain,
        deadline: float | None,
    ) -> Request | FinishReason:
        """Resolve a request beside the event loop.

        Args:
          stream: where its answer will come; `Stream.stop_reading` ends it here.
          resolve: what is to be done for it, on any thread.
          constraint, domain: the request's.
          deadline: time.monotonic() seconds, or None.

        Returns:
          The request; or why it ended before it was read: it was aborted, or its time was up.

        Raises:
          InvalidRequest, QueueFull, EngineStopped: as `resolve` and `FairThreads.do`.
        """
        stream.reading = asyncio.ensure_future(self._resolve(resolve, constraint, domain))
        stream.reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        if stream.is_aborted:
            stream.reading.cancel()
        limit = asyncio.timeout(None if deadline is None else deadline - time.monotonic())
        try:
            async with limit:
                return await stream.reading
        except TimeoutError:
            if not limit.expired():
                raise
            return FinishReason.DEADLINE
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if stream.is_aborted and (task is None or not task.cancelling()):
                return FinishReason.ABORT
            raise
        finally:
            stream.reading = None

    async def _resolve(
        self, resolve: Callable[[], Request], constraint: Constraint | None, domain: Domain
    ) -> Request:
        if constraint is not None and not self._grammars.knows(constraint, domain):
            trial = functools.partial(self._grammars.try_out, constraint, domain)
            # One trial is for all that wait for the same grammar.
            await self._new_grammars.do(domain.tenant, trial, key=(domain.salt, constraint))
        return await self._texts.do(domain.tenant, resolve)

    def close(self) -> None:
        """Begin nothing any more: whoever waits gets EngineStopped."""
        self._texts.close()
        self._new_grammars.close()
