"""What the compilers made of a program, read from their log and listing, and the rules for it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.machine_code import sass, walk
from bench.machine_code.programs import Program


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has; shared memory in bytes.

    Attributes:
        shared_per_block: what one block may have.
        shared_per_processor: for all blocks.
        warps: of all blocks.
        tensor: the instruction of its tensor cores.
        threads: of a warp.
        registers: of all blocks.
        shared_reserved: per block, by the driver.
    """

    shared_per_block: int
    shared_per_processor: int
    warps: int
    tensor: str
    threads: int = 32
    registers: int = 65536
    shared_reserved: int = 1 << 10


LIMITS: dict[int | str, Limits] = {
    80: Limits(163 << 10, 164 << 10, 64, "HMMA"),
    86: Limits(99 << 10, 100 << 10, 48, "HMMA"),
    89: Limits(99 << 10, 100 << 10, 48, "HMMA"),
    90: Limits(227 << 10, 228 << 10, 64, "HGMMA"),
    100: Limits(227 << 10, 228 << 10, 64, "UTCHMMA"),
    120: Limits(99 << 10, 100 << 10, 48, "HMMA"),
    "gfx942": Limits(64 << 10, 64 << 10, 32, "MFMA", 64, 131072, 0),
    "gfx950": Limits(160 << 10, 160 << 10, 32, "MFMA", 64, 131072, 0),
}
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class LoopFigures:
    """The loop over full tiles of one source function.

    Attributes:
        instructions: of one iteration of a warp.
        issue_clocks: in which a processor quarter issues them for one block.
        local: loads and stores of spilled registers among them.
        tensor: tensor-core instructions among them, by name.
        tma: loads by descriptor among them.
        mix: instructions by pipe.
        useful: modelled clocks of the matrix products at the processor's peak rate.
        apart: modelled clocks of an iteration if nothing overlaps with matrix products.
        together: the same with perfect overlap.
        walk: modelled clocks of an iteration in the order of its instructions, on Hopper.
        masked_walk: the same of the loop over masked tiles.
    """

    instructions: int
    issue_clocks: float
    local: int
    tensor: dict[str, int]
    tma: int
    mix: dict[str, int]
    useful: float
    apart: float
    together: float
    walk: float | None = None
    masked_walk: float | None = None


