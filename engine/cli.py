"""The command line: `octavo`, also `python -m engine`. Each command imports what it needs.

Nothing heavy is imported here, so that `octavo --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import Parameter

from engine import __version__
from engine.connect_options import ConnectOptions
from engine.observe import logs
from engine.progress import ProgressBar
from engine.server_config import check_server

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
    help="""Attack a server of yours: can one tenant learn what another one has sent?

It runs the published attacks on shared prompt caches, each beside a control in which victim and
attacker are one tenant. A channel leaks if the attack tells prompts that were sent from prompts
that were not: its p-value, corrected for the number of channels (Holm), is below alpha, and the
confidence interval of its AUC leaves out 0.5. Silence counts only where the control is loud, with
an AUC above 0.95. Exits with 1 if a channel leaks, with 2 if silence on one means nothing.
""",
)
app.command("engine.operate:pause", help="Have a server begin no step, until it is resumed.")
app.command("engine.operate:resume", help="Have a paused server go on.")
app.command("engine.operate:reload", help="Have a server exchange its weights; the queue is kept.")
app.command("engine.bench.cli:bench", name="bench", help="Measure an engine or a server.")
app.command("engine.top.command:top", help="Watch a server at work: a table that renews itself.")
app.command("engine.new_key:key", help="Make an API key, and the line of the access file for it.")

_CONNECT = ConnectOptions()

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
    record_tokens: Path | None = None,
    http: str | None = None,
    http_public: Annotated[bool, Parameter(negative=())] = False,
    log_format: Literal["text", "json"] | None = None,
) -> int:
    """Serve a model over gRPC until interrupted.

    Args:
      config: a YAML file; see configs/.
      record: write the scheduler's event log here, for `octavo replay`. It holds counts and
        hashes: no text, no token ids, no names that clients chose.
      record_tokens: write it here with prompts and outputs in full.
      http: [host:]port of the OpenAI API, of a page that shows the cache, block by block, and of
        /metrics for Prometheus; 0 takes a free port. Instead of the config's `server.http`.
      http_public: show page and metrics to whoever reaches them, without authentication. With
        server.access they take an operator's key, the page as the password, and without, only this
        machine may see them.
      log_format: lines on standard error for people or for machines; the config's
        server.log_format if left out. The environment's OCTAVO_LOG says from which level on.
    """
    from engine.serve.run import run_server

    path, tokens = _event_log(record, record_tokens)
    settings = _load(config, set_)
    server = settings.server
    server = dataclasses.replace(
        server,
        http=server.http if http is None else http,
        http_public=server.http_public or http_public,
        log_format=log_format or server.log_format,
    )
    check_server(server)
    settings = dataclasses.replace(settings, server=server)
    form = server.log_format
    logs.configure(_log_level(), form)
    with ProgressBar() as bar:
        return run_server(
            settings,
            path,
            bar if form == "text" else None,  # it would write between the objects
            record_tokens=tokens,
        )


@app.command
def chat(
    connect: ConnectOptions = _CONNECT,
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
    return run(
        address, message, system=system, sampling=sampling, credentials=connect.credentials()
    )


@app.command
def generate(
    *,
    config: ConfigPath,
    input_: Annotated[Path, Parameter(name=["--input", "-i"], allow_leading_hyphen=True)],
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    set_: Overrides = None,
    record: Path | None = None,
    record_tokens: Path | None = None,
) -> int:
    """Generate for every line of a file, in this process.

    A line in is JSON with `prompt`, `prompt_ids` or `messages`, and any sampling field, such as
    {"prompt": "Hello", "temperature": 0, "max_tokens": 16}; unset, the temperature is 1. With
    "constraint": {"kind": "regex", "text": "[a-z]+"} the output matches that; so with kinds
    json_schema, json_object, lark, ebnf, structural_tag, and choice, which has `choices` for the
    text. A line out has `index`, `text`, `token_ids`, `finish_reason`, `prompt_tokens`,
    `cached_tokens`, log-probabilities if asked for, and with `n` above 1 the further samples as
    `others`; with `beam_width` above 1 also `beam`, its `logprob` and the `score` they are ordered
    by. A line that failed has `index` and `error`.

    Args:
      config: a YAML file; see configs/.
      input_: JSON lines; `-` is standard input.
      output: JSON lines in the order of the input; it appears when all are done.
      record: write the scheduler's event log here, for `octavo replay`. It holds counts and
        hashes: no text, no token ids, no names that clients chose.
      record_tokens: write it here with prompts and outputs in full.
    """
    from engine.generate import generate_file
    from engine.llm import LLM

    path, tokens = _event_log(record, record_tokens)
    loaded = _load(config, set_)
    with ProgressBar() as progress:

        def load() -> LLM:
            return LLM.from_config(loaded, record=path, record_tokens=tokens, progress=progress)

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
def flush(
    connect: ConnectOptions = _CONNECT,
    *,
    address: str = "127.0.0.1:50051",
    cache_salt: str = "",
) -> int:
    """Have a server forget what your requests left in its cache.

    Args:
      address: host:port of the server.
      cache_salt: that of the requests; without it, those that had none.
    """
    import asyncio

    from engine.client import AsyncClient, ServiceError

    async def run() -> int:
        async with AsyncClient(address, connect.credentials()) as client:
            return await client.flush(cache_salt or None)

    try:
        blocks = asyncio.run(run())
    except ServiceError as error:
        print(f"octavo: {error.details}", file=sys.stderr)
        return 1
    print(
        f"Forgotten: {blocks} blocks that were cached on the device, and all that lay in host "
        "memory and on disk. What running requests hold goes when they end"
    )
    return 0


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
def replay(
    log: Path,
    /,
    *,
    at: int | None = None,
    json: bool = False,
    check: bool = False,
    html: Path | None = None,
) -> int:
    """Run a recorded event log through the scheduler and compare every plan.

    Args:
      log: written by `octavo serve --record` or `octavo generate --record`.
      at: show the state when this step was planned, and its plan.
      json: print that as JSON instead of tables.
      check: also assert all invariants after every event; slow.
      html: also write a page here that shows the pool step by step; one file, which opens from a
        disk. It names the requests, but holds no prompt.
    """
    if at is not None:
        if html is not None:
            raise ValueError("--at shows one step and --html all of them; give one of them")
        from engine.replay_tables import show

        show(log, at, as_json=json, check=check)
        return 0
    if json:
        raise ValueError("--json prints the state at a step; name the step with --at")
    from engine.runtime.replay import replay as run

    if html is None:
        seen = run(log, check=check)
    else:
        from engine.replay_page import replay_to_page

        seen = replay_to_page(log, html, check=check)
    print(
        f"{log}: {seen.steps} plans are identical ({seen.requests} requests, "
        f"{seen.tokens} tokens, {seen.preemptions} preemptions)"
        + ("; the log holds prompts and outputs" if seen.holds_tokens else "")
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


def _load(path: Path, overrides: list[str] | None) -> Any:
    from engine import config_file

    return config_file.load(path, overrides or ())


def _event_log(record: Path | None, record_tokens: Path | None) -> tuple[str | None, bool]:
    """The event log's path, and whether it holds tokens."""
    if record is not None and record_tokens is not None:
        raise ValueError("--record and --record-tokens both name an event log; give one of them")
    path = record or record_tokens
    return None if path is None else str(path), record_tokens is not None


