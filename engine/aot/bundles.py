"""Reads the TPU compiler's final schedule of one kernel: its loops, and what one token costs.

A VLIW core issues a bundle of operations at a time, so a loop's bundles are a lower bound on
its cycles. They show no DMA latency, no stall and no clock: they gate regressions of one kernel
on one target and are never a time.

The listing (`*-final_bundles.txt`, see `engine.aot.schedule`) has one bundle a line: address,
label, loop depth as `>` marks, and its operations in braces.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator
from pathlib import Path

_BUNDLE = re.compile(
    r"^\s*(?P<address>0x[0-9a-f]+|0)\s+(?:(?P<label>LB|LH|LE|PB|PF|CT): *|: *)(?P<depth>>*) *\{"
    r"(?P<empty>\})?"
)
_FETCH = re.compile(r"= dma\.hbm_to_vmem .*?/\*size_in_granules=\*/(\d+)")
_WAIT = re.compile(r"= dma\.done\.wait [^,]+, (\d+)")
_MATMUL = re.compile(r"\bvmatmul\b|\bvmatmul\.")
_LOAD = re.compile(r"= vld\b")
_SPILL = re.compile(r"_spill\]")
_REGISTER_BYTES = 8 * 128 * 4  # what a vector load brings at most
_GRANULE_BYTES = 32  # the unit of the listing's DMA sizes on v5e and later


@dataclasses.dataclass
class Loop:
    """A loop of the schedule; the root is the straight-line code around all loops.

    Attributes:
      address: of the body's first bundle, as the listing writes it.
      bundles: of one iteration, without the loops inside.
      matmuls: matrix products issued, without the loops inside.
      loads: of vector registers, without the loops inside.
      spills: loads and stores of spilled registers, without the loops inside.
      fetches: bytes of each DMA from HBM to VMEM issued, without the loops inside.
      waits: bytes that each wait for copies is for, without the loops inside.
      children: the loops directly inside.
    """

    address: str
    depth: int
    bundles: int = 0
    matmuls: int = 0
    loads: int = 0
    spills: int = 0
    fetches: list[int] = dataclasses.field(default_factory=list)
    waits: list[int] = dataclasses.field(default_factory=list)
    children: list[Loop] = dataclasses.field(default_factory=list)

    def __iter__(self) -> Iterator[Loop]:
        """This loop and all inside it, in the order of the listing."""
        yield self
        for child in self.children:
            yield from child

    @property
    def has_matmuls(self) -> bool:
        """Whether it or a loop inside multiplies matrices."""
        return any(loop.matmuls for loop in self)

    @property
    def has_fetches(self) -> bool:
        """Whether it or a loop inside copies from HBM."""
        return any(loop.fetches for loop in self)


class ScheduleError(ValueError):
    """A schedule in which the parts of an attention kernel can't be told apart."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenCost:
    """Bundles that one token of context costs in the steady state of a decode.

    Attributes:
      attend: the loop that multiplies without a mask, by the tokens of one iteration.
      issue: the loop that starts the copies of pages, by the tokens that they bring.
      wait: the loop that waits for them, likewise.
      block: what the loop over fetched blocks does beside those, by a block's tokens. All of it
        counts, also what is predicated.
      spills: of registers, in the loop that multiplies.
    """

    attend: float
    issue: float
    wait: float
    block: float
    spills: int

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return self.attend + self.issue + self.wait + self.block


def parse(listing: str) -> Loop:
    """The loop tree of one kernel's final bundles.

    Raises:
      ScheduleError: the text has no bundles.
    """
    root = current = Loop("0", 0)
    parents: dict[int, Loop] = {}
    target = root  # of the operations on lines that continue a bundle
    for line in listing.splitlines():
        match = _BUNDLE.match(line)
        if match:
            depth = len(match["depth"])
            if not match["empty"]:  # empty bundles are printed without depth marks
                while current.depth > depth:
                    current = parents[id(current)]
            if match["label"] == "LB":
                while current.depth >= depth and current is not root:
                    current = parents[id(current)]
                loop = Loop(match["address"], depth)
                parents[id(loop)] = current
                current.children.append(loop)
                current = loop
            current.bundles += 1
            target = current
        target.matmuls += len(_MATMUL.findall(line))
        target.loads += len(_LOAD.findall(line))
        target.spills += len(_SPILL.findall(line))
        target.waits += [int(size) * _GRANULE_BYTES for size in _WAIT.findall(line)]
        target.fetches += [int(size) * _GRANULE_BYTES for size in _FETCH.findall(line)]
    if not any(loop.bundles for loop in root):
        raise ScheduleError("this is no listing of final bundles; its form may have changed")
    return root


