"""What Triton and ptxas make of the kernels: compiled ahead of time, no GPU needed."""

import ast
import json
import shutil
import statistics
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from bench.machine_code import __main__ as command_line
from bench.machine_code import amd, budget, programs, sass, walk
from bench.machine_code.budget import Budget, KnownFault
from bench.machine_code.compile import compile_all, missing_tools
from bench.machine_code.figures import Figures, LoopFigures, Report, Violation, read_figures
from bench.machine_code.programs import LoopKind, Program
from prefix_attn.backends.schedule import MASKED_COST
from prefix_attn.kernels.arguments import Columns, Heads, Mode
from prefix_attn.kernels.config import Tile

ROOT = Path(__file__).parents[1]
IS_OLDEST = triton.__version__.startswith("3.6.")
# What is constant in a compiled kernel: names, and objects with names of their own.
BOUNDED = {
    "BLOCK_M", "BLOCK_N", "ACC", "NEGATIVE_SCALE", "HAS_DLSE",
    "SINKS", "SUBSET", "DESCRIPTORS", "REDUCE", "FUSED", "EIGHTS", "PART_N",
}  # fmt: skip
RECORDS = {
    "HEADS": Heads,
    "COLUMNS": Columns,
    "TILE": Tile,
    "KEYS": Tile,
    "VALUES": Tile,
    "QUERIES": Tile,
    "MODE": Mode,
}
BOUNDED_FIELDS = {
    "group", "qk", "vo", "size", "widths", "block_m", "block_n", "num_stages", "causal", "window",
    "softcap", "accurate", "acc", "precision",
}  # fmt: skip
RUNTIME = ("num_", "scale", "softcap", "window_size", "heads_per_section")

needs_compiler = pytest.mark.skipif(
    bool(missing_tools()), reason=missing_tools() or "all tools found"
)


@needs_compiler
def test_machine_code_is_within_its_budget():
    """All of a set in one test: compilers are started once, whatever runs the tests."""
    kept = Budget.from_file(triton.__version__)
    wanted = programs.tested(triton.__version__)
    if kept.baselines:  # none for a version of Triton that is newer than the file
        assert kept.missing(wanted) == []
    reports = compile_all(wanted, jobs=2)
    over = {r.program.label: found for r in reports if (found := kept.violations(r))}
    assert over == {}


@needs_compiler
def test_tile_that_is_too_large_breaks_the_budget():
    program = Program.from_selection("forward", 90, "bfloat16", 128)
    wide = replace(program.config.forward, block_m=128, block_n=128)
    program = replace(program, config=replace(program.config, forward=wide, forward_warps=4))
    (report,) = compile_all([program], jobs=1)
    assert rules_broken(report) - {"serialized"} == {"spills", "loop spills", "baseline"}


@needs_compiler
def test_odd_heads_compile_without_spills():
    """Those smaller than a product, and odd multiples of 8.

    The latter Triton would load by single elements, which take registers for each.
    """
    found = [
        *(Program.from_selection(x, 90, "bfloat16", 2, head_dim_v=8) for x in programs.KERNELS),
        Program.from_selection("forward", 80, "bfloat16", 72),
    ]
    for report in compile_all(found, jobs=2):
        assert report.error == ""
        assert rules_broken(report) == set(), report.program.label


@needs_compiler
def test_largest_programs_of_consumer_cards_fit():
    """99 KB of shared memory: those with the most of it among all dtypes, heads and options."""
    found = [
        Program.from_selection("forward", 89, "bfloat16", 96, programs.COMBINED),
        Program.from_selection("backward", 89, "tf32", 128, programs.COMBINED),
        Program.from_selection("forward", 120, "bfloat16", 128),
    ]
    for report in compile_all(found, jobs=2):
        assert report.error == ""
        assert "shared" not in {x.rule for x in report.violations()}
        assert report.figures.shared > 70 << 10  # they are the large ones


