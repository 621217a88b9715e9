"""`python -m benchmarks products` on sizes that take no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import products
from pallas_kernels import native
from pallas_kernels.matmul import xla

SMALL = (
    products.Product("two", 64, (32, 48), layers=2),
    products.Product("scores", 32, (64,), layers=1, is_table=True),
)
needs_native = pytest.mark.skipif(
    native.unavailable() is not None, reason=str(native.unavailable())
)


def run(tmp_path: Path, *backends: str) -> tuple[int, list[dict[str, Any]]]:
    code = products.run(
        backends=backends, rows=(1, 3), rounds=1, seconds=1e-4, folder=tmp_path, products=SMALL
    )
    return code, json.loads((tmp_path / "products.json").read_text())["results"]


@pytest.mark.parametrize(
    "backends",
    [("reference", "xla"), pytest.param(("xla", "cpu", "cpu portable"), marks=needs_native)],
)
def test_every_backend_product_and_number_of_rows_is_measured(
    tmp_path: Path, backends: tuple[str, ...]
) -> None:
    code, results = run(tmp_path, *backends)
    assert code == 0
    assert {(r["product"], r["backend"], r["rows"]) for r in results} == {
        (product.name, backend, rows)
        for product in SMALL
        for backend in backends
        for rows in (1, 3)
    }
    for result in results:
        assert result["timing"]["median"] > 0
        weights = 64 * 80 if result["product"] == "two" else 32 * 64
        assert result["gigabytes_per_second"] * result["timing"]["median"] == pytest.approx(
            2e-9 * weights
        )
        assert result["gigaflops"] == pytest.approx(result["rows"] * result["gigabytes_per_second"])


def test_a_backend_that_is_wrong_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = xla.matmul
    monkeypatch.setattr(xla, "matmul", lambda *given: [y * 1.02 for y in right(*given)])
    code, results = run(tmp_path, "xla")
    assert code == 1
    assert all("off by more than rounding" in result["problem"] for result in results)
    assert "off by more than rounding" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("backends", "message"),
    [(("none",), "'none' is not one of"), (("xla avx2",), "'xla avx2' is not cpu and one of")],
)
def test_what_can_not_be_measured_is_refused(
    tmp_path: Path, backends: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *backends)
