"""The command line: `octavo`, also `python -m engine`. Each command imports what it needs.

Nothing heavy is imported here, so that `octavo --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import Parameter

from engine import __version__
from engine.progress import ProgressBar

app = cyclopts.App(
    name="octavo",
    help="A paged LLM inference engine for JAX.",
    version=__version__,
    result_action="return_value",  # `main` makes it the exit status
)
app.command(
    "engine.simulate.command:simulate",
    help="Run allocators under the real scheduler on one stream of requests; no device is needed.",
)
app.command(
    "engine.leakcheck.cli:leakcheck",
    help="Attack a server of yours: can one tenant learn what another one has sent?",
)
bench = cyclopts.App(name="bench", help="Measure an engine or a server.")
app.command(bench)

ConfigPath = Annotated[Path, Parameter(name=["--config", "-c"])]
Overrides = Annotated[
    list[str] | None,
    Parameter(name="--set", negative=(), help="key=value that replaces the config's, dotted."),
]


@app.command
def serve(
    *,
    config: ConfigPath,
    set_: Overrides = None,
    record: Path | None = None,
    http: str | None = None,
    http_public: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Serve a model over gRPC until interrupted.

    Args:
      config: a YAML file; see configs/.
      record: write the scheduler's event log here, for `octavo replay`. It holds prompts.
      http: [host:]port of a page that shows the cache, block by block; 0 takes a free port.
      http_public: let it listen beyond this machine. It shows the requests of all tenants to
        whoever reaches it, as there is no authentication yet.
    """
    from engine.serve.server import page_address, run_server

    address = None if http is None else page_address(http, public=http_public)
    if http_public and http is None:
        raise ValueError("--http-public is for the page of --http, which is missing")
    with ProgressBar() as progress:
        return run_server(_load(config, set_), _text(record), progress, address)


@app.command
def chat(
    *,
    message: Annotated[str | None, Parameter(name=["--message", "-m"])] = None,
    address: str = "127.0.0.1:50051",
    system: str | None = None,
    temperature: float = 0.0,
    max_tokens: int = 512,
    seed: int | None = None,
) -> int:
    """Talk to a server; without a message, hold a conversation.

    Args:
      message: what to say.
      address: host:port of the server.
      system: a system message that comes first.
      temperature: 0 always takes the likeliest token.
      max_tokens: most tokens of an answer.
      seed: makes draws repeatable.
    """
    from engine.chat import chat as run
    from engine.sampling import SamplingParams

    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
    return run(address, message, system=system, sampling=sampling)


@app.command
def generate(
    *,
    config: ConfigPath,
    input_: Annotated[Path, Parameter(name=["--input", "-i"], allow_leading_hyphen=True)],
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    set_: Overrides = None,
    record: Path | None = None,
) -> int:
    """Generate for every line of a file, in this process.

    A line in is JSON with `prompt`, `prompt_ids` or `messages`, and any sampling field, such as
    {"prompt": "Hello", "temperature": 0, "max_tokens": 16}; unset, the temperature is 1. A line
    out has `index`, `text`, `token_ids`, `finish_reason`, `prompt_tokens`, `cached_tokens`,
    log-probabilities if asked for, and with `n` above 1 the further samples as `others`; a line
    that failed has `index` and `error`.

    Args:
      config: a YAML file; see configs/.
      input_: JSON lines; `-` is standard input.
      output: JSON lines in the order of the input; it appears when all are done.
      record: write the scheduler's event log here, for `octavo replay`. It holds prompts.
    """
    from engine.generate import generate_file
    from engine.llm import LLM

    loaded = _load(config, set_)
    with ProgressBar() as progress:

        def load() -> LLM:
            return LLM.from_config(loaded, record=_text(record), progress=progress)

        return generate_file(load, input_, output, progress)