@pytest.fixture
def checkout(tmp_path):
    """A copy of the package whose kernels a test may change."""
    for folder in ("prefix_attn", "kernels", "bench"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return tmp_path


@needs_compiler
@pytest.mark.skipif(not IS_OLDEST, reason="later versions of Triton take the loops in any order")
def test_masked_loop_before_the_full_loop_breaks_the_budget(checkout):
    path = checkout / "kernels" / "backward.py"
    path.write_text(with_loops_swapped(path.read_text(), "key_tile"))
    program = Program.from_selection("backward", 90, "bfloat16", 128)
    # With loads by TMA any order will do.
    program = replace(program, config=replace(program.config, backward_descriptors=False))
    (report,) = compile_all([program], jobs=1, root=checkout)
    assert report.error == ""
    # What is serialized is longer, too, and these tiles are chosen for TMA.
    assert rules_broken(report) >= {"serialized", "hot loop"}


@needs_compiler
def test_kernel_that_spills_breaks_the_budget(checkout):
    path = checkout / "kernels" / "forward.py"
    path.write_text(with_spill(path.read_text()))
    program = Program.from_selection("forward", 90, "bfloat16", 64)
    (report,) = compile_all([program], jobs=1, root=checkout)
    assert report.error == ""
    assert rules_broken(report) - {"serialized"} == {"spills", "loop spills", "hot loop"}


def rules_broken(report):
    return {x.rule for x in Budget.from_file(triton.__version__).violations(report)}


def loops_of(source, function):
    """(first line, one past the last line) of the loops of a function, outermost only."""
    (node,) = [x for x in ast.walk(ast.parse(source)) if getattr(x, "name", None) == function]
    return [(x.lineno - 1, x.end_lineno) for x in node.body if isinstance(x, ast.For)]


def with_loops_swapped(source, function):
    """The last loop of a function, and what prepares it, before the first one."""
    lines = source.splitlines(keepends=True)
    (first, middle), *_, (_, end) = loops_of(source, function)
    return "".join(lines[:first] + lines[middle:end] + lines[first:middle] + lines[end:])


def with_spill(source):
    """A second accumulator that the full loop of the forward kernel carries along."""
    lines = source.splitlines(keepends=True)
    (first, end), *_ = loops_of(source, "forward_kernel")
    last = next(i for i in range(end - 1, first, -1) if lines[i].strip())
    pad = " " * (len(lines[last]) - len(lines[last].lstrip()))
    ballast = "    ballast = tl.zeros([BLOCK_M, 128], ACC) + scale\n"
    grow = f"{pad}ballast = ballast * 1.5 + tl.sum(s)\n"
    after = "    acc = (acc[0] + tl.sum(ballast, 1)[:, None],)\n"
    return "".join([*lines[:first], ballast, *lines[first:end], grow, after, *lines[end:]])


def loop(**changes):
    values = {
        "instructions": 100, "issue_clocks": 100.0, "local": 0, "tensor": {"HGMMA": 8}, "tma": 0,
        "mix": {}, "useful": 64.0, "apart": 164.0, "together": 100.0,
    }  # fmt: skip
    return LoopFigures(**(values | changes))


PROGRAM = Program.from_selection("forward", 90, "bfloat16", 128)
GOOD = Figures(200, 0, 0, 1024, tensor={"HGMMA": 8}, loops={"forward_kernel": loop()})


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"shared": 228 << 10}, "shared"),
        ({"tensor_memory": 1024}, "tensor memory"),
        ({"serialized": True}, "serialized"),
        ({"registers": 32}, "registers"),
        ({"spill_stores": 4}, "spills"),
        ({"spill_loads": 4}, "spills"),
        ({"loops": {"forward_kernel": loop(local=1)}}, "loop spills"),
        ({"loops": {"forward_kernel": loop(tensor={"HMMA": 8})}}, "tensor cores"),
        ({"loops": {"forward_kernel": loop(tensor={"HGMMA": 8, "HMMA": 8})}}, "tensor cores"),
        ({"loops": {}}, "tensor cores"),
        ({"descriptors": True}, "descriptors"),
    ],
)
def test_each_violation_is_found(change, rule):
    assert Report(PROGRAM, GOOD).violations() == []
    (violation,) = Report(PROGRAM, replace(GOOD, **change)).violations()
    assert violation.rule == rule


