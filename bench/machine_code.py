"""Compiles the kernels ahead of time and reports their machine code, without a GPU.

`python -m bench.machine_code` compiles every kernel in the configurations that the package would
launch. The figures say what the compiler made, not how fast it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from prefix_attn.kernels.config import Config, Tile, select_config

ROOT = Path(__file__).parents[1]
KERNELS = ("forward", "backward", "delta", "reduce")
HEAD_DIMS = (64, 80, 128, 256)
ARCHITECTURES = (80, 90, 100)
# tf32: float32 inputs where torch.backends.cuda.matmul.allow_tf32 is set.
DTYPES = ("bfloat16", "float32", "tf32")
SHORT = {"bfloat16": "bf16", "float32": "fp32", "tf32": "tf32"}
GROUP = 4
NOTE = "Compiled, not measured: nothing here ran on a GPU."

# Tensor-core instructions: Ampere and consumer Blackwell, Hopper, data-centre Blackwell.
TENSOR = re.compile(r"^(HMMA|HGMMA|UTC\w*MMA)$")
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
    """One kernel in one configuration."""

    kernel: str
    capability: int
    dtype: str
    head_dim: int
    config: Config

    @classmethod
    def from_selection(cls, kernel: str, capability: int, dtype: str, head_dim: int) -> Program:
        """The program that the package would launch there."""
        torch_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        return cls(
            kernel,
            capability,
            dtype,
            head_dim,
            select_config(capability, head_dim, torch_dtype, 132),
        )

    @classmethod
    def from_json(cls, text: str) -> Program:
        """Inverse of `json.dumps(asdict(program))`."""
        values = json.loads(text)
        config = values.pop("config")
        tiles = {name: Tile(**config.pop(name)) for name in ("forward", "keys", "queries")}
        return cls(**values, config=Config(**tiles, **config))

    @property
    def label(self) -> str:
        """A short name, unique in a report."""
        return f"sm_{self.capability} {SHORT[self.dtype]} D{self.head_dim} {self.kernel}"

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
            "backward": (self.config.keys, self.config.queries),
        }.get(self.kernel, ())
        text = " + ".join(f"{t.block_m}x{t.block_n} s{t.num_stages}" for t in tiles)
        return f"{text} w{self.warps}".strip()


@dataclass(frozen=True)
class Figures:
    """What the compiler made of a program; bytes where nothing else is said.

    Attributes:
        registers: per thread.
        spill_stores: local memory written per thread because registers ran out.
        spill_loads: local memory read for the same reason.
        shared: shared memory of a block.
        tensor_memory: columns of tensor memory (sm_100).
        tensor: tensor-core instructions in the code, by name.
        serialized: ptxas said that it serialized asynchronous matrix products.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    tensor_memory: int = 0
    tensor: dict[str, int] = field(default_factory=dict)
    serialized: bool = False


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

    def problems(self) -> list[str]:
        """What keeps the program from running, or from running as it should; empty if nothing."""
        figures, program = self.figures, self.program
        if figures is None:
            return [f"did not compile: {self.error}"]
        limits = LIMITS[program.capability]
        found = []
        if figures.shared > limits.shared_per_block:
            found.append(
                f"needs {figures.shared} bytes of shared memory, "
                f"sm_{program.capability} has {limits.shared_per_block}"
            )
        if figures.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(
                f"needs {figures.tensor_memory} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}"
            )
        if figures.serialized:
            found.append("ptxas serialized its matrix products")
        if figures.registers <= 32 and program.kernel in ("forward", "backward"):
            found.append(
                f"has {figures.registers} registers and spills {figures.spill_stores} bytes: "
                "ptxas gave up"
            )
        if figures.spill_stores and program.kernel == "forward":
            found.append(f"spills {figures.spill_stores} / {figures.spill_loads} bytes")
        if program.kernel in ("forward", "backward"):
            # Tiles that suit full float32 are too small for Hopper's instruction in tf32.
            missing = {
                "bfloat16": limits.tensor not in figures.tensor,
                "tf32": not figures.tensor,
                "float32": False,
            }[program.dtype]
            if missing:
                found.append(f"has no {limits.tensor}, only {figures.tensor or 'scalar products'}")
        return found


