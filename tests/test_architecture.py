"""The arrows of docs/architecture.md: who may import whom, what stays light, what stays small.

Imports are read from the syntax tree, those inside functions and under TYPE_CHECKING too; what
an import drags in at run time is seen in a fresh interpreter.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 450  # a file asks to be two from about 400 on
MAX_LINES_KERNEL = 600  # a kernel is one function and what it is told
KERNELS = {"pallas_kernels/paged_attention/tpu.py", "pallas_kernels/paged_attention/gpu.py"}
MAX_LINES_REQUEST_TO_TOKEN = 3000

BELOW_SERVE = {"types", "config", "core", "memory_plan", "model", "runtime", "text", "weights"}
# For each package or module of the engine, what else of the engine it may import.
MAY_IMPORT: dict[str, set[str]] = {
    "sampling": set(),
    "types": {"sampling"},
    "config": {"types", "config_error", "server_config"},
    "config_error": set(),
    "server_config": {"config_error"},
    "config_file": {"config"},
    "memory_plan": {"types", "config", "plan_weights"},
    "plan_tables": {"memory_plan"},
    "core": {"types", "config"},
    "weights": {"types", "config"},
    "text": {"types", "config"},
    "model": {"types", "config", "core", "weights"},
    "runtime": BELOW_SERVE - {"text"},
    "backends": {"config", "memory_plan", "model"},
    "start_up": set(),
    "trimming": set(),
    "loading": BELOW_SERVE | {"backends", "start_up", "trimming"},  # from a config to a warm runner
    "public_prefixes": {"types", "config", "runtime", "text"},
    "replay_tables": {"types", "core", "runtime"},
    "resolve": {"types", "config", "core", "text"},
    "streams": {"types", "runtime", "text"},
    "fair_threads": {"types", "runtime"},
    "preparing": {"types", "fair_threads", "streams", "text"},
    "domain_usage": {"types"},
    "life": {"types", "core", "runtime"},
    # Below the front ends, and above nothing but the vocabulary.
    "observe": {"types", "config", "domain_usage", "streams", "__init__"},
    "stats": {"config", "loading", "observe", "runtime"},
    "reload": BELOW_SERVE | {"loading"},
    "frontend": BELOW_SERVE
    | {"domain_usage", "life", "loading", "observe", "preparing", "public_prefixes", "reload"}
    | {"resolve", "start_up", "stats", "streams"},
    "llm": BELOW_SERVE | {"config_file", "loading", "frontend", "streams"},
    "generate": {"types", "llm"},
    "calibrate": BELOW_SERVE | {"backends", "loading", "resolve", "llm", "generate"},
    "dashboard": {"types", "core"},
    "simulate": {"types", "config_file", "core", "progress", "dashboard"},
    "leakcheck": {"rpc", "progress", "credentials", "__init__"},
    "replay_page": {"types", "core", "runtime", "dashboard"},
    "event_loop": set(),
    "plan_weights": {"config"},
    "progress": set(),
    "aot": BELOW_SERVE
    | {"backends", "config_file", "loading"},  # compiles what `loading` would start
    "rpc": set(),
    # __init__ holds the version.
    "serve": BELOW_SERVE
    | {"dashboard", "domain_usage", "event_loop", "life", "loading", "frontend", "observe"}
    | {"pem", "resolve", "rpc", "start_up", "trimming", "__init__"},
    # The wire's translation to and from our types is one file for both ends.
    "client": {"types", "rpc", "credentials", "serve.convert", "unreachable"},
    "operate": {"client", "connect_options"},
    "pem": set(),
    "credentials": {"pem"},
    "unreachable": {"credentials"},
    "connect_options": {"credentials"},
    "new_key": set(),
    "chat": {"types", "client", "credentials"},
    "top": {"client", "connect_options", "observe", "rpc"},
    "bench": BELOW_SERVE
    | {"config_file", "loading", "frontend", "llm", "client", "generate", "rpc", "progress"}
    | {"__init__", "credentials", "connect_options", "event_loop"},
    "__init__": {"types", "llm"},  # on first use only, see `test_importing_the_package_is_free`
    "__main__": {"cli"},
}
# One vocabulary in several files: who may import the one may import the others.
PART_OF = {"sampling": "types", "config_error": "config", "server_config": "config"}
ANYTHING = {"cli"}  # stands above all of them

HEAVY = {"flax", "gguf", "grpc", "huggingface_hub", "jax", "jinja2", "llguidance"}
HEAVY |= {"opentelemetry", "orbax", "prometheus_client", "safetensors", "starlette"}
HEAVY |= {"tensorstore", "tokenizers", "uvicorn"}


def _sources(*roots: str) -> list[Path]:
    files = [path for root in roots for path in (ROOT / root).rglob("*.py")]
    return sorted(path for path in files if "_pb2" not in path.name)


def _module(path: Path) -> str:
    """`engine.core.scheduler` for its file; a package's own file is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _unit(module: str) -> str:
    """The part of the engine that a module belongs to: `core` for `engine.core.scheduler`."""
    _, _, rest = module.partition(".")
    return rest.split(".")[0] or "__init__"


@cache
def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever it stands; `from a import b` is a.b if that is
    one of our modules."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write imports in full"
            assert node.module
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                ours = node.module.split(".")[0] in ("engine", "pallas_kernels")
                yield node.lineno, full if ours and _is_module(full) else node.module


def _allowed(importer: str, imported: str) -> bool:
    unit, target = _unit(importer), _unit(imported)
    if unit in ANYTHING or unit == target:
        return True
    allowed = MAY_IMPORT[unit]
    target = PART_OF.get(target, target)
    return target in allowed or imported.removeprefix("engine.") in allowed