AMD_PROGRAM = Program.from_selection("forward", "gfx942", "bfloat16", 128)
AMD_FIGURES = Figures(220, 0, 0, 1024, instructions=100, tensor={"v_mfma_f32_32x32x8_bf16": 8})


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"shared": (64 << 10) + 1}, "shared"),
        ({"spill_stores": 4, "spill_loads": 4}, "spills"),
        ({"tensor": {}}, "tensor cores"),
        ({"registers": 260}, "blocks"),
        ({"instructions": 104}, "code"),
        ({"tensor": {"v_mfma_f32_32x32x8_bf16": 12}}, "code"),
    ],
)
def test_each_violation_of_amd_is_found(change, rule):
    kept = Budget(Path("budget.json"), "3.9", {}, []).updated([Report(AMD_PROGRAM, AMD_FIGURES)])
    assert kept.violations(Report(AMD_PROGRAM, replace(AMD_FIGURES, instructions=103))) == []
    found = kept.violations(Report(AMD_PROGRAM, replace(AMD_FIGURES, **change)))
    assert {x.rule for x in found} >= {rule}
    assert len(found) == 1 or rule == "shared"  # of which one block more would have fitted


ASSEMBLY = """
forward_kernel:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\tscratch_store_dwordx4 off, v[0:3], off offset:16
\tscratch_load_dwordx2 v[0:1], off, off offset:16
\tscratch_load_ushort v0, off, off
\ts_endpgm
; a comment
    .vgpr_count:     300
"""


def test_assembly_of_amd_is_read():
    figures = amd.read_figures(AMD_PROGRAM, ASSEMBLY, shared=64)
    assert (figures.registers, figures.spill_stores, figures.spill_loads) == (300, 16, 10)
    assert (figures.instructions, figures.local) == (7, 3)
    assert figures.tensor == {"v_mfma_f32_32x32x8_bf16": 2}
    assert Report(AMD_PROGRAM, figures).blocks == 1
    with pytest.raises(ValueError, match=r"gfx942 bf16 D128 forward has no \.vgpr_count"):
        amd.read_figures(AMD_PROGRAM, "", shared=0)


def test_program_that_does_not_compile_breaks_the_budget():
    (violation,) = Report(PROGRAM, None, "an error").violations()
    assert violation == Violation("compile", "did not compile: an error")


def kept_budget(faults=()):
    empty = Budget(Path("budget.json"), "3.9", {}, list(faults))
    return empty.updated([Report(PROGRAM, GOOD)])


@pytest.mark.parametrize(
    ("loops", "rules"),
    [
        ({"forward_kernel": loop(instructions=103, apart=168.0)}, []),
        ({"forward_kernel": loop(instructions=104)}, ["hot loop"]),
        ({"forward_kernel": loop(apart=170.0)}, ["hot loop"]),
        ({"another": loop()}, ["baseline"]),
    ],
)
def test_hot_loop_may_grow_by_three_percent(loops, rules):
    report = Report(PROGRAM, replace(GOOD, loops=loops))
    assert [x.rule for x in kept_budget().violations(report)] == rules


def test_other_tiles_break_the_budget_and_programs_without_baseline_are_named():
    wide = replace(PROGRAM, config=replace(PROGRAM.config, forward_warps=16))
    found = kept_budget().violations(Report(wide, GOOD))
    assert [x.rule for x in found] == ["baseline"]
    other = replace(PROGRAM, head_dim=64)
    assert kept_budget().missing([PROGRAM, other]) == [other.label]


def test_known_fault_is_allowed_until_it_gets_worse():
    fault = KnownFault({PROGRAM.label: (4, 8)}, "spills", "why")
    kept = kept_budget([fault])
    same = replace(GOOD, spill_stores=4, spill_loads=8)
    assert kept.violations(Report(PROGRAM, same)) == []
    for change in ({"spill_stores": 5}, {"spill_loads": 9}):
        found = kept.violations(Report(PROGRAM, replace(same, **change)))
        assert [x.rule for x in found] == ["spills"]


