"""The reader of schedules, on a listing in the compiler's form with loops of known cost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.aot import bundles
from engine.aot.bundles import Loop, ScheduleError

TOKEN_BYTES = 512  # one KV head of 128 in bfloat16: 16 granules
PAGE_GRANULES = 256  # 16 tokens

LOAD = "%v1 = vld [vmem:[%s1 + $0x8] sm:$0xff]"
MATMUL = "%v2 = vmatmul.bf16.gmra.mxu0 %v1"
FETCH = (
    "%3 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s2, "
    f"/*size_in_granules=*/{PAGE_GRANULES}, /*vmem=*/%s3, /*dst_syncflagno=*/%s4"
)
WRITE = "%4 = dma.vmem_to_hbm [thread:$0]  /*vmem=*/%s5, /*size_in_granules=*/64, /*hbm=*/%s6"
SPILL = "%5 = vst [vmem:[#allocation7_spill] sm:$0xff] %v1"
NOTHING = "%s1 = sadd.s32 1, %s2"


def loop(depth: int, *bundles_: str) -> list[tuple[str, int, str]]:
    """(label, depth, operations) of a loop's own bundles."""
    return [("LB" if index == 0 else "", depth, ops) for index, ops in enumerate(bundles_)]


def wait(granules: int) -> str:
    return f"%6 = dma.done.wait %s7, {granules}"


def listing(lines: list[tuple[str, int, str]]) -> str:
    def rows() -> Iterator[str]:
        yield "= control target key start\nLB: loop body\n= control target key end\n"
        for number, (label, depth, ops) in enumerate(lines):
            address = hex(number) if number else "0"
            marks = ">" * depth + (" " if depth else "")
            # The compiler prints an empty bundle without its depth.
            body = f"{marks}{{ {ops} }}" if ops else "{}"
            yield f"{address:>6} {label or ' ':2}: {body}"

    return "\n".join(rows())


def kernel(
    *, attend_bundles: int = 40, masked_bundles: int = 90, loads: int = 64, block_bundles: int = 20
) -> str:
    """Chunks of 512 tokens, fetches of 1024; pages of 16 tokens start four at a time."""
    attend = [LOAD] * loads + [MATMUL] * 8 + [SPILL] * 2
    attend = [" ;;  ".join(attend[i::attend_bundles]) or NOTHING for i in range(attend_bundles)]
    return listing(
        [
            *(("", 0, NOTHING) for _ in range(5)),
            *loop(1, *[NOTHING] * 7),
            *loop(2, FETCH, *[NOTHING] * (block_bundles - 2)),
            ("", 2, ""),
            *loop(3, WRITE, wait(64), NOTHING),  # written tiles
            *loop(3, FETCH, f"{FETCH} ;;  {FETCH}", NOTHING, FETCH),
            *loop(3, FETCH, NOTHING),  # what is left over
            *loop(3, NOTHING, wait(4 * PAGE_GRANULES)),
            *loop(3, wait(PAGE_GRANULES)),
            *loop(3, *attend),
            *loop(3, *[NOTHING] * 9),
            *loop(4, f"{LOAD} ;;  {MATMUL}", *[NOTHING] * (masked_bundles - 1)),
            ("", 0, NOTHING),
        ]
    )


def cost(text: str, **changes: int) -> bundles.TokenCost:
    sizes = {"token_bytes": TOKEN_BYTES, "block_tokens": 1024, "chunk_tokens": 512} | changes
    return bundles.token_cost(bundles.parse(text), **sizes)


def test_the_tree_has_each_loop_where_the_depth_marks_put_it() -> None:
    root = bundles.parse(kernel())
    [outer] = root.children
    [block] = outer.children
    assert (root.bundles, outer.bundles, block.bundles) == (6, 7, 20)
    assert [child.bundles for child in block.children] == [3, 4, 2, 2, 1, 40, 9]
    assert [child.depth for child in block.children] == [3] * 7
    assert [inner.bundles for inner in block.children[-1].children] == [90]
    assert block.children[1].fetches == [32 * PAGE_GRANULES] * 4


def test_operations_are_counted_where_they_are_also_on_continued_lines() -> None:
    head, tail = kernel().split(MATMUL, 1)
    attend = bundles.parse(f"{head}{MATMUL}\n    more of it {SPILL}{tail}")
    [attend] = [node for node in attend if node.matmuls == 8]
    assert (attend.loads, attend.spills) == (64, 3)


def test_a_token_costs_its_share_of_each_loop() -> None:
    found = cost(kernel())
    assert found.attend == 40 / 512
    assert found.issue == 4 / (4 * 16)
    assert found.wait == 2 / (4 * 16)
    assert found.block == 20 / 1024
    assert found.spills == 2
    assert found.total == pytest.approx(40 / 512 + 4 / 64 + 2 / 64 + 20 / 1024)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"attend_bundles": 60}, "attend"), ({"block_bundles": 60}, "block")],
    ids=["attend", "block"],
)
def test_a_longer_loop_costs_more(change: dict[str, int], field: str) -> None:
    assert getattr(cost(kernel(**change)), field) > getattr(cost(kernel()), field)


def test_a_loop_over_heads_inside_counts_as_often_as_it_runs() -> None:
    lines = [
        *loop(1, NOTHING),
        *loop(2, FETCH),
        *loop(2, *[NOTHING] * 10),
        *loop(3, " ;;  ".join([LOAD] * 16 + [MATMUL]), *[NOTHING] * 29),
    ]
    assert cost(listing(lines), head_steps=4).attend == (10 + 4 * 30) / 512


def test_a_kernel_that_unrolls_everything_is_one_loop() -> None:
    lines = [*loop(1, *[FETCH] * 8, wait(8 * PAGE_GRANULES), *[f"{LOAD} ;;  {MATMUL}"] * 91)]
    found = cost(listing(lines), block_tokens=128, chunk_tokens=128)
    assert found == bundles.TokenCost(attend=0, issue=0, wait=0, block=100 / 128, spills=0)


def test_too_few_loads_for_the_tokens_are_noticed() -> None:
    with pytest.raises(ScheduleError, match=r"loads 64 registers .* 513 tokens of 512 bytes"):
        cost(kernel(), chunk_tokens=513)


def test_what_is_no_attention_kernel_is_refused() -> None:
    with pytest.raises(ScheduleError, match="no listing"):
        bundles.parse("nothing of the kind")
    with pytest.raises(ScheduleError, match="both multiplies and copies"):
        cost(listing(loop(1, LOAD, MATMUL)))
    with pytest.raises(ScheduleError, match="both multiplies and copies"):
        cost(listing([*loop(1, FETCH), *loop(1, MATMUL)]))


def test_the_tree_is_shown_one_line_a_loop() -> None:
    shown = bundles.show(Loop("0", 0, 3, children=[Loop("0x3", 1, 4, fetches=[64, 64])]))
    assert shown == "straight line: 3 bundles\n  loop 0x3: 4 bundles, 2 fetches of 128 bytes"
