"""The figures as a rich table, in a width that any terminal has."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from engine.top.figures import Figures, Latency

_BAR = 60  # cells
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def render(figures: Figures, title: str) -> Group:
    """The table of a server, under a line that says which."""
    parts: list[RenderableType] = [
        Text(f"{title} · up {_duration(figures.uptime_seconds)}", style="bold"),
        "",
        _work(figures),
        "",
        _pool(figures),
        "",
        _latencies(figures),
    ]
    if alarms := _alarms(figures):
        parts += ["", Text(", ".join(alarms), style="bold red")]
    return Group(*parts)


def _work(figures: Figures) -> Table:
    held = max(figures.held.items(), key=lambda item: item[1], default=("-", 0.0))
    columns = (
        {
            "running": f"{figures.running:,}",
            "waiting": f"{figures.waiting:,}",
            "held by": f"{held[0]} {held[1]:.0%}" if held[1] else "-",
            "steps/s": f"{figures.steps_per_second:,.1f}",
        },
        {
            "tokens/s": f"{figures.generated_tokens_per_second:,.1f}",
            "prompt tokens/s": f"{figures.prompt_tokens_per_second:,.1f}",
            "answers/s": f"{figures.answers_per_second:,.2f}",
            "answers": f"{sum(figures.finished.values()):,}",
        },
        {
            "cache hits": _percent(figures.hit_share),
            "padding": _percent(figures.padding_share),
            "preemptions/s": f"{figures.preemptions:,.2f}",
            "swapped blocks/s": f"{figures.swapped_out_blocks + figures.swapped_in_blocks:,.1f}",
        },
    )
    table = Table.grid(padding=(0, 2))
    for _ in columns:
        table.add_column()
        table.add_column(justify="right", min_width=8)
    for row in zip(*(column.items() for column in columns), strict=True):
        table.add_row(*(text for item in row for text in item))
    return table


def _pool(figures: Figures) -> Group:
    total = max(1, figures.total_blocks)
    owned = round(_BAR * figures.owned_blocks / total)
    cached = min(_BAR - owned, round(_BAR * figures.cached_blocks / total))
    bar = Text("pool  ")
    bar.append("█" * owned, "green")
    bar.append("▒" * cached, "yellow")
    bar.append("·" * (_BAR - owned - cached), "dim")
    said = (
        f"      {figures.owned_blocks:,} owned (█), {figures.cached_blocks:,} cached (▒), "
        f"{figures.free_blocks:,} free, of {figures.total_blocks:,} blocks"
    )
    lines: list[RenderableType] = [bar, said]
    if figures.total_host_blocks:
        lines.append(
            f"      host tier: {figures.host_blocks:,} of {figures.total_host_blocks:,} blocks; "
            f"disk tier: {_size(figures.disk_bytes)}, {figures.restored_blocks:,.1f} blocks/s read"
        )
    return Group(*lines)


def _latencies(figures: Figures) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(f"ms, last {figures.seconds:,.0f} s")
    for column in ("mean", "p50", "p90", "p99"):
        table.add_column(column, justify="right", min_width=9)
    for name, latency in (
        ("time to first token", figures.time_to_first_token),
        ("between tokens", figures.inter_token_latency),
        ("in the queue", figures.queue_time),
    ):
        table.add_row(name, *_milliseconds(latency))
    return table


def _milliseconds(latency: Latency | None) -> tuple[str, ...]:
    if latency is None:
        return ("-",) * 4
    values = (latency.mean, latency.p50, latency.p90, latency.p99)
    return tuple(f"{1e3 * value:,.1f}" for value in values)


def _alarms(figures: Figures) -> list[str]:
    counts = {
        "steps failed": figures.failed_steps,
        "programs compiled after warm-up": figures.compiles_after_warmup,
        "answers ended with an error": figures.finished.get("error", 0),
    }
    return [f"{count:,} {name}" for name, count in counts.items() if count]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _size(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:,.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} {_UNITS[-1]}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s"))
    shown = [f"{number} {unit}" for number, unit in parts if number]
    return " ".join(shown[:2]) or "0 s"