def test_version_without_baselines_has_the_other_rules():
    kept = Budget.from_file("99.0.0")
    assert kept.violations(Report(PROGRAM, GOOD)) == []
    spilling = replace(GOOD, spill_stores=1)
    assert [x.rule for x in kept.violations(Report(PROGRAM, spilling))] == ["spills"]


def test_updating_a_budget_keeps_its_exceptions(tmp_path):
    path = tmp_path / "budget.json"
    shutil.copy(budget.PATH, path)
    before = json.loads(path.read_text())
    kept = Budget.from_file("99.0.0", path).updated([Report(PROGRAM, GOOD)])
    kept.write()
    after = json.loads(path.read_text())
    assert PROGRAM.label in after["baselines"].pop("99.0")
    assert after == before


def test_known_faults_take_new_figures_where_a_reason_is_known(tmp_path):
    path = tmp_path / "budget.json"
    other = replace(PROGRAM, head_dim=64)
    known = {"rule": "spills", "reason": "why", "programs": {PROGRAM.label: [4, 8], "gone": [1, 1]}}
    path.write_text(json.dumps({"exceptions": {"3.9": [known]}, "baselines": {}}))
    spilling = [Report(x, replace(GOOD, spill_stores=12)) for x in (PROGRAM, other)]
    # Another version has the reason; nobody has one for the other program.
    kept = Budget.from_file("3.7.1", path).accepting(spilling)
    assert kept.faults == [KnownFault({PROGRAM.label: (12, 0)}, "spills", "why")]
    assert kept.violations(spilling[0]) == []
    assert [x.rule for x in kept.violations(spilling[1])] == ["spills"]
    # What is mended is no fault any more; what was not compiled stays.
    kept = Budget.from_file("3.9.0", path).accepting([Report(PROGRAM, GOOD)])
    assert kept.faults == [KnownFault({"gone": (1, 1)}, "spills", "why")]
    kept.write()
    assert Budget.from_file("3.9.0", path).faults == kept.faults


def test_known_fault_of_several_loops_takes_the_most_of_them(tmp_path):
    path = tmp_path / "budget.json"
    known = {"rule": "loop spills", "reason": "why", "programs": {PROGRAM.label: [9]}}
    path.write_text(json.dumps({"exceptions": {"3.9": [known]}, "baselines": {}}))
    loops = {"forward_kernel": loop(local=5), "another": loop(local=3)}
    report = Report(PROGRAM, replace(GOOD, loops=loops))
    kept = Budget.from_file("3.9.0", path).accepting([report])
    assert kept.faults == [KnownFault({PROGRAM.label: (5,)}, "loop spills", "why")]


def test_every_exception_is_of_a_program_that_exists():
    known = {program.label for program in programs.everything()}
    for faults in json.loads(budget.PATH.read_text())["exceptions"].values():
        for fault in faults:
            assert set(fault["programs"]) <= known
            assert fault["reason"]


# Two loops as nvdisasm lists them: the second one masks, and waits for a barrier inside.
LISTING = """
	//## File "kernel.py", line 7
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], R24 ;
        /*0030*/                   FFMA R2, R3, R4, R5 ;
        /*0040*/                   MUFU.EX2 R2, R2 ;
        /*0050*/                   LDL R6, [R1] ;
        {body}
        /*0200*/              @P0  BRA `(.L_x_0) ;
.L_x_1:
        /*0210*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0220*/                   FSEL R2, R2, R3, P1 ;
.L_x_2:
        /*0230*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R2], R3 ;
        /*0240*/             @!P2  BRA `(.L_x_2) ;
        {more}
        /*0400*/                   BRA.U UP0, `(.L_x_1) ;
        /*0410*/                   EXIT ;
"""


def listing():
    def filler(start, count):
        return "\n".join(f"/*{start + 16 * i:04x}*/ IADD3 R7, R7, R8, R9 ;" for i in range(count))

    return LISTING.format(body=filler(0x60, 12), more=filler(0x250, 12))