def _log_level() -> str:
    levels = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    level = os.environ.get("OCTAVO_LOG", "WARNING")
    if level.upper() not in levels:
        choices = ", ".join(levels).lower()
        raise ValueError(f"OCTAVO_LOG is {level!r:.80}; it must be one of {choices}")
    return level


def _hint(error: cyclopts.CycloptsError) -> str | None:
    """What to add to a complaint about the arguments."""
    argument = error.argument
    if isinstance(error, cyclopts.MissingArgumentError) and argument and not error.keyword:
        return f"{argument.name} is missing" + (
            ": a YAML file, such as configs/smollm2-135m-cpu.yaml"
            if argument.name == "--config"
            else ""
        )
    if isinstance(error, cyclopts.UnusedCliTokensError) and error.target is chat:
        return 'what to say comes after -m: octavo chat -m "Hello"'
    return None


def main() -> None:
    """Run the command line; errors that a user can mend are one line, without a traceback."""
    try:
        from engine.aot.topologies import quiet_libtpu

        quiet_libtpu()
        # gRPC's own lines quote what strangers send as it is, line breaks too (the name that a TLS
        # handshake asks for), so that they could write into the log. It raises what matters.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        logs.configure(_log_level())
        result = app(sys.argv[1:], exit_on_error=False)
        sys.exit(result if isinstance(result, int) else 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except cyclopts.CycloptsError as error:  # it has been printed
        if hint := _hint(error):
            print(f"octavo: {hint}", file=sys.stderr)
        sys.exit(2)
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
