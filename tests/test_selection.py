"""Which tests a run takes: the long ones only where they are asked for by name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

TESTS = """
import pytest

def test_plain(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.exhaustive
def test_exhaustive(): pass

@pytest.mark.mutants
def test_mutant(): pass

@pytest.mark.slow
@pytest.mark.exhaustive
def test_slow_and_exhaustive(): pass
"""


CASES = {
    "": {"plain", "slow"},
    "-m=not slow": {"plain"},  # as the marker itself recommends
    "-m=mutants": {"mutant"},
    "-m=exhaustive": {"exhaustive", "slow_and_exhaustive"},
    "--exhaustive": {"plain", "slow", "exhaustive", "slow_and_exhaustive"},
    "--exhaustive -m=not slow": {"plain", "exhaustive"},
}
# All in one process, as each has to import jax.
COLLECT = """
import sys, pytest
for case in sys.argv[2:]:
    print("case", case, flush=True)
    options = [option.strip() for option in case.replace(" -m", "\\n-m").split("\\n")]
    pytest.main([*sys.argv[1].split(), *filter(None, options)])
"""


def test_long_tests_run_only_where_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    settings = f"-c pyproject.toml -p tests.conftest -p no:cacheprovider --rootdir {tmp_path}"
    command = [sys.executable, "-c", COLLECT, f"{settings} {tmp_path} --collect-only -q", *CASES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = {
        case: set(re.findall(r"::test_(\w+)$", listing, re.MULTILINE))
        for case, listing in re.findall(r"^case (.*)\n((?:(?!case ).*\n)*)", done.stdout, re.M)
    }
    assert found == CASES, done.stdout + done.stderr
