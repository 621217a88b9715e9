"""Traces of the device and of Python, by ``jax.profiler``, into the folder that the operator chose.

Nobody else says where files are written: an RPC that takes a path would be one that fills disks.
"""

from __future__ import annotations

import threading
from typing import Any

import grpc
from smg_grpc_proto.generated import common_pb2

from engine.sampling import InvalidRequest
from engine.serve.errors import Refused

# What every trace has: there is no choosing of one.
ACTIVITIES = frozenset(("CPU", "GPU"))
REFUSED = {
    "start_step": "is not served; a trace begins at once",
    "num_steps": "is not served; a trace ends with StopProfile",
    "record_shapes": "is not served; the compiled programs in a trace name their shapes",
    "profile_by_stage": "is not served; prefill and decode share a step",
}
SERVED = frozenset(("output_dir", "activities", "with_stack"))


class Profiler:
    """One trace at a time. Its methods take long: call them on a thread.

    Args:
      folder: where traces go; None: there are none.
    """

    def __init__(self, folder: str | None):
        self._folder = folder
        self._lock = threading.Lock()
        self._is_running = False

    def check(self, request: common_pb2.StartProfileRequest) -> None:
        """Refuse what can't be done.

        Raises:
          Refused: FAILED_PRECONDITION; no folder is configured.
          InvalidRequest: a field asks for what is not served.
        """
        if self._folder is None:
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                "this server has no folder for traces; start it with --set "
                "server.profile_dir=FOLDER",
            )
        for field, value in request.ListFields():
            if (reason := REFUSED.get(field.name)) is not None and (value or not _is_flag(field)):
                raise InvalidRequest(field.name, reason)
        if request.output_dir and request.output_dir != self._folder:
            raise InvalidRequest(
                "output_dir", "is the operator's to choose (server.profile_dir); leave it out"
            )
        if request.activities and set(request.activities) != ACTIVITIES:
            raise InvalidRequest(
                "activities", "a trace has both CPU and GPU (the device); leave it out"
            )

    def start(self, request: common_pb2.StartProfileRequest) -> common_pb2.ProfileResponse:
        """Begin a trace that `check` has let pass."""
        import jax

        with self._lock:
            if self._is_running:
                return common_pb2.ProfileResponse(success=False, message="a trace is running")
            options = jax.profiler.ProfileOptions()
            if request.HasField("with_stack"):
                options.python_tracer_level = int(request.with_stack)
            try:
                jax.profiler.start_trace(str(self._folder), profiler_options=options)
            except Exception as error:
                return _failed("begin", error)
            self._is_running = True
        return common_pb2.ProfileResponse(success=True, message=f"a trace goes to {self._folder}")

    def stop(self) -> common_pb2.ProfileResponse:
        """End the trace, and write it."""
        import jax

        with self._lock:
            if not self._is_running:
                return common_pb2.ProfileResponse(success=False, message="no trace is running")
            self._is_running = False
            try:
                jax.profiler.stop_trace()
            except Exception as error:
                return _failed("be written", error)
        return common_pb2.ProfileResponse(success=True, message=f"the trace is in {self._folder}")


def _is_flag(field: Any) -> bool:
    return field.cpp_type == field.CPPTYPE_BOOL


def _failed(what: str, error: Exception) -> common_pb2.ProfileResponse:
    return common_pb2.ProfileResponse(success=False, message=f"the trace can't {what}: {error}")
