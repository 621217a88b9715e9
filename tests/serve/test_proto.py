"""The checked-in stubs are what the proto file says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("proto/**/*.proto"))


def test_the_stubs_equal_what_the_generator_writes(tmp_path: Path) -> None:
    outs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "pyi")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iengine/rpc=proto", *outs, *PROTOS]
    subprocess.run(command, cwd=ROOT, check=True)
    generated = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*.py*")}
    assert len(generated) == 3 * len(PROTOS)
    for path, text in generated.items():
        assert (ROOT / path).read_text() == text, f"{path} is out of date; run `make proto`"
