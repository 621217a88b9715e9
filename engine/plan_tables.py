"""A memory plan as tables for a terminal.

Numbers come from `memory_plan`; this file only words and aligns them.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from engine.memory_plan import MemoryPlan, format_bytes


def render(plan: MemoryPlan) -> Group:
    """The plan as a rich renderable: print it with `rich.print` or a Console."""
    where = "the config's pool" if plan.hbm is None else f"what fits in {format_bytes(plan.hbm)}"
    parts: list[RenderableType] = [
        _title(plan),
        Text("\nmemory of one chip", style="italic"),
        _memory(plan),
        Text(
            f"\n{where}: {plan.num_blocks:,} blocks, {plan.num_tokens:,} tokens; "
            "sequences that it holds at once",
            style="italic",
        ),
        _sequences(plan),
        Text(
            f"contiguous reserves max_model_len ({plan.max_model_len:,} tokens) a sequence; "
            f"the scheduler runs at most {plan.max_num_seqs:,} at once",
            style="dim",
        ),
    ]
    parts += [Text(f"does not fit: {problem}", style="bold red") for problem in plan.problems]
    if plan.hbm is not None and plan.fits:
        parts.append(Text(_verdict(plan), style="green"))
    return Group(*parts)


def _title(plan: MemoryPlan) -> Text:
    chips = plan.data * plan.tensor
    mesh = f"{plan.data} x {plan.tensor} chips" if plan.data > 1 else f"{chips} chip"
    if plan.data == 1 and chips > 1:
        mesh += "s"
    held = "" if plan.quantization == "none" else f", matrices in {plan.quantization}"
    return Text(
        f"{plan.model}: {plan.num_parameters:,} parameters in {plan.dtype}{held}, "
        f"cache in {plan.cache_dtype}, attention {plan.attention}, {mesh}",
        style="bold",
    )


def _memory(plan: MemoryPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("note", style="dim", overflow="fold")

    def row(what: str, count: int, note: str = "") -> None:
        table.add_row(what, format_bytes(count), f"{count:,}", note)

    row("weights", plan.weight_bytes_per_chip, f"{format_bytes(plan.weight_bytes)} in all")
    row("sampler state", plan.sampler_bytes_per_chip, f"{plan.max_num_seqs} slots and a sink")
    if plan.hbm is not None and plan.available_bytes_per_chip is not None:
        share = plan.headroom_bytes_per_chip / plan.hbm
        row("headroom", plan.headroom_bytes_per_chip, f"{share:.0%}: activations, programs")
        row("left for the cache", plan.available_bytes_per_chip, f"of {format_bytes(plan.hbm)}")
    note = f"{format_bytes(plan.kv_bytes_per_token)} in the model"
    if plan.kv_copies > 1:
        note += f", each KV head on {plan.kv_copies} chips"
    if plan.cache_width != plan.head_dim:
        note += f", heads padded from {plan.head_dim} to {plan.cache_width}"
    row("KV of a token", plan.kv_bytes_per_token_per_chip, note)
    row("block", plan.block_bytes_per_chip, f"{plan.block_size} tokens")
    row("pool, as configured", plan.config_pool_bytes_per_chip, f"{plan.config_blocks:,} blocks")
    return table


def _sequences(plan: MemoryPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("tokens a sequence", "blocks", "paged", "contiguous", "gain"):
        table.add_column(heading, justify="right")
    for fit in plan.lengths:
        table.add_row(
            f"{fit.length:,}",
            f"{fit.blocks:,}",
            f"{fit.paged:,}",
            f"{fit.contiguous:,}",
            _gain(fit.paged, fit.contiguous),
        )
    table.add_row(
        f"{plan.mean_length:,} on average",
        "",
        f"{plan.paged_at_mean:,}",
        f"{plan.contiguous_at_mean:,}",
        _gain(plan.paged_at_mean, plan.contiguous_at_mean),
    )
    return table


def _gain(paged: int, contiguous: int) -> str:
    return f"{paged / contiguous:.1f}x" if contiguous else "-"


def _verdict(plan: MemoryPlan) -> str:
    spare = (plan.available_bytes_per_chip or 0) - plan.config_pool_bytes_per_chip
    return (
        f"the config's pool of {plan.config_blocks:,} blocks fits and leaves "
        f"{format_bytes(spare)} a chip"
    )
