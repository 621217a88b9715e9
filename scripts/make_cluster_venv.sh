#!/usr/bin/env bash
# Create the virtual environment FOLDER with the SMG model gateway, which stands before workers, and
# the openai client, which the tests call it with: at the versions that the tests were written for.
#
#   scripts/make_cluster_venv.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
packages=(smg==1.13.0 openai==3.54.0 'grpcio>=1.81.1')
ready=$venv/.ready-$(echo "${packages[@]}" | cksum | cut -d' ' -f1)
export PIP_DISABLE_PIP_VERSION_CHECK=1
[ -e "$ready" ] && exit 0

echo "installing the SMG gateway into $venv (about 170 MiB, once)"
python=.venv/bin/python # made by `make setup`: the Python that the project is for
[ -x "$python" ] || python=python3
"$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet "${packages[@]}"
touch "$ready"
