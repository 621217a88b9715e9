"""`python -m benchmarks`: the measurements that docs/benchmarks/ reports; also `make bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import cyclopts
from cyclopts import Parameter

from engine.aot.topologies import quiet_libtpu

RESULTS = Path("build") / "benchmarks"

SEVERAL = Parameter(consume_multiple=True, negative=())

app = cyclopts.App(
    name="python -m benchmarks",
    help="Measure Octavo on this machine. Without a command: scheduler and engine.",
    version_flags=[],
)


@app.command
def scheduler(
    *,
    sequences: int = 256,
    steps: int = 300,
    rounds: int = 4,
    pools: Annotated[list[int] | None, SEVERAL] = None,
    output: Path = RESULTS,
) -> int:
    """Time schedule + build + commit on the host, without a model.

    Args:
      sequences: how many run at once.
      steps: measured steps of a round, which starts with an empty pool.
      rounds: of each case and pool.
      pools: sizes of the block pool, in blocks; 10000 100000 1000000 by default.
      output: folder for the JSON.
    """
    from benchmarks import scheduler as benchmark

    return benchmark.run(
        sequences=sequences,
        steps=steps,
        rounds=rounds,
        pools=pools or (10_000, 100_000, 1_000_000),
        folder=output,
    )


@app.command
def engine(
    *,
    config: Annotated[Path, Parameter(name=["--config", "-c"])] = Path(
        "configs/smollm2-135m-cpu.yaml"
    ),
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    workload: Annotated[list[str] | None, SEVERAL] = None,
    repeat: int = 5,
    output: Path = RESULTS,
) -> int:
    """Run the named workloads through the engine in this process.

    Args:
      config: a YAML file.
      set_: key=value that replaces the config's, dotted.
      workload: names of files in benchmarks/workloads/; by default single decode16 mixed64.
      repeat: runs that count, after one that doesn't.
      output: folder for the JSON.
    """
    from benchmarks import engine as benchmark

    names = workload or ("single", "decode16", "mixed64")
    return benchmark.run(config, tuple(set_ or ()), names, repeat=repeat, folder=output)


@app.command
def structured(
    *,
    config: Annotated[Path, Parameter(name=["--config", "-c"])] = Path(
        "configs/smollm2-135m-cpu.yaml"
    ),
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    requests: int = 200,
    rounds: int = 2,
    output: Path = RESULTS,
) -> int:
    """Whether outputs validate against their JSON schemas, and what that costs.

    Args:
      config: a YAML file.
      set_: key=value that replaces the config's, dotted.
      requests: with one of twenty schemas each; as many without are mixed in.
      rounds: of these, and of the same requests without any constraint.
      output: folder for the JSON.
    """
    from benchmarks import structured as benchmark

    overrides = tuple(set_ or ())
    return benchmark.run(config, overrides, requests=requests, rounds=rounds, folder=output)


@app.command
def eviction(*, requests: int = 1000, seed: int = 0, output: Path = RESULTS) -> int:
    """Hit rates of orders of eviction on simulated chats, beside the optimum; any machine.

    Args:
      requests: of each stream.
      seed: of the streams.
      output: folder for the JSON.
    """
    from benchmarks import eviction as benchmark

    return benchmark.run(requests=requests, seed=seed, folder=output)


@app.command
def overload(
    *,
    simulated: Annotated[bool, Parameter(negative=())] = False,
    config: Annotated[Path, Parameter(name=["--config", "-c"])] = Path(
        "configs/smollm2-135m-cpu.yaml"
    ),
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    loads: Annotated[list[float] | None, SEVERAL] = None,
    requests: int | None = None,
    repeat: int = 2,
    seed: int = 0,
    output: Path = RESULTS,
) -> int:
    """Throughput, recomputation and waiting at multiples of the load that can be served.

    Args:
      simulated: on a simulated device, the same on any machine; else through an engine here,
        with a pool so small that it is what limits it.
      config: a YAML file, for the engine.
      set_: key=value that replaces the config's, dotted.
      loads: multiples of the capacity; 0.5 1 2 4, and 8 simulated, by default.
      requests: of each load; 120 by default, simulated 3,000.
      repeat: sweeps of the engine, whose medians are shown.
      seed: of the requests.
      output: folder for the JSON.
    """
    from benchmarks import overload as benchmark

    if simulated:
        if set_:
            raise ValueError("--set is for the engine's config; leave it or --simulated out")
        return benchmark.run_simulated(
            loads=loads or (0.5, 1, 2, 4, 8), requests=requests or 3000, seed=seed, folder=output
        )
    return benchmark.run_engine(
        config,
        tuple(set_ or ()),
        loads=loads or (0.5, 1, 2, 4),
        requests=requests or 120,
        repeat=repeat,
        seed=seed,
        folder=output,
    )


@app.command
def turns(
    *,
    config: Annotated[Path, Parameter(name=["--config", "-c"])] = Path(
        "configs/smollm2-135m-cpu.yaml"
    ),
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    users: int = 16,
    turns: int = 8,
    active: int = 4,
    small: str = "36MiB",
    host: str = "160MiB",
    disk: str = "1GiB",
    case: Annotated[list[str] | None, SEVERAL] = None,
    rounds: int = 2,
    restart: bool = True,
    output: Path = RESULTS,
) -> int:
    """Hold chats of several turns: prefix hit rate and time to the first token, tier by tier.

    Args:
      config: a YAML file, whose pool holds all chats.
      set_: key=value that replaces the config's, dotted.
      users: who chat.
      turns: of each chat.
      active: users that are served at once.
      small: bytes of a pool that is too small for all chats.
      host: bytes of the host tier.
      disk: bytes of the disk tier.
      case: off on small host; all by default.
      rounds: how often all cases are run, in turn.
      restart: also one more turn after a restart, with the disk tier and without.
      output: folder for the JSON.
    """
    from benchmarks import turns as benchmark

    sizes = benchmark.Sizes(users, turns, active, small, host, disk)
    return benchmark.run(
        config,
        tuple(set_ or ()),
        sizes,
        case or benchmark.CASES,
        rounds=rounds,
        restart=restart,
        folder=output,
    )


@app.command
def streaming(
    *,
    config: Annotated[Path, Parameter(name=["--config", "-c"])] = Path(
        "configs/smollm2-135m-cpu.yaml"
    ),
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    streams: int = 16,
    requests: int | None = None,
    input_len: int = 64,
    output_len: int = 128,
    rounds: int = 5,
    step_ms: float | None = None,
    output: Path = RESULTS,
) -> int:
    """Stream the same requests in process and over gRPC, in turn, through one engine.

    Args:
      config: a YAML file; one for fewer sequences at once gets as many as there are streams.
      set_: key=value that replaces the config's, dotted.
      streams: that are open at once.
      requests: in all; as many as streams if left out.
      input_len: tokens of each prompt.
      output_len: tokens of each answer.
      rounds: of each way, after one that doesn't count.
      step_ms: steps take so many milliseconds and compute nothing: what the host can carry.
      output: folder for the JSON.
    """
    from benchmarks import streaming as benchmark

    sizes = benchmark.Sizes(streams, requests or streams, input_len, output_len)
    return benchmark.run(
        config, tuple(set_ or ()), sizes, rounds=rounds, step_ms=step_ms, folder=output
    )


@app.command
def compare(
    *,
    config: Annotated[Path, Parameter(name=["--config", "-c"])] = Path(
        "configs/smollm2-135m-cpu.yaml"
    ),
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    ours: Literal["in-process", "grpc"] = "in-process",
    peers: Annotated[list[str] | None, SEVERAL] = None,
    workload: Annotated[list[str] | None, SEVERAL] = None,
    rounds: int = 5,
    fresh: Annotated[bool, Parameter(negative=())] = False,
    prefix_caching: bool = True,
    cores: Annotated[list[int] | None, SEVERAL] = None,
    min_agreement: float = 0.3,
    venv: Path = Path(".venv-peers"),
    output: Path = RESULTS,
) -> int:
    """Run ours and other engines, which `make peers` installs, in turn over the same requests.

    Args:
      config: a YAML file, whose model is a GGUF file.
      set_: key=value that replaces the config's, dotted.
      ours: how ours is read.
      peers: vllm vllm-eager llama.cpp llama.cpp-q8_0; those that are installed by default.
      workload: names of files in benchmarks/workloads/, or files; by default single decode16
        mixed64.
      rounds: of each workload and engine, after one that doesn't count.
      fresh: start an engine anew for each of its turns, instead of stopping it between them.
      prefix_caching: whether the requests of a round may share computed prefixes.
      cores: that all engines are pinned to; by default all that there are.
      min_agreement: the least share of a peer's answers that must begin with our tokens.
      venv: folder that `make peers` has made.
      output: folder for the JSON.
    """
    from benchmarks import compare as benchmark

    return benchmark.run(
        config,
        tuple(set_ or ()),
        ours=ours,
        peers=peers,
        workloads=workload or ("single", "decode16", "mixed64"),
        rounds=rounds,
        fresh=fresh,
        prefix_caching=prefix_caching,
        cores=cores,
        min_agreement=min_agreement,
        venv=venv,
        folder=output,
    )


@app.command
def soak(*, minutes: float = 30.0, cases: int = 96, seed: int = 0, output: Path = RESULTS) -> int:
    """Load a server with a tiny model beyond its capacity, have steps fail, compare every token.

    Args:
      minutes: how long.
      cases: different requests, whose outputs are computed beforehand.
      seed: of the requests, and of what clients do.
      output: folder for the JSON.
    """
    from benchmarks import soak as benchmark

    return benchmark.run(minutes=minutes, cases=cases, seed=seed, folder=output)


@app.command
def products(
    *,
    backend: Annotated[list[str] | None, SEVERAL] = None,
    rows: Annotated[list[int] | None, SEVERAL] = None,
    rounds: int = 5,
    seconds: float = 0.1,
    output: Path = RESULTS,
) -> int:
    """Time products with SmolLM2's weights, by backend and number of rows; check each.

    Args:
      backend: xla and cpu by default; "cpu avx2" is native code with no more than AVX2.
      rows: of x; 1 4 16 64 256 by default.
      rounds: of all backends in turn, whose medians are shown.
      seconds: that a backend takes in a round, about.
      output: folder for the JSON.
    """
    from benchmarks import products as benchmark

    return benchmark.run(
        backends=backend or benchmark.BACKENDS,
        rows=rows or benchmark.ROWS,
        rounds=rounds,
        seconds=seconds,
        folder=output,
    )


@app.command
def host(
    *,
    config: Annotated[Path, Parameter(name=["--config", "-c"])] = Path(
        "configs/smollm2-135m-cpu.yaml"
    ),
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    workload: str = "decode16",
    rounds: int = 5,
    output: Path = RESULTS,
) -> int:
    """Measure the host's part of a step through the engine, and trace whether the device waits.

    Args:
      config: of the engine, on a CPU.
      set_: KEY=VALUE, overrides a key of the config.
      workload: a named one.
      rounds: timed ones, after one that doesn't count; another is traced.
      output: folder for the JSON.
    """
    from benchmarks import host as benchmark

    return benchmark.run(config, tuple(set_ or ()), workload, rounds=rounds, folder=output)


@app.command
def buckets(
    *sets: str,
    config: Annotated[Path, Parameter(name=["--config", "-c"])] = Path(
        "configs/smollm2-135m-cpu.yaml"
    ),
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    workload: str = "mixed64",
    timed: bool = True,
    output: Path = RESULTS,
) -> int:
    """What sets of buckets pad on a workload, and what their programs take to compile and find.

    Args:
      sets: beside the config's own, such as 1,4,16,64/128,512/16,64: sequences of decode buckets,
        tokens and sequences of prefill buckets.
      config: of the engine.
      set_: KEY=VALUE, overrides a key of the config.
      workload: a named one.
      timed: compile each set, and time each shape. Without, it is the scheduler alone.
      output: folder for the JSON.
    """
    from benchmarks import buckets as benchmark

    return benchmark.run(
        config, tuple(set_ or ()), sets=sets, workload=workload, timed=timed, folder=output
    )


@app.command
def quality(
    *,
    config: Annotated[Path, Parameter(name=["--config", "-c"])] = Path(
        "configs/smollm2-135m-cpu.yaml"
    ),
    set_: Annotated[list[str] | None, Parameter(name="--set", negative=())] = None,
    variant: Annotated[list[str] | None, SEVERAL] = None,
    workload: Annotated[list[str] | None, SEVERAL] = None,
    tokens: int = 64,
    window: int = 1024,
    output: Path = RESULTS,
) -> int:
    """What a narrower dtype costs: perplexity of a fixed text, and greedy tokens that differ.

    Args:
      config: a YAML file.
      set_: key=value that replaces the config's, dotted.
      variant: float32 bfloat16 bfloat16+int8 by default; the first is the yardstick.
      workload: names of files in benchmarks/workloads/, whose prompts are continued; by default
        single decode16 mixed64.
      tokens: of each continuation.
      window: tokens of the text that are read at once, from an empty context.
      output: folder for the JSON.
    """
    from benchmarks import quality as benchmark

    return benchmark.run(
        config,
        tuple(set_ or ()),
        variants=variant or benchmark.VARIANTS,
        workloads=workload or ("single", "decode16", "mixed64"),
        tokens=tokens,
        window=window,
        folder=output,
    )


@app.command(help_flags=[])
def attention(*options: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Check and time attention backends on this device; `attention --help` lists the options."""
    from benchmarks.attention.command import main

    return main(options)


@app.default
def everything() -> int:
    """Run scheduler and engine with their defaults."""
    return max(scheduler(), engine())


if __name__ == "__main__":
    quiet_libtpu()
    try:
        sys.exit(app() or 0)
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks: {error}")
