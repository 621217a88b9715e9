"""Log lines for people or for machines, each with the request that it belongs to.

Whatever a client sent can't start a line of its own: in text, what follows a line break is indented
and control characters are written out; in JSON a line is one object.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
import traceback
from typing import TYPE_CHECKING, Literal

from engine.observe.calls import current_call

if TYPE_CHECKING:
    from engine.observe.requests import RequestRecord

LogFormat = Literal["text", "json"]

requests_log = logging.getLogger("octavo.requests")

_CONTINUED = "  | "
# Control characters but for tab and line feed, and what some terminals break lines at.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def configure(level: str, form: LogFormat = "text") -> None:
    """Have everything from a level on written to standard error, in place of an earlier form.

    Args:
      level: a name of `logging`, in any case.
      form: how.

    Raises:
      ValueError: there is no such level.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class TextFormatter(logging.Formatter):
    """A line for people; what doesn't fit into one is indented below it."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line, with the request's name at its end if it has one and doesn't say so."""
        text = super().format(record)
        call = current_call.get()
        if call is not None and call.request_id is not None and call.request_id not in text:
            first, newline, rest = text.partition("\n")
            text = f"{first} (request {call.request_id}){newline}{rest}"
        return _CONTROLS.sub(_written_out, text).replace("\n", f"\n{_CONTINUED}")


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, message, and request_id, tenant and error if there
    are any; x_request_id, if the call has another one than its request; the line of a finished
    request has its figures too."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        call = current_call.get()
        if call is not None and call.request_id is not None:
            line["request_id"] = call.request_id
        if call is not None and call.tenant is not None:
            line["tenant"] = call.tenant
        if call is not None and call.given not in (None, call.request_id):
            line["x_request_id"] = call.given
        line |= getattr(record, "figures", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _written_out(match: re.Match[str]) -> str:
    return repr(match.group())[1:-1]


def without_message(error: BaseException) -> str:
    """Where an error came from and its class, without its message: that may quote a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    kind = type(error)
    return f"{frames}{kind.__module__}.{kind.__qualname__}"


def log_request(record: RequestRecord) -> None:
    """One line for a request that has ended, at INFO: names, counts and times."""
    if not requests_log.isEnabledFor(logging.INFO):
        return
    answers = record.answers
    tokens = sum(answer.completion_tokens for answer in answers)
    firsts = [answer.first_token for answer in answers if answer.first_token is not None]
    queued = max((answer.queued for answer in answers if answer.queued is not None), default=None)
    reasons = sorted({str(answer.finish_reason) for answer in answers})
    outcome = record.refusal or ", ".join(reasons) or "left"
    figures: dict[str, object] = {
        "request_id": record.request_id,
        "tenant": record.tenant,
        "outcome": outcome,
        "answers": len(answers),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": tokens,
        "queue_seconds": _rounded(queued),
        "first_token_seconds": _rounded(min(firsts, default=None)),
        "seconds": _rounded(record.seconds),
    }
    requests_log.info(
        "request %s of %s: %s; %d prompt tokens, %d of them cached, %d generated; "
        "%s s in the queue, %s s to the first token, %s s in all",
        record.request_id,
        record.tenant,
        outcome,
        record.prompt_tokens,
        record.cached_tokens,
        tokens,
        *("-" if seconds is None else seconds for seconds in list(figures.values())[-3:]),
        extra={"figures": figures},
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
