"""Products of a step's rows with a model's weights: each backend, number of rows and matrix.

A product goes through all layers of its stack in turn, so that no cache holds the weights: with few
rows it is their bytes that take the time, with many the operations. Weights are random, of
SmolLM2-135M's shapes in bfloat16. A first call of each is compared with the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.attention.timing import Looped, Timing, measure
from engine.bench import machine
from engine.bench.report import BUSY_CORES
from pallas_kernels import matmul as mm
from pallas_kernels import native
from pallas_kernels.matmul import cpu

ROWS = (1, 4, 16, 64, 256)
BACKENDS = ("xla", "cpu")
LAYERS = 30


@dataclasses.dataclass(frozen=True)
class Product:
    """Products of one x with several matrices of each layer.

    Attributes:
      name: what it is called in the table.
      depth, widths: K, and the N of each matrix.
      layers: of the stacks.
      is_table: the embeddings, whose scores are float32.
    """

    name: str
    depth: int
    widths: tuple[int, ...]
    layers: int = LAYERS
    is_table: bool = False

    @property
    def weights(self) -> int:
        """Entries of one layer's matrices."""
        return self.depth * sum(self.widths)


PRODUCTS = (
    Product("q, k, v", 576, (576, 192, 192)),
    Product("attention out", 576, (576,)),
    Product("gate, up", 576, (1536, 1536)),
    Product("down", 1536, (576,)),
    Product("scores", 576, (49152,), layers=1, is_table=True),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """One product's time: of one layer, in seconds."""

    product: str
    backend: str
    rows: int
    timing: Timing | None
    gigabytes_per_second: float | None  # of weights
    gigaflops: float | None
    problem: str | None


def run(
    *,
    backends: Sequence[str],
    rows: Sequence[int],
    rounds: int,
    seconds: float,
    folder: Path,
    products: Sequence[Product] = PRODUCTS,
) -> int:
    """Measure, print a table and keep everything as JSON; 1 if a backend was wrong or failed.

    Args:
      backends: of `pallas_kernels.matmul`; "cpu avx2" is cpu with no more than AVX2.
      rows: of x.
      rounds: of all backends in turn.
      seconds: that a backend takes in a round, about.
      folder: for the JSON.
      products: what is multiplied.

    Raises:
      ValueError: a backend that can't run here.
    """
    if rounds < 1 or min(rows, default=0) < 1:
        raise ValueError(f"{rounds=} and every one of {rows=} must be at least 1")
    shapes = [(product.depth, width) for product in products for width in product.widths]
    for backend in backends:
        name, _, instructions = backend.partition(" ")
        mm.resolve_backend(name, jax.default_backend(), shapes=shapes)
        if instructions and (name != "cpu" or instructions not in native.INSTRUCTIONS):
            raise ValueError(
                f"backend {backend!r} is not cpu and one of {', '.join(native.INSTRUCTIONS)}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    meter = machine.Meter()
    meter.start()
    results: list[Result] = []
    for product in products:
        contestants = {name: _Stacks(product, name) for name in backends}
        for count in rows:
            results += _measure(product, contestants, count, rounds, seconds)
    load = meter.stop()
    report = {
        **machine.provenance("products"),
        "instructions": None if native.unavailable() else native.instructions(),
        "machine": load,
        "results": results,
    }
    path = folder / "products.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    console = Console()
    console.print(_table(results))
    for result in results:
        if result.problem:
            console.print(f"{result.backend}, {result.product}: {result.problem}", style="bold red")
    if load.foreign_cores is not None:
        style = "bold red" if load.foreign_cores > BUSY_CORES else ""
        console.print(f"foreign CPU load: {load.foreign_cores:.3f} cores", style=style)
    console.print(f"wrote {path}")
    return int(any(result.problem for result in results))


class _Stacks:
    """One backend's weights of a product, and the products with them."""

    def __init__(self, product: Product, backend: str):
        name, _, self._instructions = backend.partition(" ")
        self._product, self._backend = product, _backend(name)
        self.stacks = []
        for index, width in enumerate(product.widths):
            shape = (product.layers, product.depth, width)
            stack = jax.random.normal(jax.random.key(index), shape, jnp.bfloat16)
            self.stacks.append(jax.jit(mm.pack, static_argnums=1)(stack, self._backend))

    def multiply(self, x: jax.Array, stacks: Sequence[jax.Array], layer: jax.Array) -> Any:
        dtype = jnp.dtype(jnp.float32 if self._product.is_table else jnp.bfloat16)
        if self._instructions:
            return tuple(cpu.matmul(x, stacks, layer, dtype, instructions=self._instructions))
        return mm.matmul(x, stacks, layer, backend=self._backend, dtype=dtype)

    def contestant(self, x: jax.Array) -> Looped:
        layers = self._product.layers

        def call(state, x, stacks, index):
            return self.multiply(x, stacks, index % layers), state

        return Looped(call, (), x, self.stacks)


def _backend(name: str) -> mm.Backend:
    return mm.resolve_backend(name, jax.default_backend()).backend


def _measure(
    product: Product, contestants: dict[str, _Stacks], rows: int, rounds: int, seconds: float
) -> list[Result]:
    x = jax.random.normal(jax.random.key(rows), (rows, product.depth), jnp.bfloat16)
    runs = {name: stacks.contestant(x) for name, stacks in contestants.items()}
    timings = measure(runs, rounds=rounds, seconds=seconds)
    found = []
    for name, timing in timings.items():
        if isinstance(timing, str):
            found.append(Result(product.name, name, rows, None, None, None, timing))
            continue
        found.append(
            Result(
                product.name,
                name,
                rows,
                timing,
                2 * product.weights / timing.median / 1e9,
                2 * rows * product.weights / timing.median / 1e9,
                _mistake(product, contestants[name], x),
            )
        )
    return found


def _mistake(product: Product, stacks: _Stacks, x: jax.Array) -> str | None:
    """What is wrong with the products of the first layer, if anything."""
    outs = jax.jit(stacks.multiply)(x, stacks.stacks, jnp.int32(0))
    wide = np.asarray(x, np.float64)
    for index, (out, width) in enumerate(zip(outs, product.widths, strict=True)):
        shape = (product.layers, product.depth, width)
        matrix = np.asarray(jax.random.normal(jax.random.key(index), shape, jnp.bfloat16)[0])
        exact, size = wide @ matrix.astype(np.float64), np.abs(wide) @ np.abs(matrix, dtype=float)
        # Each of depth sums rounded to float32, and the result to bfloat16.
        bound = product.depth * 2.0**-24 * size
        bound += 0 if product.is_table else 2.0**-8 * (np.abs(exact) + bound)
        if not (np.abs(np.asarray(out, np.float64) - exact) <= bound).all():
            return f"{rows_text(len(x))}: off by more than rounding explains"
    return None


def rows_text(rows: int) -> str:
    """A count of rows in words."""
    return "one row" if rows == 1 else f"{rows} rows"


def _table(results: Sequence[Result]) -> Table:
    table = Table(
        title="products in bfloat16, SmolLM2-135M's shapes, one layer of each",
        title_justify="left",
        caption="median of the rounds; GB/s of weights",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("product")
    table.add_column("backend")
    for heading in ("rows", "µs", "range", "GB/s", "GFLOP/s"):
        table.add_column(heading, justify="right")
    for result in results:
        timing = result.timing
        if timing is None:
            continue
        table.add_row(
            result.product,
            result.backend,
            f"{result.rows}",
            f"{1e6 * timing.median:,.1f}",
            f"{1e6 * timing.least:,.1f} to {1e6 * timing.most:,.1f}",
            f"{result.gigabytes_per_second:,.1f}",
            f"{result.gigaflops:,.0f}",
        )
    return table