def token_cost(
    root: Loop, *, token_bytes: int, block_tokens: int, chunk_tokens: int, head_steps: int = 1
) -> TokenCost:
    """Divide the work of a paged decode kernel's inner loops by the tokens that it handles.

    The loop over fetched blocks is the innermost one that both multiplies and copies from HBM.
    Inside it are a loop that starts the copies of pages, one that waits for them, and loops that
    multiply, one for chunks that need no mask; a kernel that unrolls one of them has its bundles
    in the block loop itself, where they are counted as the block's. So is everything of a kernel
    that unrolls all, such as JAX's `ragged_paged_attention`.

    Args:
      root: from `parse`.
      token_bytes: keys and values of one token, of all KV heads.
      block_tokens: tokens of one iteration of the loop over fetched blocks.
      chunk_tokens: tokens of one iteration of the loop that multiplies.
      head_steps: iterations of a loop over heads within that loop.

    Raises:
      ScheduleError: no loop both multiplies and copies, or the one that multiplies can't have
        handled so many tokens.
    """
    blocks = [loop for loop in root if loop.has_matmuls and loop.has_fetches]
    if not blocks or blocks[-1] is root:
        raise ScheduleError("no loop of the schedule both multiplies and copies pages")
    block = blocks[-1]  # the others enclose it
    # What a split loop leaves over goes page by page, masked chunks end a sequence, and written
    # tiles are waited for once a sequence: none of them is the steady state.
    issuing = [loop for loop in block.children if loop.has_fetches]
    waiting = [loop for loop in block.children if loop.waits and not loop.has_fetches]
    attending = [loop for loop in block.children if loop.has_matmuls]
    issue, wait, attend, spills = 0.0, 0.0, 0.0, block.spills
    if issuing:
        loop = max(issuing, key=lambda loop: sum(loop.fetches))
        issue = loop.bundles * token_bytes / sum(loop.fetches)
    if waiting:
        loop = max(waiting, key=lambda loop: sum(loop.waits))
        wait = loop.bundles * token_bytes / sum(loop.waits)
    if attending:

        def count(loop: Loop, what: str) -> int:
            return _per_iteration(loop, what, head_steps)

        loop = min(attending, key=lambda loop: count(loop, "bundles") / count(loop, "matmuls"))
        loads = count(loop, "loads")
        if loads * _REGISTER_BYTES < chunk_tokens * token_bytes:
            raise ScheduleError(
                f"the loop at {loop.address} loads {loads} registers an iteration, too few for "
                f"{chunk_tokens} tokens of {token_bytes} bytes; chunk_tokens or head_steps is wrong"
            )
        attend = count(loop, "bundles") / chunk_tokens
        spills = sum(inner.spills for inner in loop)
    return TokenCost(
        attend=attend, issue=issue, wait=wait, block=block.bundles / block_tokens, spills=spills
    )


def _per_iteration(loop: Loop, what: str, head_steps: int) -> int:
    """A count of one iteration, where the loops inside run `head_steps` times."""
    inside = sum(_per_iteration(child, what, 1) for child in loop.children)
    return getattr(loop, what) + head_steps * inside


def show(root: Loop, indent: int = 0) -> str:
    """The loop tree, one line a loop."""
    name = f"loop {root.address}" if root.depth else "straight line"
    parts = [f"{root.bundles} bundles"]
    for count, what in ((root.matmuls, "matmuls"), (root.spills, "spills")):
        if count:
            parts.append(f"{count} {what}")
    if root.fetches:
        parts.append(f"{len(root.fetches)} fetches of {sum(root.fetches)} bytes")
    line = f"{'  ' * indent}{name}: {', '.join(parts)}"
    return "\n".join([line, *(show(child, indent + 1) for child in root.children)])


def kernel_listing(folder: Path, kernel: str, but: Collection[Path] = ()) -> str:
    """The listing of a kernel, by a part of its name, from a folder of dumps.

    Args:
      but: files that were there before the compile.

    Raises:
      ScheduleError: there is none, or more than one.
    """
    files = [
        path
        for path in set(folder.glob("*-final_bundles.txt")) - set(but)
        if kernel in path.name and "schedule-analysis" not in path.name
    ]
    if len(files) != 1:
        names = ", ".join(sorted(path.name for path in files)) or "none"
        raise ScheduleError(f"expected one listing of kernel {kernel!r}, found {names}")
    return files[0].read_text(errors="replace")