def test_loops_are_found_in_a_listing():
    instructions, labels = sass.parse(listing())
    full, masked = sass.loops(instructions, labels)
    assert [full.instructions[0].address, full.instructions[-1].address] == [0x10, 0x200]
    assert (full.tensor, full.local, full.selects) == ({"HGMMA": 2}, 1, 0)
    assert (masked.tensor, masked.selects) == ({"HGMMA": 1}, 1)
    # The wait for the barrier is no work of the loop, and no loop of its own.
    assert "SYNCS" not in masked.names
    assert sass.full_loops([full, masked]) == {"": full}
    assert sass.full_loops([masked, full, full], {"": 2}) == {"": masked, " 2": full}


def test_model_counts_products_shared_reads_and_issue_slots():
    instructions, labels = sass.parse(listing())
    full, _ = sass.loops(instructions, labels)
    clocks = sass.model(full, 90, 8, 4096.0, 4096.0, "bfloat16")
    # Two warpgroups, two products of 64x64x16 each; one reads both operands from shared memory,
    # (64 + 64) rows of 32 bytes, the other one operand of 64 rows: 128 bytes per clock.
    assert clocks.tensor == max(2 * 2 * 64 * 64 * 16 / 2048, 2 * 32 * (128 + 64) / 128)
    # Twelve additions at half of the issue rate outweigh the 18 instructions.
    assert clocks.other == 2 * max(len(full.instructions), 12 / 0.5)
    assert clocks.useful == 2.0
    assert (clocks.apart, clocks.together) == (
        clocks.tensor + clocks.other,
        max(clocks.tensor, clocks.other),
    )


def test_walk_waits_for_products_and_counts_masked_tiles():
    instructions, labels = sass.parse(listing())
    found = sass.loops(instructions, labels)
    full, masked = found
    assert sass.masked_loops(found) == {"": masked}
    # One warp to each scheduler: an addition occupies its pipe for two clocks, the last one while
    # the loop goes on. The products
    # are waited for by nobody.
    assert walk.clocks(full, 90, 4, "bfloat16") == len(full.instructions) + 11
    wait = replace(
        full.instructions[-1], opcode="WARPGROUP.DEPBAR.LE", operands="gsb0, 0x0", predicate=""
    )
    waiting = replace(full, instructions=[*full.instructions, wait])
    clocks = walk.clocks(waiting, 90, 4, "bfloat16")
    # Two products of 64 x 64 x 16 behind each other, the first one's operands both in shared
    # memory. What is issued behind them lies in their shadow.
    products = max(32, 32 * 128 / 128) + max(32, 32 * 64 / 128)
    assert clocks == 1 + products + walk.RESULT_CLOCKS
    later = replace(full, instructions=[*full.instructions, wait, *full.instructions[3:]])
    assert walk.clocks(later, 90, 4, "bfloat16") > clocks
    assert walk.clocks(replace(full, instructions=full.instructions[3:]), 90, 4, "") is None


def test_masked_tiles_cost_what_the_walk_says():
    """Work lists are balanced by one cost for all loops of 16 bits on Hopper."""
    kept = json.loads(budget.PATH.read_text())["baselines"]["3.9"]
    ratios = [
        loop["walk"][1] / loop["walk"][0]
        for size in (64, 128)
        for kernel in programs.BOTH
        for loop in kept[f"sm_90 bf16 D{size} {kernel}"]["loops"].values()
    ]
    assert len(ratios) == 6
    assert abs(statistics.mean(ratios) - MASKED_COST) < 0.1


def test_model_charges_half_of_the_rate_for_hmma_on_hopper():
    instructions, labels = sass.parse(listing().replace("HGMMA.64x64x16", "HMMA.16816"))
    full, _ = sass.loops(instructions, labels)
    ampere, hopper = (sass.model(full, x, 8, 1.0, 1.0, "bfloat16") for x in (80, 90))
    # Eight warps, two products of 16x8x16 each.
    assert ampere.tensor == hopper.tensor == 8 * 2 * 16 * 8 * 16 / 1024