@app.command
def plan(
    *,
    config: ConfigPath,
    hbm: str | None = None,
    set_: Overrides = None,
    json: bool = False,
) -> int:
    """Work out where memory goes and how much the cache holds; needs no weights.

    Args:
      config: a YAML file that states model.architecture, or whose model is a local file.
      hbm: memory of one chip, such as 16GiB; without it, the config's own pool is shown.
      json: print JSON instead of tables.
    """
    from engine import memory_plan
    from engine.config import resolve_source
    from engine.config_file import parse_size

    loaded = _load(config, set_)
    architecture = loaded.model.architecture
    if architecture is None:
        from engine.weights import open_checkpoint

        architecture = open_checkpoint(resolve_source(loaded)).architecture
    result = memory_plan.plan(loaded, architecture, hbm=parse_size(hbm) if hbm else None)
    if json:
        print(result.as_json())
    else:
        from rich.console import Console

        from engine.plan_tables import render

        Console().print(render(result))
    return 0 if result.fits else 1


@app.command
def calibrate(
    *,
    config: ConfigPath,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    dtype: Literal["int8", "float8_e4m3fn"] | None = None,
    prompts: Path | None = None,
    set_: Overrides = None,
) -> int:
    """Find the scales of an 8-bit KV cache, by running prompts with an exact one.

    Args:
      config: a YAML file; see configs/.
      output: the file to write, for cache.scales.
      dtype: of the cache they are for; the config's if it has 8 bits, else int8.
      prompts: a text file with a prompt a line, or JSON lines as `octavo generate` takes them,
        if the name ends in .jsonl. Some short texts are built in. 4096 tokens of each are used.
    """
    from engine.calibrate import calibrate_file

    loaded = _load(config, set_)
    with ProgressBar() as progress:
        found = calibrate_file(loaded, output, dtype=dtype, prompts=prompts, progress=progress)
    layers, _, heads = found.scales.shape
    print(
        f"wrote {output}: {found.dtype} scales of {layers} layers x {heads} KV heads, from "
        f"{found.num_prompts} prompts, {found.num_tokens} tokens in all; use them with "
        f"--set cache.dtype={found.dtype} --set cache.scales={output.absolute()}"
    )
    return 0


@app.command
def replay(log: Path, /, *, check: bool = False, html: Path | None = None) -> int:
    """Run a recorded event log through the scheduler and compare every plan.

    Args:
      log: written by `octavo serve --record` or `octavo generate --record`.
      check: also assert all invariants after every event; slow.
      html: also write a page here that shows the pool step by step; one file, which opens from a
        disk. It names the requests, but holds no prompt.
    """
    from engine.runtime.event_log import replay as run

    if html is None:
        seen = run(log, check=check)
    else:
        from engine.replay_page import replay_to_page

        seen = replay_to_page(log, html, check=check)
    print(
        f"{log}: {seen.steps} plans are identical ({seen.requests} requests, "
        f"{seen.tokens} tokens, {seen.preemptions} preemptions)"
    )
    return 0


@app.command
def convert(source: str, output: Path, /, *, dtype: str = "bfloat16") -> int:
    """Write a model as an orbax checkpoint, which loads sharded.

    Args:
      source: a .gguf file, a folder, or hf:org/name.
      output: the folder to write; it must not exist.
      dtype: float32 or bfloat16.
    """
    from engine.config import DTYPE_BYTES, ConfigError
    from engine.weights import convert as run

    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"--dtype is {dtype!r}; it must be one of {', '.join(DTYPE_BYTES)}")
    with ProgressBar() as progress:
        run(source, output, dtype, lambda done, total: progress("Converting", done, total))
    print(f"wrote {output}; use it as model.source")
    return 0


