"""What a check found, as JSON for machines and as a table for people.

Names of figures and models are a server's own words: they are printed without control
characters and without markup.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from engine.leakcheck.channels import DESCRIPTIONS
from engine.leakcheck.verdicts import Finding, Measured, Verdict

SCHEMA = 1  # of the JSON; goes up when a field changes its meaning or goes away

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_STYLES = {
    Verdict.LEAK: "bold red",
    Verdict.NO_LEAK: "green",
    Verdict.CONTROL_WORKS: "green",
    Verdict.ABSENT: "green",
    Verdict.BLIND: "yellow",
    Verdict.NOT_MEASURABLE: "dim",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that one needs to judge or repeat a check.

    Attributes:
      date: UTC, ISO 8601.
      server: which model and server answered, in its own words.
      modes: `cross` is the attack, `same` the control.
      trials: pairs of a positive and a negative probe, for each channel and mode.
      seed: of the order of probes and of the statistics; prompts are always new.
      notes: what to keep in mind.
    """

    schema: int
    date: str
    version: str
    address: str
    server: str
    modes: tuple[str, ...]
    trials: int
    prompt_tokens: int
    burst: int
    alpha: float
    seed: int
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]
    summary: str
    exit_code: int

    def as_json(self) -> str:
        """Indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()


def summarise(findings: Sequence[Finding]) -> str:
    """One line: the leaks first, for they are what matters."""
    parts = []
    for verdict in (
        Verdict.LEAK,
        Verdict.BLIND,
        Verdict.NO_LEAK,
        Verdict.CONTROL_WORKS,
        Verdict.ABSENT,
        Verdict.NOT_MEASURABLE,
    ):
        names = [finding.channel.value for finding in findings if finding.verdict is verdict]
        if names:
            parts.append(f"{verdict.value}: {', '.join(names)}")
    return "; ".join(parts)


def render(report: Report) -> Group:
    """The report as a rich renderable; the summary is its last line."""
    table = Table(box=None, pad_edge=False)
    table.add_column("channel", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for mode in ("across tenants", "within one"):
        table.add_column(f"AUC {mode}", max_width=16)
        table.add_column("p", justify="right", no_wrap=True)
    for finding in report.findings:
        cross, same = finding.cross, finding.same
        table.add_row(
            finding.channel.value,
            Text(finding.verdict.value, style=_STYLES[finding.verdict]),
            _area(cross),
            "" if cross is None else _p_value(cross.corrected_p_value),
            _area(same),
            "" if same is None else _p_value(same.p_value),
        )
    parts: list[RenderableType] = [
        Text(f"{_clean(report.server)}: {report.address}", style="bold"),
        Text(
            f"{report.trials} pairs of probes a channel, prompts of {report.prompt_tokens} tokens, "
            f"alpha {report.alpha:g} over all channels, seed {report.seed}\n",
            style="dim",
        ),
        table,
        Text(),
    ]
    for finding in report.findings:
        parts.append(Text(f"{finding.channel.value}: {DESCRIPTIONS[finding.channel]}"))
        parts.append(Text(f"    {finding.verdict.value}: {_clean(finding.reason)}", style="dim"))
        for title, measured in (("across tenants", finding.cross), ("within one", finding.same)):
            if measured is not None:
                parts.append(Text(f"    {title}: {_medians(measured)}", style="dim"))
    parts += [Text(f"note: {_clean(note)}", style="yellow") for note in report.notes]
    parts.append(Text(report.summary, style="bold"))
    return Group(*parts)


def _area(measured: Measured | None) -> str:
    if measured is None:
        return "-"
    return f"{measured.auc:.2f} ({measured.low:.2f}-{measured.high:.2f})"


def _p_value(p_value: float | None) -> str:
    if p_value is None:
        return ""
    return f"{p_value:.2f}" if p_value >= 0.1 else f"{p_value:.1g}"


def _medians(measured: Measured) -> str:
    others = measured.num_figures - 1
    chosen = f", the most telling of {others + 1} figures" if others else ""
    return (
        f"{_clean(measured.figure)} is {measured.cached_median:.4g} if sent before, "
        f"{measured.fresh_median:.4g} if not (medians{chosen})"
    )


def _clean(text: str) -> str:
    return _CONTROLS.sub("", text)