@pytest.mark.parametrize("path", _sources("engine"), ids=_module)
def test_a_file_of_the_engine_imports_only_what_stands_below_it(path: Path) -> None:
    module = _module(path)
    assert _unit(module) in MAY_IMPORT.keys() | ANYTHING, (
        f"engine/{_unit(module)} is new: say in {Path(__file__).name} what it may import"
    )
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}"
        for line, imported in _imports(path)
        if imported.split(".")[0] == "engine" and not _allowed(module, imported)
    ]
    assert wrong == []


@pytest.mark.parametrize("path", _sources("engine"), ids=_module)
def test_only_the_model_and_what_compiles_kernels_import_the_kernels(path: Path) -> None:
    uses = [line for line, name in _imports(path) if name.split(".")[0] == "pallas_kernels"]
    assert not uses or _unit(_module(path)) in ("model", "aot"), f"lines {uses}"


@pytest.mark.parametrize("path", _sources("pallas_kernels"), ids=_module)
def test_the_kernels_import_jax_and_numpy_only(path: Path) -> None:
    allowed = {"jax", "numpy", "pallas_kernels", *sys.stdlib_module_names}
    assert [name for _, name in _imports(path) if name.split(".")[0] not in allowed] == []


@pytest.mark.parametrize(
    "path",
    [p for p in _sources("engine") if _unit(_module(p)) in ("types", "config", "core", *PART_OF)],
    ids=_module,
)
def test_the_vocabulary_and_the_core_never_name_jax(path: Path) -> None:
    assert [name for _, name in _imports(path) if name.split(".")[0] in HEAVY] == []


def test_the_rules_reject_an_arrow_that_points_up() -> None:
    assert not _allowed("engine.core.scheduler", "engine.runtime.runner")
    assert not _allowed("engine.types", "engine.config")
    assert not _allowed("engine.client", "engine.serve.server")
    assert _allowed("engine.runtime.runner", "engine.core.batching")
    assert _unit("engine") == "__init__"


def test_the_reader_of_imports_sees_those_inside_functions(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text("def f():\n    from engine.core import scheduler\n    import jax.numpy\n")
    names = dict(_imports(file))
    assert names[3] == "jax.numpy"
    assert names[2].startswith("engine.core")


def _loaded_after_importing(*modules: str) -> dict[str, list[str]]:
    """By module, the heavy packages loaded once it is imported in a fresh interpreter, in the
    order given: the first that shows one has dragged it in."""
    script = f"""
import importlib, json, sys
loaded = {{}}
for name in {list(modules)!r}:
    importlib.import_module(name)
    loaded[name] = [heavy for heavy in {sorted(HEAVY | {"numpy"})!r} if heavy in sys.modules]
print(json.dumps(loaded))
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_importing_the_package_is_free() -> None:
    assert _loaded_after_importing("engine") == {"engine": []}


def _modules(*units: str) -> list[str]:
    return [_module(path) for path in _sources("engine") if _unit(_module(path)) in units]


def test_the_command_line_starts_without_heavy_imports() -> None:
    loaded = _loaded_after_importing(*_modules("__init__", "types", "config", "config_file", "cli"))
    assert [name for name, heavy in loaded.items() if set(heavy) - {"numpy"}] == []


def test_what_runs_without_a_device_never_loads_jax() -> None:
    units = (
        *("types", "config", "core", "memory_plan", "plan_tables", "plan_weights"),
        *("client", "chat"),
        *("simulate", "leakcheck", "dashboard", "replay_tables"),
    )
    loaded = _loaded_after_importing(*_modules(*units))
    assert "engine.config" in loaded
    assert [name for name, heavy in loaded.items() if "jax" in heavy] == []


@pytest.mark.parametrize("path", _sources("engine", "pallas_kernels", "scripts"), ids=_module)
def test_a_file_is_short_enough_to_read_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    is_kernel = path.relative_to(ROOT).as_posix() in KERNELS
    assert len(text.splitlines()) <= (MAX_LINES_KERNEL if is_kernel else MAX_LINES)
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "no module docstring"


def test_the_path_from_request_to_token_reads_in_an_hour() -> None:
    path = [ROOT / "engine" / "types.py", *_sources("engine/core", "engine/model")]
    # Beside the path: what paging is compared with, the tiers below it, numbers for admission and
    # swapping, what may stay in the cache and for whom, sharing that can't be observed, beams,
    # shapes that are chosen at the start, what is only looked at, and an exchange of the weights;
    # and the checks of what a client asks for, also in engine/sampling.py. Of the model,
    # log-probabilities of prompts, how products reach their kernels, and an empty pool.
    beside = ("contiguous.py", "host_tier.py", "restoring.py", "forecast.py", "costs.py")
    beside += ("retention.py", "expiries.py", "public.py", "upkeep.py", "merging.py", "beams.py")
    beside += ("buckets.py", "inspection.py", "admission.py", "picture.py", "reloading.py")
    beside += ("journal.py", "prompt_logprobs.py", "products.py", "empty_pool.py")
    path = [file for file in path if file.name not in beside]
    path += [ROOT / "engine" / "runtime" / name for name in ("runner.py", "step.py")]
    assert sum(len(file.read_text().splitlines()) for file in path) < MAX_LINES_REQUEST_TO_TOKEN


def test_what_tries_out_grammars_starts_with_nothing_of_ours() -> None:
    """It runs as a process of its own, whose start a request waits for."""
    path = ROOT / "engine" / "text" / "grammar_trial.py"
    allowed = {"llguidance", *sys.stdlib_module_names}
    assert [name for _, name in _imports(path) if name.split(".")[0] not in allowed] == []


def test_the_proto_folder_is_no_package() -> None:
    assert (ROOT / "proto").is_dir()
    assert list((ROOT / "proto").rglob("__init__.py")) == []  # it would shadow proto-plus
