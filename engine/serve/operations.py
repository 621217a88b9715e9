"""The calls of ``octavo.v1.Operations``: what operators ask of a running server."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from engine.config import ConfigError
from engine.life import Resumed
from engine.rpc.octavo.v1 import operations_pb2 as pb
from engine.serve import convert
from engine.serve.access import Access, Caller
from engine.serve.calls import Calls
from engine.serve.errors import Refused

if TYPE_CHECKING:
    from engine.frontend import Engine

log = logging.getLogger("octavo.serve")

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["Operations"].full_name


class OperationsService:
    """Serves the calls, as `GenerationService` does.

    Args:
      calls: what it shares with the front ends. Reload counts as a call.
      access: tells operators from others.
    """

    def __init__(self, calls: Calls, access: Access):
        self._calls = calls
        self._access = access

    async def Pause(
        self, request: pb.PauseRequest, context: grpc.aio.ServicerContext
    ) -> pb.PauseResponse:
        convert.refuse_unknown_fields(request)
        caller = self._operator(context, "a pause")
        try:
            await self._calls.engine().life.pause()
        except Resumed as error:
            raise Refused(grpc.StatusCode.ABORTED, str(error)) from error
        log.warning("paused by %s", _name(caller))
        return pb.PauseResponse()

    async def Resume(
        self, request: pb.ResumeRequest, context: grpc.aio.ServicerContext
    ) -> pb.ResumeResponse:
        convert.refuse_unknown_fields(request)
        caller = self._operator(context, "the end of a pause")
        await self._calls.engine().life.resume()
        log.warning("resumed by %s", _name(caller))
        return pb.ResumeResponse()

    async def Reload(
        self, request: pb.ReloadRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReloadResponse:
        convert.refuse_unknown_fields(request)
        caller = self._operator(context, "a reload")
        engine = self._calls.engine()
        with self._calls.call(caller):
            # Not counted once its caller has left: there is one at a time anyway.
            work = asyncio.ensure_future(_reload(engine, caller))
            work.add_done_callback(lambda work: work.cancelled() or work.exception())
            if not await self._calls.ends_before_shutdown(work):
                raise Refused(
                    grpc.StatusCode.UNAVAILABLE,
                    "the server is shutting down, and does not wait for other weights; its next "
                    "start reads them",
                )
        return work.result()

    def _operator(self, context: grpc.aio.ServicerContext, what: str) -> Caller:
        caller = self._access.caller(context)
        caller.check_operator(what)
        return caller


async def _reload(engine: Engine, caller: Caller) -> pb.ReloadResponse:
    """Exchange the weights, and log what came of it: its caller may not be there to hear."""
    try:
        changed = await engine.reload()
    except Exception as error:
        log.error("the weights were not reloaded for %s: %s", _name(caller), error)
        if not isinstance(
            error, ConfigError | ValueError | OSError
        ):  # WeightsError is a ValueError
            raise
        raise Refused(
            grpc.StatusCode.FAILED_PRECONDITION, f"the weights are served as before: {error}"
        ) from error
    fingerprint = engine.model_info().weights_fingerprint
    what = fingerprint if changed else "no change"
    log.warning("weights reloaded by %s: %s", _name(caller), what)
    return pb.ReloadResponse(changed=changed, weights_fingerprint=fingerprint)


def _name(caller: Caller) -> str:
    """An operator's name in the log."""
    return f"tenant {caller.tenant}" if caller.is_authenticated else "an operator"
