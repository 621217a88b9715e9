#!/usr/bin/env bash
# Create the virtual environment FOLDER with what compiles for an NVIDIA GPU on a machine that has
# none: jax as constraints.txt pins it, its CUDA plugin, and the assembler and bitcode library of
# CUDA. The libraries that only a running GPU needs, 3 GiB of them, stay out.
#
#   scripts/make_gpu_venv.sh FOLDER [JAX_VERSION]
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
version=${2:-$(sed -n 's/^jax==//p' constraints.txt)}
ready=$venv/.ready-$version
export PIP_DISABLE_PIP_VERSION_CHECK=1
[ -e "$ready" ] && exit 0

echo "installing jax $version and its CUDA compiler into $venv (about 1 GiB, once)"
python=.venv/bin/python # made by `make setup`: the Python that the project is for
[ -x "$python" ] || python=python3
"$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet "jax==$version" "jaxlib==$version" \
    --constraint <(grep -v '^jax' constraints.txt)
"$venv/bin/python" -m pip install --quiet --no-deps \
    "jax-cuda13-plugin==$version" "jax-cuda13-pjrt==$version" \
    'nvidia-cuda-nvcc>=13,<14' 'nvidia-nvvm>=13,<14'
touch "$ready"
