#!/usr/bin/env bash
# Create the virtual environment FOLDER, if it is missing or broken, and install octavo for
# development into it, with every dependency at the version constraints.txt pins.
#
#   scripts/make_venv.sh FOLDER [CONSTRAINTS]     (an empty CONSTRAINTS pins nothing)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
constraints=${2-constraints.txt}
version=3.12 # what constraints.txt was made for; .python-version names the same
export PIP_DISABLE_PIP_VERSION_CHECK=1

# Whether the command $1 is a Python of that version. It is run rather than looked up: the
# shims of pyenv exist for versions that aren't active.
is_wanted() {
    "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null
}

create() {
    local python
    for python in "python$version" python3 python; do
        if is_wanted "$python"; then
            "$python" -m venv --clear "$venv"
            return
        fi
    done
    if command -v uv >/dev/null; then
        uv venv --quiet --seed --clear --python "$version" "$venv"
        return
    fi
    echo "make: found no Python $version (tried python$version, python3, python and uv)." >&2
    echo "Install it, for example with 'pyenv install $version' or from" \
        "https://www.python.org/downloads/, then run make again." >&2
    return 1
}

if [ -x "$venv/bin/python" ] && ! is_wanted "$venv/bin/python" && "$venv/bin/python" -c ''; then
    echo "make: $venv holds $("$venv/bin/python" -V), but Python $version is wanted." >&2
    echo "Remove it with 'make distclean', then run make again." >&2
    exit 1
fi
# Without pip it is the remains of an interrupted run: start over.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || create

# The dependencies first, those of the build among them. Octavo is then built with these: a build in an
# environment of its own would fetch another jaxlib, and constraints would not hold there.
"$venv/bin/python" -m pip install --quiet ${constraints:+--constraint "$constraints"} \
    --requirement <("$venv/bin/python" -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")')
"$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