def signature(function: Any, dtype: str) -> dict[str, str]:
    """Types of the arguments of a kernel, as the launchers pass them."""
    element = "bf16" if dtype == "bfloat16" else "fp32"
    tensors = {"q", "k", "v", "out", "dout", "dq", "dk", "dv", "grad"}
    sums = {"lse", "dlse", "delta", "dk_part", "dv_part", "part"}

    def kind(parameter: Any) -> str:
        name = parameter.name
        if parameter.is_constexpr:
            return "constexpr"
        if name == "scale":
            return "fp32"
        if not name.endswith("_ptr"):
            return "i32"
        stem = name.removesuffix("_ptr")
        return f"*{element}" if stem in tensors else "*fp32" if stem in sums else "*i32"

    return {parameter.name: kind(parameter) for parameter in function.params}


def constants(program: Program) -> dict[str, Any]:
    """Values of all constexpr parameters of all kernels."""
    import triton
    import triton.language as tl

    from prefix_attn.kernels.backward import DELTA_BLOCK_M

    block_d = triton.next_power_of_2(program.head_dim)
    config = program.config
    values = {
        "GROUP": GROUP,
        "D": program.head_dim,
        "DV": program.head_dim,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_d,
        "NUM_STAGES": config.forward.num_stages,
        "KEYS_M": config.keys.block_m,
        "KEYS_N": config.keys.block_n,
        "KEYS_STAGES": config.keys.num_stages,
        "QUERIES_M": config.queries.block_m,
        "QUERIES_N": config.queries.block_n,
        "QUERIES_STAGES": config.queries.num_stages,
        "NEGATIVE_SCALE": False,
        "HAS_DLSE": True,
        "ACC": tl.float32,
        "PRECISION": "tf32" if program.dtype == "tf32" else "ieee",
        "BLOCK_M": config.forward.block_m,
        "BLOCK_N": config.forward.block_n,
    }
    if program.kernel == "delta":
        values["BLOCK_M"] = DELTA_BLOCK_M
    if program.kernel == "reduce":
        values["BLOCK_N"] = config.keys.block_n
    return values


def compile_program(program: Program) -> Figures:
    """Compiles in this process, which a failing compiler may abort."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prefix_attn.kernels import backward, forward

    module = forward if program.kernel == "forward" else backward
    function = getattr(module, f"{program.kernel}_kernel")
    types = signature(function, program.dtype)
    values = constants(program)
    # The launchers' tensors are aligned; strides of whole heads are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or name.startswith("stride")
    }
    source = ASTSource(
        function,
        types,
        constexprs={name: values[name] for name, kind in types.items() if kind == "constexpr"},
        attrs=aligned,
    )
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(log):
        # Triton runs ptxas with -v: its log, of exactly these flags, has registers and spills.
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        knobs.cache.dir = folder
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", program.capability, 32),
            options={"num_warps": program.warps, "enable_fp_fusion": True},
        )
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    metadata = compiled.metadata
    return read_figures(log.getvalue(), sass, metadata.shared, getattr(metadata, "tmem_size", 0))


def read_figures(log: str, sass: str, shared: int, tensor_memory: int | None) -> Figures:
    """Reads the log of `ptxas -v` and the listing of `cuobjdump -sass`."""

    def number(pattern: str) -> int:
        match = re.search(pattern, log)
        if match is None:
            raise ValueError(f"no {pattern!r} in what ptxas printed:\n{log}")
        return int(match.group(1))

    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z0-9_]+)", sass, re.MULTILINE)
    return Figures(
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        shared=shared,
        tensor_memory=tensor_memory or 0,
        tensor=dict(Counter(opcode for opcode in opcodes if TENSOR.match(opcode))),
        serialized="serialized" in log,
    )


def compile_apart(program: Program) -> Report:
    """Compiles in a process of its own."""
    command = [sys.executable, "-m", "bench.machine_code", "--worker", json.dumps(asdict(program))]
    environment = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return Report(program, Figures(**json.loads(done.stdout.splitlines()[-1])))
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # Triton chains its errors: the first one names the cause, the last one only the call.
    causes = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b(?!.*: at \d)", line)]
    reason = (causes or lines[-1:] or ["the compiler printed nothing"])[0]
    return Report(program, None, f"{reason} (exit status {done.returncode})")


def compile_all(
    programs: list[Program], jobs: int, tick: Callable[[Report], None] = lambda report: None
) -> list[Report]:
    """Compiles the programs, `jobs` at a time; calls tick after each, in order."""

    def reports() -> Iterator[Report]:
        with ThreadPoolExecutor(jobs) as pool:
            for report in pool.map(compile_apart, programs):
                tick(report)
                yield report

    return list(reports())


def selected(
    architectures: list[int], dtypes: list[str], head_dims: list[int], kernels: list[str]
) -> list[Program]:
    """What the package launches on these architectures."""
    return [
        Program.from_selection(kernel, capability, dtype, head_dim)
        for capability in architectures
        for dtype in dtypes
        for head_dim in head_dims
        for kernel in kernels
    ]


def quick() -> list[Program]:
    """The set of the tests: under two minutes on two cores."""
    return selected([80, 90], ["bfloat16"], [64, 128], ["forward", "backward"])


def missing_tools() -> str:
    """Why nothing can be compiled here; empty if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    from triton import knobs

    for name in ("ptxas", "ptxas_blackwell", "cuobjdump"):
        try:
            if getattr(knobs.nvidia, name) is not None:
                continue
        except (AttributeError, RuntimeError):
            pass
        return f"this Triton comes without {name.replace('_', '-')}, which the x86-64 wheel has"
    return ""


