"""Whether a compiled step copies the KV pool: three checks that only together prove it doesn't.

A program can alias its pool and still copy it (into a temporary, and back), so aliasing alone
proves nothing; neither do small temporaries, if the copy goes into a fresh output.
"""

from __future__ import annotations

import math
import re

import jax

# What may have a result as large as the pool: names for it, loops that carry it, and writes
# into a part of it, which XLA does in place where the pool is aliased.
_HARMLESS = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}
_WRITES = {"scatter", "dynamic-update-slice"}
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?(?P<name>%[\w.-]+) = \w+\[(?P<shape>[\d,]*)\]\S* (?P<opcode>[\w-]+)\("
    r"(?P<operands>[^)]*)\)",
    re.MULTILINE,
)


def copies_of_pool(compiled: jax.stages.Compiled, num_elements: int, num_bytes: int) -> list[str]:
    """Why a program may copy its pool; empty if it doesn't.

    Args:
      compiled: the program.
      num_elements, num_bytes: of the pool and all else that is donated; on one device. The
        pool is by far the largest part.
    """
    memory = compiled.memory_analysis()
    assert memory is not None
    found = []
    if memory.alias_size_in_bytes < num_bytes:
        found.append(f"only {memory.alias_size_in_bytes} of {num_bytes} bytes are aliased")
    if memory.temp_size_in_bytes > num_bytes // 16:
        found.append(f"{memory.temp_size_in_bytes} temporary bytes for {num_bytes} of pool")
    text = compiled.as_text()
    assert text
    sizes = {}
    instructions = list(_INSTRUCTION.finditer(text))
    assert instructions, "the program's text is not in the form that is read here"
    for match in instructions:
        shape = [int(size) for size in match["shape"].split(",") if size]
        sizes[match["name"]] = math.prod(shape)
    for match in instructions:
        if sizes[match["name"]] < num_elements // 2 or match["opcode"] in _HARMLESS:
            continue
        if match["opcode"] == "fusion":
            continue  # what is fused is in the text too
        if match["opcode"] in _WRITES:
            operands = re.findall(r"%[\w.-]+", match["operands"])
            update = operands[2 if match["opcode"] == "scatter" else 1]
            if sizes[update] < num_elements // 16:
                continue
        found.append(f"{match['opcode']} makes {match['shape']} elements")
    return found