@dataclass(frozen=True)
class Figures:
    """What the compiler made of a program; bytes where nothing else is said.

    Attributes:
        registers: per thread.
        spill_stores: local memory written per thread because registers ran out.
        spill_loads: local memory read for the same reason.
        shared: shared memory of a block.
        tensor_memory: columns of tensor memory (sm_100).
        instructions: in the code.
        tensor: tensor-core instructions in the code, by name.
        tma: loads by descriptor in the code.
        local: loads and stores of local memory in the code.
        descriptors: whether the kernel asks for loads by descriptor.
        serialized: ptxas said that it serialized asynchronous matrix products.
        loops: the loops over full tiles, by source function.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    tensor_memory: int = 0
    instructions: int = 0
    tensor: dict[str, int] = field(default_factory=dict)
    tma: int = 0
    local: int = 0
    descriptors: bool = False
    serialized: bool = False
    loops: dict[str, LoopFigures] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> Figures:
        """Inverse of `json.dumps(asdict(figures))`."""
        values = json.loads(text)
        loops = {name: LoopFigures(**loop) for name, loop in values.pop("loops").items()}
        return cls(**values, loops=loops)


@dataclass(frozen=True)
class Violation:
    """What keeps a program from running, or from running as it should.

    Attributes:
        rule: "compile", "shared", "tensor memory", "serialized", "registers", "spills",
            "loop spills", "tensor cores", "descriptors", "baseline", "blocks", "code" or
            "hot loop".
        text: the same in a sentence, with figures.
        figures: what an exception has to allow; empty where nothing can be allowed.
    """

    rule: str
    text: str
    figures: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """A program with its figures, or with the reason why there are none."""

    program: Program
    figures: Figures | None
    error: str = ""

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at a time."""
        if self.figures is None:
            return 0
        limits, warps = LIMITS[self.program.arch], self.program.warps
        # A thread is given registers in steps of eight.
        per_block = -(-self.figures.registers // 8) * 8 * limits.threads * warps
        bounds = [
            limits.registers // per_block,
            limits.shared_per_processor // max(1, self.figures.shared + limits.shared_reserved),
            limits.warps // warps,
        ]
        if self.figures.tensor_memory:
            bounds.append(TENSOR_MEMORY_COLUMNS // self.figures.tensor_memory)
        return min(bounds)

    @property
    def code(self) -> dict[str, int]:
        """Instructions and matrix products of all of it, for where loops are not read."""
        if self.figures is None:
            return {}
        products = sum(self.figures.tensor.values())
        return {"instructions": self.figures.instructions, "matrix products": products}

    def shares(self) -> tuple[float, float] | None:
        """Modelled share of peak without and with overlap, or None where there is no loop.

        For the backward, whose two kinds of programs compute S and dP twice, only the five products
        of the mathematics count as useful.
        """
        if self.figures is None or not self.figures.loops:
            return None
        useful = apart = together = 0.0
        for function, loop in self.figures.loops.items():
            kind = self.program.kind(function)
            area, width = self.program.area(kind), self.program.width(kind)
            useful += loop.useful / area * (1 - self.program.repeated(kind) / width)
            apart += loop.apart / area
            together += loop.together / area
        return useful / apart, useful / together

    def violations(self) -> list[Violation]:
        """What holds for every program, whatever its budget says."""
        return list(self._violations())

    def _violations(self) -> Iterator[Violation]:
        figures, program = self.figures, self.program
        if figures is None:
            yield Violation("compile", f"did not compile: {self.error}")
            return
        limits = LIMITS[program.arch]
        if figures.shared > limits.shared_per_block:
            text = f"needs {figures.shared} bytes of shared memory of {limits.shared_per_block}"
            yield Violation("shared", text)
        if figures.tensor_memory > TENSOR_MEMORY_COLUMNS:
            text = f"needs {figures.tensor_memory} columns of tensor memory"
            yield Violation("tensor memory", f"{text} of {TENSOR_MEMORY_COLUMNS}")
        if figures.serialized:
            yield Violation("serialized", "ptxas serialized its matrix products")
        if figures.registers <= 32 and program.has_loop and not program.is_amd:
            text = f"has {figures.registers} registers: ptxas gave up"
            yield Violation("registers", text, (figures.registers,))
        if figures.spill_stores or figures.spill_loads:
            spilled = (figures.spill_stores, figures.spill_loads)
            yield Violation("spills", f"spills {spilled[0]} / {spilled[1]} bytes", spilled)
        if program.is_amd:
            # How its loops go on is not read here, only whether they have what they need.
            if program.has_loop and not figures.tensor:
                yield Violation("tensor cores", "has no MFMA")
        elif program.has_loop and not figures.loops:
            yield Violation("tensor cores", "has no loop that multiplies matrices")
        for function, loop in figures.loops.items():
            where = f"in the full loop of {function}"
            yield from self._broken_by(loop, where, figures.descriptors)

    def _broken_by(self, loop: LoopFigures, where: str, descriptors: bool) -> Iterator[Violation]:
        dtype, tensor = self.program.dtype, LIMITS[self.program.arch].tensor
        if loop.local:
            text = f"has {loop.local} local-memory instructions {where}"
            yield Violation("loop spills", text, (loop.local,))
        # Full float32 has no tensor cores; tiles that suit it are too small for those of Hopper and
        # Blackwell in tf32, which then use Ampere's. In 16 bits these are slower on Hopper.
        missing = tensor not in loop.tensor if dtype != "tf32" else not loop.tensor
        if missing and dtype != "float32":
            yield Violation("tensor cores", f"has no {tensor} {where}, only {loop.tensor or 'FMA'}")
        elif tensor == "HGMMA" and dtype != "tf32" and "HMMA" in loop.tensor:
            yield Violation("tensor cores", f"has {loop.tensor['HMMA']} HMMA {where}")
        if descriptors and not loop.tma:
            yield Violation("descriptors", f"has no UTMALDG {where}")


def read_figures(
    program: Program,
    log: str,
    listing: str,
    *,
    shared: int,
    tensor_memory: int = 0,
    descriptors: bool = False,
) -> Figures:
    """Reads the log of `ptxas -v` and the listing of `nvdisasm -gi`."""

    def number(pattern: str) -> int:
        match = re.search(pattern, log)
        if match is None:
            raise ValueError(f"no {pattern!r} in what ptxas printed:\n{log}")
        return int(match.group(1))

    instructions, labels = sass.parse(listing)
    names = Counter(x.name for x in instructions)
    found = sass.loops(instructions, labels) if program.has_loop else []
    full, masked = (loops(found, program.calls) for loops in (sass.full_loops, sass.masked_loops))
    return Figures(
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        shared=shared,
        tensor_memory=tensor_memory,
        instructions=len(instructions),
        tensor={name: count for name, count in names.items() if sass.TENSOR.match(name)},
        tma=names["UTMALDG"],
        local=sum(names[name] for name in sass.LOCAL),
        descriptors=descriptors,
        serialized="serialized" in log,
        loops={
            name: _loop_figures(program, name, loop, masked.get(name))
            for name, loop in sorted(full.items())
        },
    )


def _loop_figures(
    program: Program, function: str, loop: sass.Loop, masked: sass.Loop | None
) -> LoopFigures:
    kind = program.kind(function)
    area = program.area(kind)
    assert isinstance(program.arch, int)
    clocks = sass.model(
        loop,
        program.arch,
        program.warps,
        useful_products=area * program.width(kind),
        issued_products=area * program.width(kind, padded=True),
        dtype=program.dtype,
    )
    walks = [
        None if x is None else walk.clocks(x, program.arch, program.warps, program.dtype)
        for x in (loop, masked)
    ]
    return LoopFigures(
        instructions=len(loop.instructions),
        issue_clocks=len(loop.instructions) * program.warps / 4,
        local=loop.local,
        tensor=loop.tensor,
        tma=loop.names["UTMALDG"],
        mix=loop.mix,
        useful=clocks.useful,
        apart=clocks.apart,
        together=clocks.together,
        walk=walks[0],
        masked_walk=walks[1],
    )
