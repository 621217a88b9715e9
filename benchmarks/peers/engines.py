"""Which engines there are to compare, whether they are installed, and how each is started."""

from __future__ import annotations

import ctypes.util
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.peers import convert
from engine.config import Config, resolve_source

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-peers"
LLAMA_SLOTS = 16
_SLOT_ROUND = 256  # llama.cpp pads contexts to a multiple of it


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all engines are given.

    Attributes:
      config_path, overrides: ours, as `octavo bench` takes them.
      config: the same, loaded; peers get its model, its dtype and its sizes.
      cores: to run on.
      prefix_caching: whether requests of a round may share computed prefixes.
      longest: tokens of the longest request, its answer included.
      venv: has the peers.
      made: folder for converted weights and caches.
    """

    config_path: Path
    overrides: tuple[str, ...]
    config: Config
    cores: tuple[int, ...]
    prefix_caching: bool
    longest: int
    venv: Path
    made: Path

    @property
    def source(self) -> Path:
        """The GGUF file."""
        return Path(resolve_source(self.config))

    @property
    def common(self) -> tuple[str, ...]:
        """Options of every runner."""
        cores = ("--cores", ",".join(map(str, self.cores)))
        return cores if self.prefix_caching else (*cores, "--no-prefix-caching")


class Start(NamedTuple):
    """How a runner is started: its command, and what its environment has in addition."""

    command: list[str]
    env: dict[str, str]


class Engine(NamedTuple):
    """An engine to compare.

    Attributes:
      what: in a few words.
      start: how its runner is started; makes the files that it needs.
      missing: what it needs and isn't there; None if it can be started.
    """

    what: str
    start: Callable[[Setting], Start]
    missing: Callable[[Path], str | None]


def missing(name: str, venv: Path) -> str | None:
    """Why an engine can't be started, and what to do about it; None if it can."""
    lacks = ENGINES[name].missing(venv)
    return lacks and f"{name} is not installed: {lacks}; `make peers` installs it"


def preload(venv: Path) -> tuple[str, list[str]]:
    """What vLLM's makers ask to preload on a CPU, for LD_PRELOAD; and what of it is missing."""
    found, lacks = [], []
    if tcmalloc := ctypes.util.find_library("tcmalloc_minimal"):
        found.append(tcmalloc)
    else:
        lacks.append("libtcmalloc_minimal (Debian's libtcmalloc-minimal4)")
    if (openmp := venv / "lib" / "libiomp5.so").exists():
        found.append(str(openmp))
    else:
        lacks.append("libiomp5 (intel-openmp, for x86)")
    return ":".join(found), lacks


def _ours(setting: Setting, *options: str) -> Start:
    overrides = [part for text in setting.overrides for part in ("--set", text)]
    command = [
        *(sys.executable, "-m", "benchmarks.peers.octavo", *setting.common, *options),
        *("--config", str(setting.config_path.resolve()), *overrides),
    ]
    # The peers are builds for CPUs too. A libtpu that lies beside ours would take 80 MiB.
    return Start(command, {"JAX_PLATFORMS": "cpu"})


def _vllm(setting: Setting, *options: str) -> Start:
    config = setting.config
    model = convert.hugging_face_folder(setting.source, setting.made)
    command = [
        *(str(setting.venv / "bin" / "python"), "-m", "benchmarks.peers.vllm", *setting.common),
        *("--model", str(model), "--dtype", "bfloat16", *options),
        *("--max-num-seqs", str(config.scheduler.max_num_seqs)),
        *("--max-model-len", str(config.model.max_model_len or setting.longest)),
    ]
    env = {"VLLM_CACHE_ROOT": str(setting.made / "vllm")}
    if config.cache.memory is not None:  # vLLM takes whole GiB
        env["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(config.cache.memory / 2**30))
    if libraries := preload(setting.venv)[0]:
        env["LD_PRELOAD"] = libraries
    return Start(command, env)


def _llama_cpp(setting: Setting, kind: str) -> Start:
    model = convert.gguf_file(setting.source, setting.made, kind)
    context = -(-setting.longest // _SLOT_ROUND) * _SLOT_ROUND
    command = [
        *(sys.executable, "-m", "benchmarks.peers.llama_cpp", *setting.common),
        *("--server", str(setting.venv / "bin" / "llama-server"), "--model", str(model)),
        *("--slots", str(LLAMA_SLOTS), "--slot-tokens", str(context)),
    ]
    return Start(command, {})


def _needs(*path: str) -> Callable[[Path], str | None]:
    def lacks(venv: Path) -> str | None:
        file = venv.joinpath(*path)
        return None if file.exists() else f"{file} does not exist"

    return lacks


def _needs_vllm(venv: Path) -> str | None:
    found = any(venv.glob("lib/python3.*/site-packages/vllm/__init__.py"))
    return None if found else f"{venv} has no vllm"


_SERVER = _needs("bin", "llama-server")
OURS = {
    "in-process": "octavo",
    "grpc": "octavo-grpc",
}
ENGINES = {
    "octavo": Engine("in process", _ours, lambda _: None),
    "octavo-grpc": Engine("over gRPC", lambda s: _ours(s, "--grpc"), lambda _: None),
    "vllm": Engine("bf16, torch.compile", _vllm, _needs_vllm),
    "vllm-eager": Engine("bf16, eager", lambda s: _vllm(s, "--eager"), _needs_vllm),
    "llama.cpp": Engine("server, bf16", lambda s: _llama_cpp(s, "bf16"), _SERVER),
    "llama.cpp-q8_0": Engine("server, Q8_0", lambda s: _llama_cpp(s, "q8_0"), _SERVER),
}
PEERS = tuple(name for name in ENGINES if name not in OURS.values())
