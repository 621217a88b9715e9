#!/usr/bin/env bash
# Check and time the gpu backend on the NVIDIA GPU of this machine, in under 8 minutes and without
# a network: the oracle's cases on the device, the timings, the engine's decode step. JSON and logs
# go to FOLDER; the exit code is 1 if anything failed or didn't get its turn.
#
#   scripts/gpu_check.sh FOLDER [WHEELS]
#
# It wants Python 3.12 (PYTHON=..., by default python3) with jax 0.11.2 or newer and its CUDA
# plugin. The engine's step needs flax, msgspec and pyyaml as well; what is missing can come from
# WHEELS, a folder that is filled where there is a network:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 \
#       --platform manylinux2014_x86_64 --dest WHEELS msgspec==0.22.0
set -uo pipefail
if [ $# -lt 1 ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
wheels=${2:+$(cd "$2" && pwd)}
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-465}))
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # torch, where it is, needs memory too

packages=
if [ -n "$wheels" ]; then
    packages=$(mktemp -d) && trap 'rm -rf "$packages"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --target "$packages" "$wheels"/*.whl ||
        exit 2
fi
export PYTHONPATH=$PWD${packages:+:$packages}${PYTHONPATH:+:$PYTHONPATH}

"$python" - 2>&1 <<'END' | tee "$folder/environment.txt" || exit 2
import importlib.util, subprocess, sys
import jax
device = jax.devices()[0]
print(f"Python {sys.version.split()[0]}, jax {jax.__version__}, {device.device_kind}")
if device.platform != "gpu":
    sys.exit(f"jax finds no GPU here, only {device.device_kind}; is jax[cuda13] installed?")
missing = [name for name in ("flax", "msgspec", "yaml") if importlib.util.find_spec(name) is None]
if missing:
    print(f"the engine's step will fail without {', '.join(missing)}: see WHEELS in this script")
query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.memory"
subprocess.run(["nvidia-smi", query, "--format=csv"], check=False)
END

failed=()
part() { # NAME SECONDS COMMAND...: run a part, at most so long, and log it
    local name=$1 left=$((deadline - SECONDS)) most=$2
    shift 2
    most=$((left < most ? left : most))
    if [ "$most" -lt 10 ]; then
        failed+=("$name: no time left")
        return
    fi
    echo "== $name, at most $most s"
    timeout --kill-after=5 "$most" "$@" 2>&1 | tee "$folder/$name.log"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || failed+=("$name: exit status $status")
}

# A package `tests` among the installed ones would hide ours, which is a plain folder.
on_device='import runpy, sys, types
sys.modules["tests"] = tests = types.ModuleType("tests")
tests.__path__ = ["tests"]
runpy.run_module("tests.paged_attention.on_device", run_name="__main__", alter_sys=True)'
part correctness 200 "$python" -c "$on_device" --backend gpu --seconds 185
part attention 140 "$python" -m benchmarks.attention --heads llama3-8b --backend gpu xla \
    --rounds 5 --seconds 0.15 --json "$folder/attention.json"
part engine-step 120 "$python" -m benchmarks.attention --engine-step --model llama3-8b \
    --backend gpu --rounds 7 --seconds 0.3 --json "$folder/engine-step.json"
part other-shapes 90 "$python" -m benchmarks.attention --heads llama3-70b-tp8 smollm2 \
    --backend gpu --no-rivals --rounds 5 --seconds 0.1 --json "$folder/other-shapes.json"

if [ ${#failed[@]} -gt 0 ]; then
    echo "gpu-check: FAILED after $SECONDS s"
    printf '  %s\n' "${failed[@]}"
    exit 1
fi
echo "gpu-check: all four parts ran and every check holds, in $SECONDS s; see $folder"
