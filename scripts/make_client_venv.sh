#!/usr/bin/env bash
# Create the virtual environment FOLDER with the client programs that REQUIREMENTS lists, which
# tests start as users would. Octavo is not in it.
#
#   scripts/make_client_venv.sh FOLDER REQUIREMENTS
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
requirements=$2
ready=$venv/.octavo-ready
export PIP_DISABLE_PIP_VERSION_CHECK=1
[ "$ready" -nt "$requirements" ] && exit 0

echo "installing what $requirements lists into $venv"
python=.venv/bin/python # made by `make setup`: the Python that the project is for
[ -x "$python" ] || python=python3
"$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --requirement "$requirements"
touch "$ready"