@pytest.mark.parametrize(
    ("kernel", "function", "width", "repeated"),
    [
        ("forward", "forward_kernel", 192 + 128, 0),
        ("backward", "key_tile", 2 * 192 + 2 * 128, 0),
        ("backward", "query_tile", 2 * 192 + 128, 192 + 128),
        ("apart", "key_tile", 2 * 192 + 128, 0),
        ("apart", "key_tile 2", 192 + 128, 192),
    ],
)
def test_products_count_both_head_dims(kernel, function, width, repeated):
    capability, kernel = (90, "backward") if kernel == "apart" else (80, kernel)
    program = Program.from_selection(kernel, capability, "bfloat16", 192, head_dim_v=128)
    kind = program.kind(function)
    assert (program.width(kind), program.repeated(kind)) == (width, repeated)
    assert program.label == f"sm_{capability} bf16 D192/128 {kernel}"


def test_every_loop_of_the_budget_is_of_a_kind_that_the_kernels_name():
    """What is counted for a loop depends on its kind: none is taken for another by default."""
    baselines = json.loads(budget.PATH.read_text())["baselines"].values()
    functions = {function for kept in baselines for x in kept.values() for function in x["loops"]}
    assert functions == {kind.value for kind in LoopKind}
    with pytest.raises(ValueError, match="value_tile"):
        Program.from_selection("backward", 90, "bfloat16", 128).kind("value_tile")


def test_options_under_which_keys_spill_have_tiles_of_their_own():
    plain = Program.from_selection("backward", 90, "bfloat16", 128)
    together = replace(plain, options=programs.COMBINED)
    assert plain.keys == plain.config.keys
    assert together.keys == plain.config.softcap_window != plain.keys
    assert replace(together, options=(*together.options, "fused")).keys == plain.config.fused


def test_log_and_listing_are_read():
    log = "4 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\nUsed 99 registers"
    figures = read_figures(PROGRAM, log + "\nwgmma serialized", listing(), shared=64)
    assert (figures.registers, figures.spill_stores, figures.spill_loads) == (99, 8, 12)
    assert (figures.tensor, figures.local, figures.serialized) == ({"HGMMA": 3}, 1, True)
    (only,) = figures.loops.values()
    assert (only.local, only.tensor) == (1, {"HGMMA": 2})
    assert Figures.from_json(json.dumps(asdict(figures))) == figures


@pytest.mark.parametrize("kernel", programs.KERNELS)
def test_lengths_strides_and_scale_do_not_recompile(kernel):
    """Only bounded choices are constexpr, and lengths are not specialised on their values."""
    from prefix_attn.kernels import backward, forward, sums

    module = {"forward": forward, "backward": backward}.get(kernel, sums)
    function = getattr(module, f"{kernel}_kernel")
    for parameter in function.params:
        name = parameter.name
        if name in RECORDS:
            assert parameter.is_constexpr
            assert {field.name for field in fields(RECORDS[name])} <= BOUNDED_FIELDS
        elif parameter.is_constexpr:
            assert name in BOUNDED, f"{name} is constexpr: each new value compiles again"
        else:
            ends = ("_ptr", "_desc", "_rows", "_table")
            assert name.endswith(ends) or name.startswith(RUNTIME)
        if name in ("num_queries", "num_keys", "num_key_items", "num_value_items", "window_size"):
            assert parameter.do_not_specialize


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120, "gfx942", "gfx950"])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_blocks_are_powers_of_two(arch, head_dim):
    config = Program.from_selection("backward", arch, "bfloat16", head_dim).config
    for tile in (x for x in vars(config).values() if isinstance(x, Tile)):
        assert tile.block_m.bit_count() == tile.block_n.bit_count() == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quick", "--arch", "90"], "--quick chooses"),
        (["--fits", "--arch", "89"], "--fits chooses"),
        (["--fits", "--update-budget"], "--fits has no budget"),
        (["--arch", "gfx90a"], "invalid choice"),
        (["--accept-known"], "goes with --update-budget"),
        (["--jobs", "0"], "at least 1, got 0"),
        (["--head-dim", "512"], "1..256, got 512"),
        (["--head-dim", "192/0"], "1..256, got 0"),
        (["--head-dim", "192-128"], "such as 192/128, got '192-128'"),
        (["--json", "no/such/folder/x.json"], "folder that exists"),
    ],
)
def test_wrong_command_line_says_why(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.parse(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
