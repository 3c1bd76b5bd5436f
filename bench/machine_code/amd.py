"""Reads what Triton makes for GPUs of AMD: assembly, with what its compiler says of each kernel."""

from __future__ import annotations

import re
from collections import Counter

from bench.machine_code.figures import Figures
from bench.machine_code.programs import Program

_INSTRUCTION = re.compile(r"^\t([a-z]\w+)")
# Matrix products.
_TENSOR = re.compile(r"v_s?mfma_\w+")
# Memory of a thread, which holds what registers do not.
_SCRATCH = re.compile(r"scratch_(load|store)_(\w+)")
_BYTES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}


def read_figures(program: Program, assembly: str, *, shared: int) -> Figures:
    """Figures of a kernel; registers are vector registers, accumulators among them.

    Args:
        program: what was compiled.
        assembly: `amdgcn` of it.
        shared: bytes of shared memory of a block.

    Raises:
        ValueError: if the assembly does not say how many registers it needs.
    """
    registers = re.search(r"^\s*\.vgpr_count:\s+(\d+)", assembly, re.MULTILINE)
    if registers is None:
        raise ValueError(f"the assembly of {program.label} has no .vgpr_count")
    names = Counter(
        match[1] for line in assembly.splitlines() if (match := _INSTRUCTION.match(line))
    )
    spilled = Counter[str]()
    for name, count in names.items():
        if match := _SCRATCH.match(name):
            spilled[match[1]] += count * _width(match[2])
    return Figures(
        registers=int(registers[1]),
        spill_stores=spilled["store"],
        spill_loads=spilled["load"],
        shared=shared,
        instructions=sum(names.values()),
        tensor={name: count for name, count in names.items() if _TENSOR.match(name)},
        local=sum(count for name, count in names.items() if _SCRATCH.match(name)),
    )


def _width(name: str) -> int:
    """Bytes that a thread moves: `dwordx4`, `short_d16_hi`."""
    unit, _, times = name.split("_")[0].partition("x")
    return _BYTES[unit] * int(times or 1)
