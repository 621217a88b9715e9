"""The command line of `octavo leakcheck`."""

from __future__ import annotations

from engine.leakcheck import command
from engine.leakcheck.options import Options
from engine.progress import ProgressBar

_DEFAULTS = Options()


def leakcheck(options: Options = _DEFAULTS, *, json: bool = False) -> int:
    """Attack a server of yours: can one tenant learn what another one has sent?

    Args:
      json: print JSON instead of tables.
    """
    with ProgressBar() as progress:
        return command.leakcheck(
            options, progress, lambda report: command.show_report(report, json=json)
        )
