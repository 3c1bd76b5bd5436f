"""What Triton and ptxas make of the kernels: compiled ahead of time, no GPU needed."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench import machine_code
from bench.machine_code import Figures, Program, Report

ROOT = Path(__file__).parents[1]
QUICK = machine_code.quick()
BOUNDED = {"GROUP", "D", "DV", "ACC", "PRECISION", "NEGATIVE_SCALE", "HAS_DLSE", "NUM_STAGES"}
RUNTIME = ("num_", "stride_", "scale")

needs_compiler = pytest.mark.skipif(
    bool(machine_code.missing_tools()), reason=machine_code.missing_tools() or "all tools found"
)


@pytest.fixture(scope="module")
def reports():
    """The quick set, compiled two at a time, by label."""
    return {report.program.label: report for report in machine_code.compile_all(QUICK, jobs=2)}


@needs_compiler
@pytest.mark.parametrize("label", [program.label for program in QUICK])
def test_machine_code_has_no_problem(reports, label):
    """Shared memory, serialized products, registers, forward spills and tensor cores."""
    assert reports[label].problems() == []


@needs_compiler
@pytest.mark.parametrize("label", [p.label for p in QUICK if p.kernel == "backward"])
def test_backward_spills_little(reports, label):
    # 92 bytes at most today (Triton 3.6, sm_90, D 128); a tile that does not fit spills thousands.
    assert reports[label].figures.spill_stores <= 128


@needs_compiler
def test_tile_that_is_too_large_is_a_problem():
    program = Program.from_selection("forward", 80, "bfloat16", 128)
    config = program.config
    wide = replace(config, forward=replace(config.forward, block_m=128))
    problems = machine_code.compile_apart(replace(program, config=wide)).problems()
    assert any("spills" in problem for problem in problems)


GOOD = Figures(200, 0, 0, 1024, tensor={"HGMMA": 8})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shared": 228 << 10}, "shared memory"),
        ({"serialized": True}, "serialized"),
        ({"registers": 32}, "ptxas gave up"),
        ({"spill_stores": 4}, "spills"),
        ({"tensor": {"HMMA": 8}}, "no HGMMA"),
    ],
)
def test_each_problem_is_found(change, words):
    program = Program.from_selection("forward", 90, "bfloat16", 128)
    assert Report(program, GOOD).problems() == []
    (problem,) = Report(program, replace(GOOD, **change)).problems()
    assert words in problem


def test_log_and_listing_are_read():
    log = "4 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\nUsed 99 registers"
    sass = "   /*0010*/  @!P0 HGMMA.64x64x16.F32 R24 ;\n   /*0020*/  HMMA.16816 R0 ;\n"
    figures = machine_code.read_figures(log + "\nwgmma serialized", sass, 64, None)
    assert figures == Figures(99, 8, 12, 64, 0, {"HGMMA": 1, "HMMA": 1}, True)


@pytest.mark.parametrize("kernel", machine_code.KERNELS)
def test_lengths_strides_and_scale_do_not_recompile(kernel):
    """Only bounded choices are constexpr, and lengths are not specialised on their values."""
    from prefix_attn.kernels import backward, forward

    function = getattr(forward if kernel == "forward" else backward, f"{kernel}_kernel")
    for parameter in function.params:
        name = parameter.name
        if parameter.is_constexpr:
            bounded = name in BOUNDED or name.startswith(("BLOCK_", "KEYS_", "QUERIES_"))
            assert bounded, f"{name} is constexpr: each new value compiles again"
        else:
            assert name.endswith("_ptr") or name.startswith(RUNTIME)
        if name in ("num_tokens", "num_key_items"):
            assert parameter.do_not_specialize


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_blocks_are_powers_of_two(capability, head_dim):
    config = Program.from_selection("backward", capability, "bfloat16", head_dim).config
    for tile in (config.forward, config.keys, config.queries):
        assert tile.block_m.bit_count() == tile.block_n.bit_count() == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quick", "--arch", "90"], "--quick chooses"),
        (["--jobs", "0"], "at least 1, got 0"),
        (["--head-dim", "512"], "16..256, got 512"),
        (["--json", "no/such/folder/x.json"], "folder that exists"),
    ],
)
def test_wrong_command_line_says_why(arguments, words):
    command = [sys.executable, "-m", "bench.machine_code", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