@cyclopts.Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What to send, how often, and where the report goes.

    Attributes:
      workload: JSON lines as `octavo generate` takes them; without it, random tokens.
      num_requests: how many requests of random tokens; 64 unless given.
      input_len: tokens of each random prompt; 256 unless given.
      output_len: tokens of each of their answers; 128 unless given.
      shared_prefix: how many of a random prompt's tokens are the same in all; 0 unless given.
      seed: of random tokens and arrivals.
      repeat: runs that count; medians are shown.
      warm_up: whether a run that doesn't count comes first.
      output: file for the report in JSON.
    """

    workload: Path | None = None
    num_requests: int | None = None
    input_len: int | None = None
    output_len: int | None = None
    shared_prefix: int | None = None
    seed: int | None = None
    repeat: int = 1
    warm_up: bool = True
    output: Path | None = None

    def arguments(self) -> dict[str, Any]:
        """As the functions of `engine.bench` take them."""
        from engine.bench import Synthetic, WorkloadError

        names = ("num_requests", "input_len", "output_len", "shared_prefix", "seed")
        given = {name: getattr(self, name) for name in names}
        drawn = {name: value for name, value in given.items() if value is not None}
        if self.workload is not None and drawn:
            option = min(drawn).replace("_", "-")
            raise WorkloadError(f"--{option} is for random tokens; leave it out with --workload")
        return {
            "workload": self.workload,
            "synthetic": None if self.workload else Synthetic(**drawn),
            "repeat": self.repeat,
            "warm_up": self.warm_up,
            "output": self.output,
        }


@bench.command
def throughput(
    workload: Workload = Workload(), *, config: ConfigPath, set_: Overrides = None
) -> int:
    """Send all requests at once to an engine in this process.

    Args:
      config: a YAML file; see configs/.
    """
    from engine import bench

    with ProgressBar() as progress:
        return bench.throughput(
            config, overrides=set_ or (), progress=progress, **workload.arguments()
        )


@bench.command
def latency(
    workload: Workload = Workload(),
    *,
    config: ConfigPath,
    set_: Overrides = None,
    concurrency: int | None = None,
    request_rate: float | None = None,
) -> int:
    """Send requests one after the other to an engine in this process.

    Args:
      config: a YAML file; see configs/.
      concurrency: requests under way at once; 1 if neither this nor a rate is given.
      request_rate: requests a second, arriving at random, instead.
    """
    from engine import bench

    with ProgressBar() as progress:
        return bench.latency(
            config,
            overrides=set_ or (),
            concurrency=concurrency,
            request_rate=request_rate,
            progress=progress,
            **workload.arguments(),
        )


@bench.command(name="serve")
def bench_serve(
    workload: Workload = Workload(),
    *,
    address: str = "127.0.0.1:50051",
    concurrency: int | None = None,
    request_rate: float | None = None,
    server_pid: int | None = None,
) -> int:
    """Send requests to a running server.

    Args:
      address: host:port of the server.
      concurrency: requests under way at once; all at once if neither this nor a rate is given.
      request_rate: requests a second, arriving at random, instead.
      server_pid: the server's process, if it runs on this machine, for its memory and CPU time.
    """
    from engine import bench

    return bench.serve(
        address,
        concurrency=concurrency,
        request_rate=request_rate,
        server_pid=server_pid,
        **workload.arguments(),
    )


def _load(path: Path, overrides: list[str] | None) -> Any:
    from engine import config_file

    return config_file.load(path, overrides or ())


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def main() -> None:
    """Run the command line; errors that a user can mend are one line, without a traceback."""
    try:
        from engine.aot.topologies import quiet_libtpu

        quiet_libtpu()
        logging.basicConfig(
            level=os.environ.get("OCTAVO_LOG", "WARNING").upper(),
            format="%(levelname)s %(name)s: %(message)s",
        )
        result = app(sys.argv[1:])
        sys.exit(result if isinstance(result, int) else 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("OCTAVO_TRACEBACK"):
            raise
        print(f"octavo: {_message(error)}", file=sys.stderr)
        sys.exit(2)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    from engine.config import ConfigError

    if isinstance(error, ConfigError):  # YAML's own messages are drawn over several lines
        return " ".join(str(error).split())
    return str(error)
