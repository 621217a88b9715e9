"""What a compiled program's text and memory report tell: copies of the KV pool, collectives, VMEM.

A program can alias its pool and still copy it (into a temporary, and back), so aliasing alone
proves nothing; neither do small temporaries, if the copy goes into a fresh output, nor a text
without copies. Only the three together prove that nothing as large as the pool is moved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Set
from typing import NamedTuple

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
_COMPUTATION = re.compile(r"^(ENTRY )?%?[\w.-]+ .*\{$")
# An asynchronous one is a start and a done; a done is not counted.
_COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?%[\w.-]+ = .*? "
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)"
    r"(?:-start)?\("
)
_LAYER_LOOP = re.compile(r'op_name="jit\(\w+\)/while/body')
_KERNEL = re.compile(r"^\s*(?:ROOT )?%(\S+) = .*custom_call_target=\"tpu_custom_call\".*", re.M)
_SCOPED_MEMORY = re.compile(r'"used_scoped_memory_configs":\[([^\]]*)\]')
_VMEM_SIZE = re.compile(r'"memory_space":"1"[^}]*"size":"(\d+)"')


def pool_copies(
    compiled: jax.stages.Compiled,
    *,
    num_elements: int,
    num_bytes: int,
    smallest: int | None = None,
    weight_shapes: Collection[tuple[int, ...]] = (),
) -> list[str]:
    """Why a program may copy its pool; empty if it doesn't.

    Args:
      compiled: the program.
      num_elements: of the pool, on one device.
      num_bytes: of all that is donated, on one device; the pool is by far the largest part.
      smallest: elements of the smallest result that counts as a copy, such as one layer's share
        of the pool; by default half of the pool.
      weight_shapes: of the program's weights, on one device. A copy of that shape is one of a
        weight, as where a condition wants the LM head in another layout.
    """
    memory = compiled.memory_analysis()
    assert memory is not None
    found = unaliased(compiled, num_bytes)
    if memory.temp_size_in_bytes > num_bytes // 16:
        found.append(f"{memory.temp_size_in_bytes} temporary bytes for {num_bytes} of pool")
    text = compiled.as_text()
    assert text
    return found + _large_results(text, smallest or num_elements // 2, set(weight_shapes))


def unaliased(compiled: jax.stages.Compiled, num_bytes: int) -> list[str]:
    """Why a program may copy what is donated to it, of so many bytes on one device."""
    memory = compiled.memory_analysis()
    assert memory is not None
    if memory.alias_size_in_bytes < num_bytes:
        return [f"only {memory.alias_size_in_bytes} of {num_bytes} bytes are aliased"]
    return []


def _large_results(
    text: str, smallest: int, weight_shapes: Set[tuple[int, ...]] = frozenset()
) -> list[str]:
    """Instructions that make as much as the pool, and are not known to do so in place."""
    instructions = list(_INSTRUCTION.finditer(text))
    assert instructions, "the program's text is not in the form that is read here"
    shapes = {
        match["name"]: tuple(int(size) for size in match["shape"].split(",") if size)
        for match in instructions
    }
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    found = []
    for match in instructions:
        opcode = match["opcode"]
        # What is fused is in the text too.
        if sizes[match["name"]] < smallest or opcode in _HARMLESS or opcode == "fusion":
            continue
        if opcode.startswith("copy") and shapes[match["name"]] in weight_shapes:
            continue
        if opcode in _WRITES:
            operands = re.findall(r"%[\w.-]+", match["operands"])
            update = operands[2 if opcode == "scatter" else 1]
            if sizes[update] < smallest // 8:
                continue
        found.append(f"{opcode} makes {match['shape']} elements")
    return found


class Collectives(NamedTuple):
    """Collectives of a step by kind, and by how often they run.

    Attributes:
      layer: in the loop over layers. step: once a step. other: in conditions, for requests that
        ask for more than the likeliest token.
    """

    layer: dict[str, int]
    step: dict[str, int]
    other: dict[str, int]

    def __str__(self) -> str:
        parts = []
        for where, kinds in zip(("a layer", "a step", "on request"), self, strict=True):
            if kinds:
                counts = " + ".join(f"{count} {kind}" for kind, count in kinds.items())
                parts.append(f"{counts} {where}")
        return ", ".join(parts) or "none"


def collectives(*texts: str) -> Collectives:
    """The collectives in the texts of a step's programs; the layer loop is the one directly in a
    program."""
    computations: list[list[str]] = [[]]
    for line in "\n".join(texts).splitlines():
        if _COMPUTATION.match(line):
            computations.append([])
        computations[-1].append(line)
    counts = Collectives({}, {}, {})
    for lines in computations:
        kinds = [match[1] for line in lines if (match := _COLLECTIVE.match(line))]
        if lines[:1] and lines[0].startswith("ENTRY"):
            place = counts.step
        elif any(_LAYER_LOOP.search(line) for line in lines):
            place = counts.layer
        else:
            place = counts.other
        for kind in kinds:
            place[kind] = place.get(kind, 0) + 1
    return counts


def kernel_vmem(text: str) -> dict[str, int]:
    """Bytes of vector memory that each Pallas kernel of a program uses, by its instruction."""
    found = {}
    for line in _KERNEL.finditer(text):
        memory = _SCOPED_MEMORY.search(line[0])
        sizes = _VMEM_SIZE.findall(memory[1]) if memory else []
        found[line[1]] = sum(map(int, sizes))
    return found
