"""Compiles programs as the package's own launchers call them, in processes that may die.

`python -m bench.machine_code.compile` is one: it compiles what arrives on standard input.
"""

from __future__ import annotations

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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bench.cases import DTYPES
from bench.machine_code import amd
from bench.machine_code.figures import Figures, Report, read_figures
from bench.machine_code.programs import HEADS, KV_HEADS, OPTIONS, Program

ROOT = Path(__file__).parents[2]


def stand_in_driver(arch: int | str) -> Any:
    """Tells Triton which GPU to compile for; there is none to launch on."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    return SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: arch,  # any device has the same architecture
        get_current_stream=lambda device: 0,
    )


class _StandInKernel:
    """Takes the place of a kernel: puts into `found` what would be launched first, compiled."""

    def __init__(self, function: Any, found: list[Any]) -> None:
        self.function, self.found = function, found

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """What `kernel[grid]` is."""

        def launch(*arguments: Any, **named: Any) -> None:
            if not self.found:
                self.function.device_caches.clear()
                self.found.append(self.function.run(*arguments, grid=grid, warmup=True, **named))

        return launch


def _launch(program: Program) -> Any:
    """Calls the package as its users do; returns what the launcher had compiled."""
    import triton

    from prefix_attn import PrefixLayout, prefix_attention
    from prefix_attn.backends import triton as triton_backend
    from prefix_attn.content import content_of
    from prefix_attn.kernels import backward, forward, sums

    wanted, compiled = f"{program.kernel}_kernel", list[Any]()
    stand_ins: list[tuple[Any, str, Any]] = [
        (triton_backend, "config_for", lambda *_: program.config),
        (triton_backend, "why_not", lambda *_, **__: None),
    ]
    for module in (forward, backward, sums):
        for name, value in vars(module).items():
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                # What is not wanted does nothing at all.
                found = compiled if name == wanted else [None]
                stand_ins.append((module, name, _StandInKernel(value, found)))
    # One prefix, long enough that its key tiles are split, and too few members to fill tiles.
    layout = PrefixLayout.from_lengths([640], [[72, 300, 130]])
    dtype = DTYPES[program.dtype]
    arguments: dict[str, Any] = {}
    for option in program.options:
        arguments |= OPTIONS[option]
    if segments := arguments.pop("queries_for", None):
        layout = layout.queries_for(segments)
    content_of(layout.segments).kept.clear()  # the launches of the program before
    head_dim, head_dim_v = program.dims
    sizes = (
        (layout.num_queries, HEADS, head_dim),
        (layout.num_tokens, KV_HEADS, head_dim),
        (layout.num_tokens, KV_HEADS, head_dim_v),
    )
    q, k, v = (torch.zeros(*size, dtype=dtype, requires_grad=True) for size in sizes)
    if "sinks" in arguments:
        arguments["sinks"] = torch.zeros(HEADS, requires_grad=True)
    torch.backends.cuda.matmul.allow_tf32 = program.dtype == "tf32"
    triton.runtime.driver.set_active(stand_in_driver(program.arch))
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        out, lse = prefix_attention(q, k, v, layout, backend="triton", return_lse=True, **arguments)
        if not compiled:
            torch.autograd.backward((out, lse), (torch.ones_like(out), torch.ones_like(lse)))
    if not compiled:
        raise LookupError(f"no launcher started {wanted}")
    return compiled[0]


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
        if isinstance(program.arch, str):
            assembly, shared = compiled.asm["amdgcn"], compiled.metadata.shared
            return amd.read_figures(program, assembly, shared=shared)
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
            [sys.executable, "-m", "bench.machine_code.compile"],
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


if __name__ == "__main__":
    work()