def table(reports: list[Report]) -> str:
    """Aligned text, one line per program."""
    header = (
        "arch", "dtype", "D", "kernel", "tiles, stages, warps", "regs", "spill st/ld", "shared KiB",
        "blocks", "tensor cores", "problem",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [header]
    for report in reports:
        program, figures = report.program, report.figures
        lines.append(
            (
                f"sm_{program.capability}",
                SHORT[program.dtype],
                str(program.head_dim),
                program.kernel,
                program.shape,
                *(
                    (
                        str(figures.registers),
                        f"{figures.spill_stores}/{figures.spill_loads}",
                        f"{figures.shared / 1024:.1f}",
                        str(report.blocks),
                        " ".join(f"{name} {count}" for name, count in figures.tensor.items()),
                    )
                    if figures
                    else ("-",) * 5
                ),
                "; ".join(report.problems()),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_json(reports: list[Report], triton_version: str) -> str:
    """All figures, with the versions that they depend on."""
    return json.dumps(
        {
            "note": NOTE,
            "triton": triton_version,
            "programs": [
                {
                    "label": report.program.label,
                    **asdict(report.program),
                    "figures": report.figures and asdict(report.figures),
                    "blocks": report.blocks,
                    "problems": report.problems(),
                }
                for report in reports
            ],
        },
        indent=1,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with the reason when it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="forward and backward, bf16, D 64 and 128, sm_80, sm_90",
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=list(LIMITS), help="80 90 100")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="all")
    parser.add_argument("--head-dim", type=int, nargs="+", metavar="D", help="64 80 128 256")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, help="all")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--worker", metavar="PROGRAM", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    chosen = (options.arch, options.dtype, options.head_dim, options.kernel)
    if options.quick and any(chosen):
        parser.error("--quick chooses what to compile: leave out --arch, --dtype, and so on")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    for head_dim in options.head_dim or ():
        if not 16 <= head_dim <= 256:
            parser.error(f"--head-dim must be in 16..256, got {head_dim}")
    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        parser.error(f"--json must name a file in a folder that exists, got {options.json}")
    return options


def main() -> int:
    """Compiles and reports; 1 if a program has a problem, 2 if nothing can be compiled here."""
    options = parse()
    if options.worker:
        print(json.dumps(asdict(compile_program(Program.from_json(options.worker)))))
        return 0
    if reason := missing_tools():
        print(f"python -m bench.machine_code: {reason}", file=sys.stderr)
        return 2
    programs = (
        quick()
        if options.quick
        else selected(
            options.arch or list(ARCHITECTURES),
            options.dtype or list(DTYPES),
            options.head_dim or list(HEAD_DIMS),
            options.kernel or list(KERNELS),
        )
    )
    started, done = time.monotonic(), 0

    def tick(report: Report) -> None:
        nonlocal done
        done += 1
        seconds = time.monotonic() - started
        left = seconds / done * (len(programs) - done)
        words = "; ".join(report.problems()) or "ok"
        print(
            f"[{done}/{len(programs)}, {left:.0f} s left] {report.program.label}: {words}",
            file=sys.stderr,
        )

    reports = compile_all(programs, options.jobs, tick)
    import triton

    print(f"\nTriton {triton.__version__}, group size {GROUP}. {NOTE}\n\n{table(reports)}\n")
    wrong = [report for report in reports if report.problems()]
    print(
        f"{len(reports)} programs in {time.monotonic() - started:.0f} s, {len(wrong)} with problems"
    )
    if options.json:
        options.json.write_text(as_json(reports, triton.__version__) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
