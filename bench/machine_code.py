"""Compiles the kernels ahead of time and reports their machine code, without a GPU.

`python -m bench.machine_code` compiles every kernel as the package's own launchers call it, in the
configurations of `everything`, and holds the result against `bench/machine_code_budget.json`.
`--arch`, `--dtype`, `--head-dim` and `--kernel` choose others. The shares of peak come from a model
that counts issue slots (`bench.sass`): nothing here is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import sass
from prefix_attn.kernels.config import Config, Tile, select_config

ROOT = Path(__file__).parents[1]
KERNELS = ("forward", "backward", "delta", "reduce")
# D, or D/DV where they differ.
HEAD_DIMS = ("64", "80", "96", "128", "192/128", "256")
ARCHITECTURES = (80, 90, 100)
# tf32: float32 inputs where torch.backends.cuda.matmul.allow_tf32 is set.
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "tf32"}
# What changes the kernels: arguments of `prefix_attention`, where sinks stands for a tensor, and
# the segments that a layout's queries are restricted to.
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window_size": 96},
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": True},
    "bidirectional": {"prefix_causal": False},
    "subset": {"queries_for": [1, 2]},
    "fused": {"deterministic": False},
}
COMBINED = ("window", "softcap", "sinks", "bidirectional")
HEADS, KV_HEADS = 32, 8
PROCESSORS = 132
NOTE = (
    "Compiled, not measured: nothing here ran on a GPU. The shares are those of a model that "
    "counts issue slots."
)
# Matrix products per tile of the loops that are as long or wide as D, and as DV, by what the name
# of their function holds.
PRODUCTS = {"forward": (1, 1), "key": (2, 2), "query": (2, 1)}
REGISTERS_PER_PROCESSOR = 65536


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has; shared memory in bytes."""

    shared_per_block: int
    shared_per_processor: int
    warps: int
    tensor: str


