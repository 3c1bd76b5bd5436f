"""Reads machine code as `nvdisasm -gi` lists it: loops, their instruction mix, a model of time.

The model counts issue slots and pipe slots of one iteration of a loop. It knows no latency, no
cache and no memory, so it says how fast a loop could run at best, not how fast it runs.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import networkx

# Tensor-core instructions: Ampere and consumer Blackwell, Hopper, data-centre Blackwell.
TENSOR = re.compile(r"^(HMMA|HGMMA|UTC\w*MMA)$")
LOCAL = ("LDL", "STL")

_ADDRESS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_LINE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)')
_TARGET = re.compile(r"\(?(\.L_x_\d+)\)?|0x([0-9a-f]+)\s*$")
_BRANCHES = ("BRA", "JMP", "EXIT", "RET", "BRX")
# A loop of so few instructions waits for a barrier.
WAIT_INSTRUCTIONS = 12
# A loop of a program without tensor cores computes if it has this many multiply-adds.
MIN_MULTIPLY_ADDS = 32

PIPES = {
    "tensor": r"HGMMA|HMMA|IMMA|UTC\w*MMA",
    "mufu": r"MUFU",
    "fma": r"FFMA|FMUL|FADD|IMAD|HFMA2|HADD2|HMUL2",
    "alu": r"FMNMX|FSEL|SEL|FSETP|ISETP|LOP3|PLOP3|PRMT|SHF|IADD|VIADD|LEA|MOV|IMNMX|VIMNMX|F2FP"
    r"|FSET|SGXT|POPC|BMSK|R2P|P2R",
    "convert": r"F2F|F2I|I2F|FRND",
    "shuffle": r"SHFL",
    "shared": r"LDS|STS|ATOMS|LDSM|STSM",
    "copy": r"LDGSTS|UTMA|UBLKCP",
    "global": r"LDG|STG|LD$|ST$|RED|ATOM",
    "local": r"LDL|STL",
    "sync": r"BAR|SYNCS|WARPGROUP|WARPSYNC|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|NANOSLEEP|BSYNC|BSSY|ELECT"
    r"|UTCBAR",
    "tensor memory": r"LDTM|STTM|UTCCP|UTCATOM",
    "uniform": r"U[A-Z]|R2UR|S2UR|VOTEU|REDUX",
    "branch": r"BRA|EXIT|CALL|RET|JMP|NOP",
}
_ORDER = ("tensor", "copy", "sync", "tensor memory", *PIPES)
_PIPES = {name: re.compile(f"(?:{PIPES[name]})") for name in _ORDER}

# Warp instructions per clock and processor quarter, from the throughput table of the CUDA C++
# programming guide.
RATES = {"fma": 1.0, "alu": 0.5, "mufu": 1 / 8, "convert": 1 / 8, "shuffle": 1 / 4}
AMPERE_RATES = {**RATES, "fma": 0.5}
# Dense multiply-adds per clock and processor: 16-bit on tensor cores (tf32 has half of it), and
# full float32.
TENSOR_RATE = {80: 1024, 86: 512, 89: 512, 90: 2048, 100: 4096, 120: 512}
FLOAT32_RATE = {80: 64, 86: 128, 89: 128, 90: 128, 100: 128, 120: 128}
# Share of that rate which Ampere's instruction has. On Hopper the peak is that of HGMMA; that HMMA
# has half of it, which is its rate on Ampere, is an assumption.
HMMA_SHARE = {90: 0.5}
# Bytes of shared memory that a processor reads per clock.
SHARED_BYTES = 128


@dataclass(frozen=True)
class Instruction:
    """One instruction; `line` is (file, line) of the innermost source line, where there is one."""

    address: int
    predicate: str
    opcode: str
    operands: str
    line: tuple[str, int] | None = None

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @cached_property
    def pipe(self) -> str:
        """The unit that executes it."""
        return next((pipe for pipe, pattern in _PIPES.items() if pattern.match(self.name)), "other")


@dataclass(frozen=True)
class Loop:
    """An innermost loop that computes.

    Attributes:
        function: source function whose loop this is, or "" without line information.
        instructions: of one iteration, barrier waits left out.
    """

    function: str
    instructions: list[Instruction]

    @cached_property
    def names(self) -> Counter[str]:
        """Instructions by name."""
        return Counter(x.name for x in self.instructions)

    @cached_property
    def mix(self) -> dict[str, int]:
        """Instructions by pipe, most frequent first."""
        return dict(Counter(x.pipe for x in self.instructions).most_common())

    @property
    def local(self) -> int:
        """Loads from and stores to local memory: spilled registers."""
        return sum(self.names[name] for name in LOCAL)

    @property
    def selects(self) -> int:
        """What a mask needs, and a loop over full tiles does not: selections of scores."""
        return self.names["FSEL"] + self.names["SEL"]

    @property
    def tensor(self) -> dict[str, int]:
        """Tensor-core instructions by name."""
        return {name: n for name, n in self.names.items() if TENSOR.match(name)}


@dataclass(frozen=True)
class Clocks:
    """Modelled clocks of one iteration of one block on one processor.

    Attributes:
        useful: matrix products at the processor's peak rate, without padding or duplicates.
        tensor: matrix products as they are issued; shared memory that they read may take longer.
        other: the busiest of the issue slots and the other pipes.
    """

    useful: float
    tensor: float
    other: float

    @property
    def apart(self) -> float:
        """Matrix products and everything else one after the other."""
        return self.tensor + self.other

    @property
    def together(self) -> float:
        """The same, perfectly overlapped."""
        return max(self.tensor, self.other)


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the address of each label, of what `nvdisasm -gi` printed."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    line: tuple[str, int] | None = None
    fresh = False
    for text in listing.splitlines():
        if match := _LINE.match(text):
            # The first line of a chain of inlined calls is the innermost.
            if not fresh:
                line, fresh = (match[1], int(match[2])), True
        elif match := _LABEL.match(text):
            waiting.append(match[1])
        elif match := _ADDRESS.match(text):
            address, body, fresh = int(match[1], 16), match[2], False
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            predicate = ""
            if body.startswith("@"):
                predicate, body = body.split(None, 1)
            opcode, _, operands = body.partition(" ")
            instructions.append(Instruction(address, predicate, opcode, operands.strip(), line))
    return instructions, labels


def loops(instructions: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    """Innermost loops that compute, in the order of their addresses."""
    blocks, successors = _blocks(instructions, labels)
    natural = _natural_loops(successors)

    def size(body: set[int]) -> int:
        return sum(len(blocks[block]) for block in body)

    waits = {
        block for body in natural.values() if size(body) <= WAIT_INSTRUCTIONS for block in body
    }
    real = {head: body for head, body in natural.items() if size(body) > WAIT_INSTRUCTIONS}
    found = []
    for head, body in sorted(real.items()):
        if any(other != head and other in body for other in real):
            continue
        inside = sorted(
            (x for block in body if block == head or block not in waits for x in blocks[block]),
            key=lambda x: x.address,
        )
        found.append(Loop(_function(inside), inside))
    computing = [loop for loop in found if loop.tensor]
    return computing or [loop for loop in found if loop.names["FFMA"] >= MIN_MULTIPLY_ADDS]


def full_loops(found: list[Loop], calls: dict[str, int] | None = None) -> dict[str, Loop]:
    """The loop over full tiles of each call of a source function: that with the fewest selections.

    Args:
        found: in the order of their addresses.
        calls: how often functions are called, if more than once. Their code follows the order of
            the calls, and their loops are named `key_tile`, `key_tile 2`.
    """
    return {
        name: min(of_call, key=lambda loop: (loop.selects, len(loop.instructions)))
        for name, of_call in _by_call(found, calls or {}).items()
    }


def masked_loops(found: list[Loop], calls: dict[str, int] | None = None) -> dict[str, Loop]:
    """The loop over masked tiles of each call, where it has one: that with the most selections."""
    full = full_loops(found, calls)
    return {
        name: max((x for x in of_call if x is not full[name]), key=lambda loop: loop.selects)
        for name, of_call in _by_call(found, calls or {}).items()
        if len(of_call) > 1
    }


def _by_call(found: list[Loop], calls: dict[str, int]) -> dict[str, list[Loop]]:
    by_function: dict[str, list[Loop]] = defaultdict(list)
    for loop in found:
        by_function[loop.function].append(loop)
    by_call = {}
    for function, loops in by_function.items():
        count = calls.get(function, 1)
        for i in range(count):
            name = f"{function} {i + 1}" if i else function
            by_call[name] = loops[i * len(loops) // count : (i + 1) * len(loops) // count]
    return by_call


def model(
    loop: Loop,
    capability: int,
    warps: int,
    useful_products: float,
    issued_products: float,
    dtype: str,
) -> Clocks:
    """Clocks of one iteration.

    Args:
        loop: what is modelled.
        capability: such as 90.
        warps: of a block.
        useful_products: multiply-adds of an iteration that the mathematics needs.
        issued_products: the same with padded head dimensions; used where an instruction does not
            tell its size (sm_100).
        dtype: "bfloat16", "float16", "tf32" or "float32".
    """
    quarter = warps / 4
    rates = AMPERE_RATES if capability == 80 else RATES
    other = max(
        len(loop.instructions) * quarter,
        *(loop.mix.get(pipe, 0) * quarter / rate for pipe, rate in rates.items()),
    )
    if not loop.tensor:
        return Clocks(useful_products / FLOAT32_RATE[capability], 0.0, other)
    rate = _tensor_rate(capability, dtype)
    products = [product_clocks(x, capability, warps, dtype) for x in loop.instructions]
    tensor, read = (sum(column) for column in zip(*products, strict=True))
    if not tensor:
        tensor = issued_products / rate
    return Clocks(useful_products / rate, max(tensor, read), other)


def product_clocks(x: Instruction, capability: int, warps: int, dtype: str) -> tuple[float, float]:
    """Clocks of a matrix product of one block, and those of reading its operands; 0 for others."""
    rate, quarter = _tensor_rate(capability, dtype), warps / 4
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", x.opcode):
        m, n, k = map(int, match.groups())
        operands = [text.strip() for text in x.operands.split(",")]
        from_shared = len(operands) > 1 and operands[1].startswith("gdesc")
        # k elements are 32 bytes of each row, in every type.
        read = quarter * 32 * (n + (m if from_shared else 0)) / SHARED_BYTES
        return quarter * m * n * k / rate, read
    if match := re.match(r"HMMA\.(16)(8)(\d+)", x.opcode):
        m, n, k = map(int, match.groups())
        return warps * m * n * k / (rate * HMMA_SHARE.get(capability, 1.0)), 0.0
    return 0.0, 0.0


def _tensor_rate(capability: int, dtype: str) -> float:
    return TENSOR_RATE[capability] / (2 if dtype in ("tf32", "float32") else 1)


def _blocks(
    instructions: list[Instruction], labels: dict[str, int]
) -> tuple[dict[int, list[Instruction]], dict[int, list[int]]]:
    """Basic blocks by first address, and the blocks that may follow each."""
    addresses = [x.address for x in instructions]
    index = {address: i for i, address in enumerate(addresses)}

    def target(x: Instruction) -> int | None:
        match = _TARGET.search(x.operands)
        if not x.name.startswith(("BRA", "JMP")) or match is None:
            return None
        return labels.get(match[1]) if match[1] else int(match[2], 16)

    leaders = set(addresses[:1])
    for i, x in enumerate(instructions):
        if x.name in _BRANCHES:
            leaders.update(addresses[i + 1 : i + 2])
        if (to := target(x)) is not None:
            leaders.add(to)
    starts = sorted(leader for leader in leaders if leader in index)
    blocks: dict[int, list[Instruction]] = {}
    successors: dict[int, list[int]] = {}
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        block = instructions[index[start] : len(instructions) if end is None else index[end]]
        last = block[-1]
        # A uniform branch names its predicate among the operands.
        always = not last.predicate and not re.match(r"!?U?P\d", last.operands)
        following = [to] if (to := target(last)) in index and to is not None else []
        if end is not None and not (always and last.name in _BRANCHES):
            following.append(end)
        blocks[start], successors[start] = block, following
    return blocks, successors


def _natural_loops(successors: dict[int, list[int]]) -> dict[int, set[int]]:
    """Blocks of each natural loop, by its head."""
    if not successors:
        return {}
    entry = next(iter(successors))
    graph = networkx.DiGraph(successors)
    graph = graph.subgraph({entry, *networkx.descendants(graph, entry)})
    dominator = networkx.immediate_dominators(graph, entry)

    def dominates(head: int, node: int) -> bool:
        while node not in (head, entry):
            node = dominator[node]
        return node == head

    found: dict[int, set[int]] = {}
    for node, head in graph.edges:
        if dominates(head, node):
            # What reaches the branch back to the head without passing the head.
            rest = graph.subgraph(graph.nodes - {head})
            inside = set() if node == head else {node, *networkx.ancestors(rest, node)}
            found.setdefault(head, {head}).update(inside)
    return found


@cache
def _source_loops(path: str) -> list[tuple[str, int, int]]:
    """(function, first line, last line) of each loop of a source file."""
    try:
        tree = ast.parse(Path(path).read_text())
    except OSError:
        return []
    return [
        (function.name, loop.lineno, loop.end_lineno or loop.lineno)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for loop in ast.walk(function)
        if isinstance(loop, ast.While)
        or (isinstance(loop, ast.For) and "static_range" not in ast.unparse(loop.iter))
    ]


def _function(instructions: list[Instruction]) -> str:
    """The source function in whose loops most of the instructions lie."""
    votes = Counter(
        function
        for x in instructions
        if x.line
        for function, first, last in _source_loops(x.line[0])
        if first <= x.line[1] <= last
    )
    return votes.most_common(1)[0][0] if votes else ""
