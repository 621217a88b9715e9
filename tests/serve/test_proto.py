"""The checked-in stubs are what the proto file says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTO = "proto/octavo/v1/generation.proto"


def test_the_stubs_equal_what_the_generator_writes(tmp_path: Path) -> None:
    outs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "pyi")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iengine/rpc=proto", *outs, PROTO]
    subprocess.run(command, cwd=ROOT, check=True)
    generated = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*.py*")}
    assert len(generated) == 3
    for path, text in generated.items():
        assert (ROOT / path).read_text() == text, f"{path} is out of date; run `make proto`"