LIMITS = {
    80: Limits(163 << 10, 164 << 10, 64, "HMMA"),
    86: Limits(99 << 10, 100 << 10, 48, "HMMA"),
    89: Limits(99 << 10, 100 << 10, 48, "HMMA"),
    90: Limits(227 << 10, 228 << 10, 64, "HGMMA"),
    100: Limits(227 << 10, 228 << 10, 64, "UTCHMMA"),
    120: Limits(99 << 10, 100 << 10, 48, "HMMA"),
}
SHARED_RESERVED = 1 << 10  # per block, by the driver
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Program:
    """One kernel in one configuration.

    Attributes:
        kernel: its name without `_kernel`.
        capability: such as 90.
        dtype: a key of `DTYPES`.
        head_dim: D.
        config: tiles, warps, stages.
        options: keys of `OPTIONS`.
        head_dim_v: DV, or None for D.
    """

    kernel: str
    capability: int
    dtype: str
    head_dim: int
    config: Config
    options: tuple[str, ...] = ()
    head_dim_v: int | None = None

    @classmethod
    def from_selection(
        cls,
        kernel: str,
        capability: int,
        dtype: str,
        head_dim: int,
        options: tuple[str, ...] = (),
        head_dim_v: int | None = None,
    ) -> Program:
        """The program that the package would launch there."""
        config = select_config(
            capability,
            head_dim,
            DTYPES[dtype],
            PROCESSORS,
            head_dim_v=head_dim_v,
            tf32=dtype == "tf32",
        )
        return cls(kernel, capability, dtype, head_dim, config, options, head_dim_v)

    @property
    def dims(self) -> tuple[int, int]:
        """D and DV."""
        return self.head_dim, self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def label(self) -> str:
        """A short name, unique in a report."""
        size = f"D{self.head_dim}" + ("" if self.head_dim_v is None else f"/{self.head_dim_v}")
        parts = (f"sm_{self.capability}", SHORT[self.dtype], size, self.kernel)
        return " ".join((*parts, *self.options))

    @property
    def has_loop(self) -> bool:
        """Whether it is one of the kernels that multiply matrices."""
        return self.kernel in ("forward", "backward")

    @property
    def warps(self) -> int:
        """Warps of a block."""
        config = self.config
        return {"forward": config.forward_warps, "backward": config.backward_warps}.get(
            self.kernel, 4
        )

    @property
    def shape(self) -> str:
        """Tiles, warps and stages; for the backward those of dK and dV, then those of dQ."""
        tiles = {
            "forward": (self.config.forward,),
            "backward": (self.keys,) if self.is_fused else (self.keys, self.config.queries),
        }.get(self.kernel, ())
        text = " + ".join(f"{t.block_m}x{t.block_n} s{t.num_stages}" for t in tiles)
        return f"{text} w{self.warps}".strip()

    def area(self, function: str) -> int:
        """Scores in a tile of the loops of a source function."""
        config = self.config
        if self.kernel == "forward":
            return config.forward.area
        return self.keys.area if "key" in function else config.queries.area

    def width(self, function: str, *, padded: bool = False) -> int:
        """Multiply-adds per score in the loops of a source function."""
        d, dv = (1 << (x - 1).bit_length() if padded else x for x in self.dims)
        with_d, with_dv = next((n for word, n in PRODUCTS.items() if word in function), (1, 1))
        return (with_d + (self.is_fused and "key" in function)) * d + with_dv * dv

    def repeated(self, function: str) -> int:
        """The part of `width` that programs of the other kind compute as well: S and dP."""
        return sum(self.dims) if self.kernel == "backward" and "query" in function else 0

    @property
    def is_fused(self) -> bool:
        """Whether it is a backward in which programs that own keys add up dQ."""
        chosen = "fused" in self.options and self.kernel == "backward"
        return chosen and self.config.fused is not None

    @property
    def keys(self) -> Tile:
        """The tile of dK and dV."""
        bent_window = {"softcap", "window"} <= set(self.options)
        return self.config.keys_for(fused=self.is_fused, bent_window=bent_window)


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
            "loop spills", "tensor cores", "descriptors", "shape" or "hot loop".
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
        limits, warps = LIMITS[self.program.capability], self.program.warps
        # Registers are given to a warp in steps of 256.
        per_block = -(-self.figures.registers * 32 // 256) * 256 * warps
        bounds = [
            REGISTERS_PER_PROCESSOR // per_block,
            limits.shared_per_processor // (self.figures.shared + SHARED_RESERVED),
            limits.warps // warps,
        ]
        if self.figures.tensor_memory:
            bounds.append(TENSOR_MEMORY_COLUMNS // self.figures.tensor_memory)
        return min(bounds)

    def shares(self) -> tuple[float, float] | None:
        """Modelled share of peak without and with overlap, or None where there is no loop.

        For the backward, whose two kinds of programs compute S and dP twice, only the five products
        of the mathematics count as useful.
        """
        if self.figures is None or not self.figures.loops:
            return None
        useful = apart = together = 0.0
        for function, loop in self.figures.loops.items():
            area, width = self.program.area(function), self.program.width(function)
            useful += loop.useful / area * (1 - self.program.repeated(function) / width)
            apart += loop.apart / area
            together += loop.together / area
        return useful / apart, useful / together

    def violations(self) -> list[Violation]:
        """What holds for every program, whatever its budget says."""
        figures, program = self.figures, self.program
        if figures is None:
            return [Violation("compile", f"did not compile: {self.error}")]
        limits = LIMITS[program.capability]
        found = []
        if figures.shared > limits.shared_per_block:
            text = f"needs {figures.shared} bytes of shared memory of {limits.shared_per_block}"
            found.append(Violation("shared", text))
        if figures.tensor_memory > TENSOR_MEMORY_COLUMNS:
            text = f"needs {figures.tensor_memory} columns of tensor memory"
            found.append(Violation("tensor memory", f"{text} of {TENSOR_MEMORY_COLUMNS}"))
        if figures.serialized:
            found.append(Violation("serialized", "ptxas serialized its matrix products"))
        if figures.registers <= 32 and program.has_loop:
            text = f"has {figures.registers} registers: ptxas gave up"
            found.append(Violation("registers", text, (figures.registers,)))
        if figures.spill_stores or figures.spill_loads:
            spilled = (figures.spill_stores, figures.spill_loads)
            text = f"spills {spilled[0]} / {spilled[1]} bytes"
            found.append(Violation("spills", text, spilled))
        for function, loop in figures.loops.items():
            if loop.local:
                text = f"has {loop.local} local-memory instructions in the full loop of {function}"
                found.append(Violation("loop spills", text, (loop.local,)))
        if program.has_loop:
            found += self._missing_instructions(figures, limits.tensor)
        return found

    def _missing_instructions(self, figures: Figures, tensor: str) -> Iterator[Violation]:
        # Full float32 has no tensor cores; tiles that suit it are too small for those of Hopper and
        # Blackwell in tf32, which then use Ampere's. In 16 bits these are slower on Hopper.
        dtype = self.program.dtype
        if not figures.loops:
            yield Violation("tensor cores", "has no loop that multiplies matrices")
        for function, loop in figures.loops.items():
            missing = tensor not in loop.tensor if dtype != "tf32" else not loop.tensor
            if missing and dtype != "float32":
                text = (
                    f"has no {tensor} in the full loop of {function}, only {loop.tensor or 'FMA'}"
                )
                yield Violation("tensor cores", text)
            elif tensor == "HGMMA" and dtype != "tf32" and "HMMA" in loop.tensor:
                text = f"has {loop.tensor['HMMA']} HMMA in the full loop of {function}"
                yield Violation("tensor cores", text)
            if figures.descriptors and self.program.capability >= 90 and not loop.tma:
                yield Violation("descriptors", f"has no UTMALDG in the full loop of {function}")


class _StandInDriver:
    """Tells Triton which GPU to compile for; there is none to launch on."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        """The architecture."""
        return self.target

    def get_current_device(self) -> int:
        """Any device has the same architecture."""
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        """Nothing runs on it."""
        return 0


class _StandInKernel:
    """Compiles instead of launching, with the arguments that the launcher gives."""

    def __init__(self, function: Any, compiled: dict[str, list[Any]], wanted: str) -> None:
        self.function, self.compiled, self.wanted = function, compiled, wanted

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """Takes the place of `kernel[grid]`."""

        def launch(*arguments: Any, **named: Any) -> None:
            name = self.function.__name__.removesuffix("_kernel")
            if name == self.wanted and not self.compiled.get(name):
                self.function.device_caches.clear()
                result = self.function.run(*arguments, grid=grid, warmup=True, **named)
                self.compiled.setdefault(name, []).append(result)

        return launch


@contextlib.contextmanager
def _replaced(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _launch(program: Program) -> Any:
    """Calls the package as its users do; returns what the launcher had compiled."""
    import triton

    from prefix_attn import PrefixLayout, prefix_attention, triton_backend
    from prefix_attn.kernels import backward, forward

    compiled: dict[str, list[Any]] = {}
    stand_ins = [
        (module, name, _StandInKernel(value, compiled, program.kernel))
        for module in (forward, backward)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
    ]
    # One prefix, long enough that its key tiles are split, and too few members to fill tiles.
    layout = PrefixLayout.from_lengths([640], [[72, 300, 130]])
    dtype = DTYPES[program.dtype]
    arguments: dict[str, Any] = {}
    for option in program.options:
        arguments |= OPTIONS[option]
    if segments := arguments.pop("queries_for", None):
        layout = layout.queries_for(segments)
    head_dim, head_dim_v = program.dims
    sizes = (
        (layout.num_queries, HEADS, head_dim),
        (layout.num_tokens, KV_HEADS, head_dim),
        (layout.num_tokens, KV_HEADS, head_dim_v),
    )
    q, k, v = (torch.zeros(*size, dtype=dtype, requires_grad=True) for size in sizes)
    if "sinks" in arguments:
        arguments["sinks"] = torch.zeros(HEADS, requires_grad=True)
    changes = [
        *stand_ins,
        (triton_backend, "config_for", lambda *_, **__: program.config),
        (triton_backend, "why_not", lambda *_, **__: None),
        (torch.backends.cuda.matmul, "allow_tf32", program.dtype == "tf32"),
    ]
    triton.runtime.driver.set_active(_StandInDriver(program.capability))
    with _replaced(changes):
        out, lse = prefix_attention(q, k, v, layout, backend="triton", return_lse=True, **arguments)
        if not compiled.get(program.kernel):
            torch.autograd.backward((out, lse), (torch.ones_like(out), torch.ones_like(lse)))
    if not compiled.get(program.kernel):
        raise LookupError(f"no launcher started {program.kernel}_kernel")
    return compiled[program.kernel][0]


def compile_program(program: Program) -> Figures:
    """Compiles in this process, which a failing compiler may abort."""
    from triton import knobs

    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(log):
        # Triton runs ptxas with -v: its log, of exactly these flags, has registers and spills.
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        knobs.cache.dir = folder
        compiled = _launch(program)
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.nvdisasm.path, "-gi", "-c", str(cubin)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    metadata = compiled.metadata
    return read_figures(
        program,
        log.getvalue(),
        listing,
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        descriptors="descriptor_load" in compiled.asm["ttir"],
    )


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
    found = sass.full_loops(sass.loops(instructions, labels)) if program.has_loop else {}
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
        loops={name: _loop_figures(program, name, loop) for name, loop in sorted(found.items())},
    )


def _loop_figures(program: Program, function: str, loop: sass.Loop) -> LoopFigures:
    area = program.area(function)
    clocks = sass.model(
        loop,
        program.capability,
        program.warps,
        useful_products=area * program.width(function),
        issued_products=area * program.width(function, padded=True),
        dtype=program.dtype,
    )
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
    )


class Compiler:
    """A process that compiles one program after another, and is replaced if the compiler dies."""

    MARK = "figures "

    def __init__(self, root: Path = ROOT) -> None:
        """Starts nothing yet; `root` is the checkout whose kernels are compiled."""
        self.root = root
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, program: Program) -> Report:
        """Compiles one program."""
        if self.process is None:
            self._start()
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        self.errors.seek(0)
        self.errors.truncate()
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(program, process.stdin)
            process.stdin.flush()
        for raw in process.stdout:
            line = raw.decode(errors="replace")
            if line.startswith(self.MARK):
                return Report(program, Figures.from_json(line.removeprefix(self.MARK)))
        status = process.wait()
        self.close()
        return Report(program, None, f"{self._reason()} (exit status {status})")

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.communicate()
            self.process = None

    def _start(self) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        environment = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = str(self.root)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.machine_code", "--worker"],
            cwd=self.root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )

    def _reason(self) -> str:
        self.errors.seek(0)
        text = self.errors.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        # Triton chains its errors: the first one names the cause, the last one only the call.
        causes = [
            line for line in lines if re.match(r"[\w.]*(Error|Exception)\b(?!.*: at \d)", line)
        ]
        return (causes or lines[-1:] or ["the compiler printed nothing"])[0]


def work() -> None:
    """Compiles what arrives on standard input until it ends."""
    while True:
        try:
            program = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        print(f"{Compiler.MARK}{json.dumps(asdict(compile_program(program)))}", flush=True)


def compile_all(
    programs: list[Program],
    jobs: int,
    tick: Callable[[Report], None] = lambda report: None,
    root: Path = ROOT,
) -> list[Report]:
    """Compiles the programs, `jobs` at a time; calls tick after each, in order."""
    local = threading.local()
    compilers: list[Compiler] = []

    def one(program: Program) -> Report:
        if not hasattr(local, "compiler"):
            local.compiler = Compiler(root)
            compilers.append(local.compiler)
        return local.compiler(program)

    reports = []
    try:
        with ThreadPoolExecutor(jobs) as pool:
            for report in pool.map(one, programs):
                tick(report)
                reports.append(report)
    finally:
        for compiler in compilers:
            compiler.close()
    return reports


def selected(
    architectures: list[int],
    dtypes: list[str],
    head_dims: list[str],
    kernels: list[str],
    options: tuple[str, ...] = (),
) -> list[Program]:
    """What the package launches on these architectures; head dimensions as in `HEAD_DIMS`."""
    return [
        Program.from_selection(kernel, capability, dtype, head_dim, options, *head_dim_v)
        for capability in architectures
        for dtype in dtypes
        for head_dim, *head_dim_v in (map(int, size.split("/")) for size in head_dims)
        for kernel in kernels
    ]


def with_options(architectures: list[int], head_dims: list[str], *chosen: str) -> list[Program]:
    """Forward and backward with options, where these change them; bfloat16."""
    programs = selected(architectures, ["bfloat16"], head_dims, ["forward", "backward"], chosen)
    return [x for x in programs if "fused" not in chosen or x.is_fused]


def quick() -> list[Program]:
    """The set of the tests: three minutes on two cores."""
    plain = selected(list(ARCHITECTURES), ["bfloat16"], list(HEAD_DIMS), ["forward", "backward"])
    alone = [x for option in OPTIONS for x in with_options([90], ["128"], option)]
    combined = with_options([90], ["128"], *COMBINED)
    return plain + alone + combined + with_options([90, 100], ["64"], "fused")


def everything() -> list[Program]:
    """What is compiled by hand: `quick` and what other architectures, dtypes and sizes add to it.

    Options together hold more registers than each of them alone, so that other head dimensions than
    128 need these only. float16 differs from bfloat16 in no more than how values are converted.
    """
    architectures, both = list(ARCHITECTURES), ["forward", "backward"]
    programs = [
        *quick(),
        *selected(architectures, ["bfloat16"], list(HEAD_DIMS), ["delta", "reduce"]),
        *selected(architectures, ["float32"], ["64", "128", "256"], list(KERNELS)),
        *selected(architectures, ["tf32"], ["64", "128", "256"], both),
        *selected(architectures, ["float16"], ["64", "128"], both),
        *selected([89, 120], ["bfloat16"], ["64", "128", "256"], both),
        *(x for option in OPTIONS for x in with_options(architectures, ["128"], option)),
        *with_options(architectures, list(HEAD_DIMS), *COMBINED),
        *with_options(architectures, ["64", "128"], *COMBINED, "fused"),
    ]
    return list({program.label: program for program in programs}.values())


def missing_tools() -> str:
    """Why nothing can be compiled here; empty if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    from triton import knobs

    for name in ("ptxas", "ptxas_blackwell", "nvdisasm"):
        try:
            if getattr(knobs.nvidia, name) is not None:
                continue
        except (AttributeError, RuntimeError):
            pass
        return f"this Triton comes without {name.replace('_', '-')}, which the x86-64 wheel has"
    return ""


def table(reports: list[Report]) -> str:
    """Aligned text, one line per program and one below it per full loop."""
    header = (
        "program", "tiles, stages, warps", "regs", "spill st/ld", "shared KiB", "blocks",
        "instructions", "LDL+STL", "UTMALDG", "tensor cores", "share of peak (model)",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [header]
    for report in reports:
        program, figures = report.program, report.figures
        if figures is None:
            lines.append((program.label, program.shape, *("-",) * (len(header) - 2)))
            continue
        shares = report.shares()
        lines.append(
            (
                program.label,
                program.shape,
                str(figures.registers),
                f"{figures.spill_stores}/{figures.spill_loads}",
                f"{figures.shared / 1024:.1f}",
                str(report.blocks),
                str(figures.instructions),
                str(figures.local),
                str(figures.tma),
                _counts(figures.tensor),
                f"{shares[0]:.0%}-{shares[1]:.0%}" if shares else "",
            )
        )
        for function, loop in figures.loops.items():
            lines.append(
                (
                    f"  full loop of {function}",
                    _counts(loop.mix),
                    *[""] * 4,
                    str(loop.instructions),
                    str(loop.local),
                    str(loop.tma),
                    _counts(loop.tensor),
                    f"{loop.useful:.0f} of {loop.together:.0f}-{loop.apart:.0f} clocks",
                )
            )
    # The mix of a loop is longer than any cell, and runs over the empty ones behind it.
    widths = [
        max(len(line[i]) for line in lines if i != 1 or not line[0].startswith(" "))
        for i in range(len(header))
    ]
    text = []
    for line in lines:
        if line[0].startswith(" "):
            mix = sum(widths[1:6]) + 2 * 4
            text.append(f"{line[0].ljust(widths[0])}  {line[1].ljust(mix)}")
            cells = zip(line[6:], widths[6:], strict=True)
        else:
            text.append("")
            cells = zip(line, widths, strict=True)
        text[-1] += ("  " if text[-1] else "") + "  ".join(c.ljust(w) for c, w in cells)
    return "\n".join(line.rstrip() for line in text)


def _counts(counts: dict[str, int]) -> str:
    return " ".join(f"{name} {count}" for name, count in counts.items())


def as_json(reports: list[Report], triton_version: str) -> str:
    """All figures, with the versions that they depend on."""
    programs = []
    for report in reports:
        shares = report.shares()
        programs.append(
            {
                "label": report.program.label,
                **asdict(report.program),
                "shape": report.program.shape,
                "figures": report.figures and asdict(report.figures),
                "blocks": report.blocks,
                "modelled_share": shares and {"apart": shares[0], "together": shares[1]},
                "violations": [asdict(x) for x in report.violations()],
                "error": report.error,
            }
        )
    return json.dumps({"note": NOTE, "triton": triton_version, "programs": programs}, indent=1)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with the reason when it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the set of the tests")
    parser.add_argument("--arch", type=int, nargs="+", choices=list(LIMITS), help="80 90 100")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="all")
    parser.add_argument(
        "--head-dim", nargs="+", metavar="D", help=f"D or D/DV: {' '.join(HEAD_DIMS)}"
    )
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, help="all")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--update-budget",
        action="store_true",
        help="write the figures into bench/machine_code_budget.json; its exceptions stay",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    chosen = (options.arch, options.dtype, options.head_dim, options.kernel)
    if options.quick and any(chosen):
        parser.error("--quick chooses what to compile: leave out --arch, --dtype, and so on")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    for size in options.head_dim or ():
        if not re.fullmatch(r"\d+(/\d+)?", size):
            parser.error(f"--head-dim must be D or D/DV, such as 192/128, got {size!r}")
        for head_dim in size.split("/"):
            if not 1 <= int(head_dim) <= 256:
                parser.error(f"--head-dim must be in 1..256, got {head_dim}")
    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        parser.error(f"--json must name a file in a folder that exists, got {options.json}")
    options.programs = quick() if options.quick else everything()
    if any(chosen):
        options.programs = selected(
            options.arch or list(ARCHITECTURES),
            options.dtype or list(DTYPES),
            options.head_dim or list(HEAD_DIMS),
            options.kernel or list(KERNELS),
        )
    return options


def main() -> int:
    """Compiles and reports; 1 if a program is over its budget, 2 if nothing can be compiled."""
    options = parse()
    if options.worker:
        work()
        return 0
    if reason := missing_tools():
        print(f"python -m bench.machine_code: {reason}", file=sys.stderr)
        return 2
    import triton

    from bench.budget import Budget

    budget = Budget.from_file(triton_version=triton.__version__)
    programs, started, done = options.programs, time.monotonic(), 0

    def tick(report: Report) -> None:
        nonlocal done
        done += 1
        seconds = time.monotonic() - started
        left = seconds / done * (len(programs) - done)
        words = "; ".join(x.text for x in report.violations()) or "ok"
        print(
            f"[{done}/{len(programs)}, {left:.0f} s left] {report.program.label}: {words}",
            file=sys.stderr,
        )

    reports = compile_all(programs, options.jobs, tick)
    seconds = time.monotonic() - started
    print(f"\nTriton {triton.__version__}, {HEADS}/{KV_HEADS} heads. {NOTE}\n\n{table(reports)}\n")
    if options.json:
        options.json.write_text(as_json(reports, triton.__version__) + "\n")
    if options.update_budget:
        known = {program.label for program in everything()}
        budget = budget.updated(reports).pruned(known | {r.program.label for r in reports})
        budget.write()
        print(f"Written: {budget.path}")
    over = [(report, found) for report in reports if (found := budget.violations(report))]
    for report, found in over:
        for violation in found:
            print(f"{report.program.label}: {violation.rule}: {violation.text}")
    print(f"{len(reports)} programs in {seconds:.0f} s, {len(over)} over their budget")
    if missing := budget.missing(programs):
        print(
            f"{len(missing)} of them have no baseline for Triton {budget.triton}, so that their "
            "loops were compared with nothing: --update-budget writes them"
        )
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
