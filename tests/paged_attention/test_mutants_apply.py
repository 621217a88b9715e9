"""Every seeded mistake still fits the source that it changes. Running them takes minutes
(`make mutants`); that one went stale shows here at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pallas_kernels import paged_attention
from pallas_kernels.paged_attention import gpu, tpu, tpu_plan, xla
from tests.paged_attention import test_gpu_mutants, test_mutants, test_mutants_tpu

LISTS = {
    "xla": (xla, {**test_mutants.MUTANTS, **test_mutants.FEATURE_MUTANTS}),
    "entry": (paged_attention, test_mutants.ENTRY_MUTANTS),
    "tpu": (tpu, test_mutants_tpu.KERNEL_MUTANTS),
    "tpu_plan": (tpu_plan, test_mutants_tpu.PLAN_MUTANTS),
    "gpu": (gpu, {name: texts for name, (_, *texts) in test_gpu_mutants.MUTANTS.items()}),
}


@pytest.mark.parametrize("name", LISTS)
def test_each_mistake_replaces_one_piece_of_the_source(name: str) -> None:
    module, mutants = LISTS[name]
    source = Path(module.__file__ or "").read_text()
    assert len(mutants) >= 10 or name in ("entry", "tpu_plan")
    for mistake, (right, wrong) in mutants.items():
        assert right != wrong
        assert source.count(right) == 1, f"{mistake!r} is stale: {right!r} is not there once"
