"""The commands: their figures against layouts and masks, their errors, and what they need."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from prefix_attn import PrefixLayout
from prefix_attn.backends import cpu
from prefix_attn.cases import Case
from prefix_attn.cli import bench, estimate, info, main, terminal
from prefix_attn.cli.arguments import COMMANDS, parser
from prefix_attn.cli.costs import verdict
from prefix_attn.rollouts import ReadError, read
from prefix_attn.timing import Clock

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run(capsys):
    """Runs a command in this process; gives its code, output and errors."""

    def runner(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return runner


@pytest.fixture
def run_json(run):
    """The JSON object of a command that succeeds."""

    def runner(*arguments):
        code, out, _ = run(*arguments, "--json")
        assert code == 0
        return json.loads(out)

    return runner


def spawn(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def case_of(prefix, suffix, group, heads=(4, 2, 16), dtype="float32"):
    return Case(prefix, suffix, group, *heads, dtype)


def lines_file(path, *records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


# ---- the program --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example_that_parses(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    example = " ".join(out.split("example: prefix-attn ")[1].split())
    assert parser("prefix-attn").parse_args(example.split()).command == command


def test_version(run):
    assert run("--version")[:2] == (0, "prefix_attn 0.1.0\n")


def test_no_command_prints_help(run):
    code, out, err = run()
    assert (code, out) == (2, "")
    assert all(command in err for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS), ["fly"]],
)
@pytest.mark.parametrize("program", ["module", "script"])
def test_help_needs_no_pytorch(tmp_path, program, arguments):
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch was imported')")
    script = tmp_path / "prefix-attn"
    script.write_text("import sys\nfrom prefix_attn.cli import main\nsys.exit(main())\n")
    command = ["-m", "prefix_attn"] if program == "module" else [str(script)]
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "PyTorch was imported" not in done.stderr
    assert done.returncode == (2 if arguments == ["fly"] else 0), done.stderr


def test_importing_registers_operators_except_in_the_command_line():
    importing = "import sys; {}; import prefix_attn; print('torch' in sys.modules)"
    assert spawn(importing.format("pass")).stdout == "True\n"
    done = spawn(
        importing.format("sys.argv = ['/usr/bin/prefix-attn', 'info']")
        + "; from prefix_attn import PrefixLayout, merge_states, prefix_attention"
        "; from prefix_attn.layout import PrefixLayout as same; assert same is PrefixLayout"
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


SHAPE = ("--prefix", "8", "--suffix", "4", "--group", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["estimate", "--prefix", "8"], "--suffix, --group"),
        (["estimate", *SHAPE, "--prefix", "-5"], "argument --prefix: must be at least 0, got -5"),
        (["estimate", *SHAPE, "--suffix", "x"], "argument --suffix: must be an integer, got 'x'"),
        (["estimate", *SHAPE, "--group", "0"], "argument --group: must be at least 1, got 0"),
        (["estimate", *SHAPE, "--heads", "6", "--kv-heads", "4"], "--kv-heads, got 6 and 4"),
        (["estimate", *SHAPE, "--head-dim", "513"], "--head-dim must be 1 to 512, got 513"),
        (["estimate", *SHAPE, "--intermediate", "9"], "--intermediate 9 needs --hidden"),
        (["estimate", *SHAPE, "--plot", "x.txt"], "must end in .png, .svg, .pdf, got 'x.txt'"),
        (["estimate", *SHAPE, "--plot", "no/such/x.png"], "no/such/x.png: No such file"),
        (["estimate", *SHAPE, "--suffix", "2000000000"], "at most 2147483647 tokens"),
        (["estimate", *SHAPE, "--prefix", "0", "--suffix", "0"], "there are no tokens"),
        (["estimate", *SHAPE, "--layers", "1" + 320 * "0"], "argument --layers: must be at most"),
        (["inspect", "no-such.jsonl"], "can't read no-such.jsonl: No such file or directory"),
        (["inspect", "."], "can't read .: Is a directory"),
        (["inspect", "x", "--limit", "0"], "argument --limit: must be at least 1, got 0"),
        (["inspect", "x", "--tokenizer", ""], "error: --tokenizer "),
        (["inspect", "x", "--depth", "65"], "--depth must be at most 64, got 65"),
        (["bench", "--minutes", "0"], "argument --minutes: must be positive, got 0"),
        (["bench", "--minutes", "soon"], "argument --minutes: must be a number, got 'soon'"),
        (["bench", "--minutes", "nan"], "argument --minutes: must be positive, got nan"),
        (["bench", "--heads", "3"], "--heads must be a multiple of --kv-heads, got 3 and 2"),
    ],
)
def test_wrong_arguments_are_named(run, arguments, message):
    if arguments[:1] == ["bench"] and "--heads" in arguments:
        arguments = [*arguments, "--device", "cpu"]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_refuses_a_gpu_that_is_not_there(run):
    code, _, err = run("bench", "--device", "cuda")
    assert code == 2
    assert "--device cuda: there is no CUDA device" in err


def test_interrupt_is_not_a_traceback(run, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert run("info") == (130, "", "prefix-attn info: interrupted\n")


def test_closed_pipe_is_quiet():
    command = [sys.executable, "-m", "prefix_attn", "estimate", *SHAPE]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()  # long before the output comes
    assert process.stderr.read() == ""
    assert process.wait() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["estimate", *SHAPE], ["--help"]])
def test_output_that_fails_is_one_message(arguments):
    command = [sys.executable, "-m", "prefix_attn", *arguments]
    # Unbuffered, argparse itself drops what it can't write.
    env = {key: text for key, text in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=ROOT, env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.endswith("error: can't write to standard output: No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_errors_that_cannot_be_written_keep_the_exit_code(monkeypatch):
    with open("/dev/full", "w") as full:  # closing it would fail, as the exit does
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["inspect", "no-such.jsonl"]) == 2


def test_closed_streams_are_one_message(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["inspect", "-"]) == 2
    assert capsys.readouterr().err == "prefix-attn inspect: error: standard input is closed\n"
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        assert main(["estimate", *SHAPE]) == 2
    assert capsys.readouterr().err == "prefix-attn estimate: error: standard output is closed\n"
    path = lines_file(tmp_path / "x.jsonl", [1], "oops\n")
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["inspect", str(path)]) == 0
    assert main(["inspect", "no-such.jsonl"]) == 2
    assert "oops" not in capsys.readouterr().out


def test_output_is_escaped_where_the_encoding_lacks_it(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.emit("é")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xe9\n"


def test_names_and_values_wrap_in_narrow_terminals(monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    rows = [("torch", "2.13 and more of it"), ("prefix-grouper", "is not there")]
    assert terminal.pairs(rows).splitlines() == [
        "  torch     2.13 and",
        "            more of it",
        "  prefix-grouper",
        "            is not there",
    ]


def test_wide_tables_become_blocks_in_narrow_terminals(monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    lines = terminal.table(["", "one", "two"], [["tokens", "1" * 9, "2" * 9]])
    assert lines.splitlines() == ["tokens", "  one  111111111", "  two  222222222"]
    monkeypatch.setenv("COLUMNS", "40")
    assert len(terminal.table(["", "one"], [["tokens", "1"]]).splitlines()) == 2


# ---- estimate -----------------------------------------------------------------------------------

SHAPES = [(37, 11, 3), (0, 5, 4), (9, 0, 2), (64, 64, 1), (5, 300, 2)]


@pytest.mark.parametrize(("prefix", "suffix", "group"), SHAPES)
def test_estimate_matches_the_layout_and_its_mask(run_json, prefix, suffix, group):
    shape = ("--prefix", prefix, "--suffix", suffix, "--group", group)
    heads = ("--heads", 6, "--kv-heads", 2, "--head-dim", 32, "--layers", 5, "--dtype", "fp32")
    results = run_json("estimate", *shape, *heads)
    layout = PrefixLayout.from_lengths([prefix], [[suffix] * group])
    assert results["tokens"]["shared"] == layout.num_tokens
    assert results["tokens"]["repeated"] == layout.repeated_tokens
    flops = results["attention_forward_flops"]
    # Two products of 2 D FLOPs for each query head and allowed pair.
    assert flops["shared"] == 4 * 32 * 6 * 5 * int(layout.materialize().sum())
    whole = torch.ones(prefix + suffix, prefix + suffix).tril().sum()
    assert flops["repeated"] == 4 * 32 * 6 * 5 * group * int(whole)
    assert flops["ratio"] == pytest.approx(layout.flop_ratio)
    assert results["attention_training_flops"]["shared"] == 3.5 * flops["shared"]
    q, kv = torch.empty(layout.num_tokens, 6, 32), torch.empty(layout.num_tokens, 2, 32)
    assert results["qkvo_bytes_per_layer"]["shared"] == 2 * q.nbytes + 2 * kv.nbytes
    assert results["kv_copies_avoided"] == group - 1
    copy = torch.empty(2, prefix, 2, 32).nbytes
    assert results["kv_copy_bytes_avoided_per_layer"] == (group - 1) * copy


def test_estimate_counts_linear_layers(run_json):
    shape = ("--prefix", 30, "--suffix", 10, "--group", 4, "--heads", 4, "--kv-heads", 2)
    rest = ("--head-dim", 16, "--layers", 2, "--hidden", 48, "--intermediate", 80)
    results = run_json("estimate", *shape, *rest)
    modules = [
        torch.nn.Linear(*size, bias=False)
        for size in ((48, 64), (48, 32), (48, 32), (64, 48), (48, 80), (48, 80), (80, 48))
    ]
    weights = 2 * sum(module.weight.numel() for module in modules)
    linear, attention = results["linear_training_flops"], results["attention_training_flops"]
    assert linear["shared"] == 6 * weights * 70
    assert linear["repeated"] == 6 * weights * 160
    whole = results["layers_training_flops"]
    assert whole["shared"] == linear["shared"] + attention["shared"]
    assert attention["ratio"] < whole["ratio"] < linear["ratio"]


def test_estimate_prints_its_figures(run):
    shape = ("--prefix", 4096, "--suffix", 1024, "--group", 16, "--layers", 1)
    code, out, _ = run("estimate", *shape)
    assert code == 0
    # 4 * 128 * 32 * 16 * 5120 * 5121 / 2, and 16 * 5120 rows of 80 heads of 128 in two bytes.
    assert re.search(r"attention, forward +3\.44 TFLOP +1\.37 TFLOP +2\.50x", out)
    assert re.search(r"Q, K, V and O of one layer +1\.56 GiB +400 MiB +4\.00x", out)
    assert "FLOPs are not time" in out
    assert "Worth it: a layer's FLOPs fall between 2.50x and 4.00x." in " ".join(out.split())
    assert "prefix-attn bench --prefix 4096 --suffix 1024 --group 16" in out
    assert "attention's Q, K, V and O alone; other activations" in " ".join(out.split())


@pytest.mark.parametrize("shape", [(0, 7, 3), (9, 0, 3), (9, 1, 1), (8192, 512, 16)])
def test_estimate_recommends_what_bench_takes(run, shape):
    lengths = [
        x for pair in zip(("--prefix", "--suffix", "--group"), shape, strict=True) for x in pair
    ]
    out = run("estimate", *lengths)[1]
    commands = re.findall(r"^  prefix-attn (bench .*)", out, re.M)
    for command in commands:
        assert _options(*command.split()).command == "bench"
    # Nothing can be timed without suffixes; a long shape comes with one for a CPU.
    assert len(commands) == {(9, 0, 3): 0, (8192, 512, 16): 2}.get(shape, 1)


@pytest.mark.parametrize(
    ("shape", "texts"),
    [
        ((0, 7, 3), ["3 members of 7 tokens that continue", "none: there is no prefix"]),
        (
            (9, 1, 1),
            ["1 member of 1 token that continues", "none: there is one member", "for 1 member."],
        ),
        ((9, 7, 3), ["2 of the prefix in every layer"]),
    ],
)
def test_estimate_counts_in_words(run, shape, texts):
    lengths = [
        x for pair in zip(("--prefix", "--suffix", "--group"), shape, strict=True) for x in pair
    ]
    out = " ".join(run("estimate", *lengths)[1].split())
    assert all(text in out for text in texts)


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ((1.0, 1.0), "Not worth it: no token is shared."),
        ((1.15, 1.02), "Not worth it: a layer's FLOPs fall between 1.02x and 1.15x, less than"),
        ((1.5, 1.1), "It depends on how much of the time is attention"),
        ((1.5, 1.1, 1.4), "Worth it: a layer's FLOPs fall 1.40x."),
        ((10.0, 10.0), "Worth it: a layer's FLOPs fall 10.00x."),
        ((4.0, 2.5), "Worth it: a layer's FLOPs fall between 2.50x and 4.00x."),
    ],
)
def test_verdict(ratios, text):
    assert verdict(*ratios).startswith(text)


def test_heat_map_holds_ideal_speed_ups_and_fits():
    lines = estimate.heat_map(case_of(1000, 100, 4)).splitlines()
    assert all(len(line) <= 80 for line in lines)
    start = next(i for i, line in enumerate(lines) if not line[:6].strip())
    suffixes = list(map(int, lines[start].split()))
    cells = 0
    for line in lines[start + 1 :]:
        prefix, *ratios = map(float, re.findall(r"[\d.]+", line))
        for suffix, ratio in zip(suffixes, ratios, strict=True):
            layout = PrefixLayout.from_tree([int(prefix), *[suffix] * 4], [-1, 0, 0, 0, 0])
            assert ratio == pytest.approx(layout.flop_ratio, abs=0.0501)
            cells += 1
    assert cells == 10 * len(suffixes) >= 50
    (own,) = re.findall(r"\[[\d.]+\]", "\n".join(lines))
    assert own == f"[{PrefixLayout.from_lengths([1000], [[100] * 4]).flop_ratio:.1f}]"


ODD_SHAPES = [(0, 7, 3), (7, 0, 3), (7, 9, 1), (10**8, 10**7, 20), (100, 1, 10**6), (1, 0, 2**31)]


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_heat_map_of_odd_shapes_marks_them(shape):
    case = case_of(*shape)
    assert f"[{case.attention_ratio:.1f}]" in estimate.heat_map(case)


def test_heat_map_leaves_out_what_no_layout_holds(tmp_path):
    case = case_of(2**30, 2, 2**28)
    last = estimate.heat_map(case).splitlines()[-2:]
    assert [line.split()[0] for line in last] == ["65536", str(2**30)]
    crowded = estimate.heat_map(case_of(100, 1, 2**31 // 4096 - 1)).splitlines()
    assert crowded[-1].split()[-1] == "-"  # 65,536 and 4096 for each member
    pytest.importorskip("matplotlib")
    estimate.draw(case, tmp_path / "map.png")


@pytest.mark.parametrize("columns", [20, 34, 52, 100])
def test_heat_map_fits_narrow_terminals(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = estimate.heat_map(case_of(1000, 100, 4)).splitlines()
    assert max(map(len, lines)) <= columns
    assert any("[2.6]" in line for line in lines)


def test_heat_map_needs_no_unicode(monkeypatch):
    monkeypatch.setattr(estimate, "can_print", lambda characters: False)
    assert estimate.heat_map(case_of(1000, 100, 4)).isascii()


@pytest.mark.parametrize("ending", [".png", ".PNG"])
def test_estimate_plots(run, tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"map{ending}"
    code, out, _ = run("estimate", *SHAPE, "--plot", path)
    assert code == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"written: {path}" in out


def test_estimate_plot_names_missing_matplotlib(run, monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.colors", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = run("estimate", *SHAPE, "--plot", tmp_path / "map.png")
    assert code == 2
    assert "--plot needs matplotlib: pip install matplotlib" in err


# ---- inspect ------------------------------------------------------------------------------------

IDS = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 3, 4, 5, 6, 7], [7, 8]]


@pytest.fixture
def inspect_records(run_json, tmp_path):
    """Inspects a file of these lines."""

    def inspected(*records, options=()):
        path = lines_file(tmp_path / "rollouts.jsonl", *records)
        return run_json("inspect", path, *options)

    return inspected


def test_inspect_counts_tokens_and_pairs(inspect_records):
    results = inspect_records(*IDS)
    layout, _ = PrefixLayout.from_sequences(IDS)
    assert results["tokens"] == {"repeated": 18, "shared": 10, "ratio": 1.8}
    pairs = results["attention_pairs"]
    # 15 + 10 + 28 + 3 triangles; the longest sequence, one more row of four keys, and 3.
    assert (pairs["repeated"], pairs["shared"]) == (56, 35)
    assert pairs["ratio"] == pytest.approx(layout.flop_ratio)
    assert pairs["shared"] == int(layout.materialize().sum())
    assert results["saved_share_of_tokens"] == pytest.approx(8 / 18)
    assert (results["unit"], results["sequences"]) == ("tokens", 4)


def test_inspect_draws_the_tree(inspect_records):
    assert inspect_records(*IDS)["tree"] == [
        "├─ 3 x 3  1 2 3",
        "│  ├─ 2 x 2  4 5",
        "│  │  └─ 2 sequences end, 0 to 2 tokens of their own",
        "│  └─ 1 sequence ends, 1 token of its own",
        "└─ 1 sequence that shares nothing, 2 tokens",
    ]
    assert inspect_records(*IDS, options=("--depth", 1))["tree"] == [
        "├─ 3 x 3  1 2 3",
        "│  └─ 4 segments below",
        "└─ 1 sequence that shares nothing, 2 tokens",
    ]


def test_inspect_counts_prefixes_too_small_to_draw(inspect_records):
    # The least of four forks; the others are drawn however little of the whole they save.
    records = [[x] * n + [end] for x, n in ((1, 1), (2, 2), (3, 3), (4, 4)) for end in (8, 9)]
    tree = inspect_records(*records, [9] * 3000)["tree"]
    assert [line for line in tree if not line.startswith("│")] == [
        "├─ 2 x 4  4 4 4 4",
        "├─ 2 x 3  3 3 3",
        "├─ 2 x 2  2 2",
        "├─ 2 sequences under 1 more shared prefix",
        "└─ 1 sequence that shares nothing, 3,000 tokens",
    ]


def test_inspect_draws_in_ascii_and_narrow_terminals(inspect_records, monkeypatch):
    monkeypatch.setattr(terminal, "can_print", lambda characters: False)
    monkeypatch.setenv("COLUMNS", "24")
    tree = inspect_records(*IDS)["tree"]
    assert all(line.isascii() and len(line) <= 24 for line in tree)
    assert tree[:2] == ["|- 3 x 3  1 2 3", "|  |- 2 x 2  4 5"]


def test_inspect_prints_the_figures(run, tmp_path):
    code, out, err = run("inspect", lines_file(tmp_path / "x.jsonl", *IDS))
    assert (code, err) == (0, "")
    assert re.search(r"tokens +18 +10 +1\.80x +44\.4 %", out)
    assert re.search(r"attention, query-key pairs +56 +35 +1\.60x +37\.5 %", out)
    assert "├─ 3 x 3  1 2 3" in out


def test_inspect_reports_bad_lines_and_goes_on(run, tmp_path):
    path = lines_file(
        tmp_path / "x.jsonl", [1, 2], "\n", "oops\n", [1, 3], [1, -2], [1, True], 5, {"a": 1},
        "[" * 100_000 + "\n", {"input_ids": [1, 2]}, '"text"\n', {"text": "text"},
    )  # fmt: skip
    with path.open("ab") as file:
        file.write(b"\xff\xfe\n")
    code, out, err = run("inspect", path, "--json")
    results = json.loads(out)
    assert code == 0
    assert results["sequences"] == 3
    reasons = {bad["line"]: bad["reason"] for bad in results["bad_lines"]}
    assert list(reasons) == [3, 5, 6, 7, 8, 9, 11, 12, 13]
    assert reasons[3] == "not JSON (Expecting value, column 1)"
    assert reasons[5] == "the line has a token id outside 0 to 2147483647: -2"
    assert reasons[6] == "the line is a list with a boolean, not text, token ids or messages"
    assert reasons[7] == "the line is a number, not text, token ids or messages"
    assert reasons[8] == "none of the columns this command knows; there are: 'a'"
    assert reasons[11] == "token ids and text can't be compared without --tokenizer"
    assert reasons[12] == "no column 'input_ids'"
    assert reasons[13] == "not UTF-8 (byte 1)"
    assert "line 3 left out: not JSON" in err
    assert "4 more lines left out" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("ids", [IDS[:3], [[]]])
def test_inspect_leaves_out_what_the_attention_mask_hides(inspect_records, run, tmp_path, ids):
    # Padding of another length in front of every sequence, which would share nothing with it.
    padded = [
        {"input_ids": [0] * i + x, "attention_mask": [0] * i + [1] * len(x)}
        for i, x in enumerate([*ids, [1, 2]])
    ]
    results, right = inspect_records(*padded), inspect_records(*ids, [1, 2])
    assert results["masked_tokens"] == sum(range(len(ids) + 1)) > right["masked_tokens"] == 0
    for key in ("tokens", "attention_pairs", "tree"):
        assert results[key] == right[key]
    _, out, _ = run("inspect", lines_file(tmp_path / "x.jsonl", *padded))
    noun = "token" if results["masked_tokens"] == 1 else "tokens"
    assert f"{results['masked_tokens']} {noun} left out, as the mask or the length says" in out


def test_inspect_takes_masks_of_batches_and_of_prompts(tmp_path):
    batch = {"input_ids": [[0, 5, 6], [7, 8, 9]], "attention_mask": [[0, 1, 1], [1, 1, 0]]}
    prompt = {"prompt_ids": [0, 4], "prompt_mask": [False, True], "completion_ids": [3]}
    for record, sequences in ((batch, [[5, 6], [7, 8]]), (prompt, [[4, 3]])):
        rollouts = read(str(lines_file(tmp_path / "x.jsonl", record)), [], None, None)
        assert [x.tolist() for x in rollouts.sequences] == sequences


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ([1], "attention_mask has not the shape of input_ids"),
        (1, "attention_mask has not the shape of input_ids"),
        ([[1, 1]], "attention_mask has not the shape of input_ids"),
        ([1, 2], "attention_mask must hold 0 and 1, got 2"),
        ([1, "1"], "attention_mask must hold 0 and 1, got '1'"),
        ([1, [1]], "attention_mask must hold 0 and 1, got [1]"),
    ],
)
def test_inspect_refuses_masks_of_another_shape(inspect_records, mask, reason):
    results = inspect_records({"input_ids": [1, 2]}, {"input_ids": [1, 2], "attention_mask": mask})
    assert results["bad_lines"] == [{"line": 2, "reason": reason}]


@pytest.mark.parametrize("value", ["abc", ["a", "b"], [["a"], ["b"]]])
@pytest.mark.parametrize("column", ["tokens", "token_ids", "input_ids"])
def test_inspect_refuses_strings_where_token_ids_belong(run, tmp_path, column, value):
    path = lines_file(tmp_path / "x.jsonl", {column: value})
    code, _, err = run("inspect", path)
    assert code == 2
    assert f"column '{column}' holds strings, not token ids: write ids, as by" in err
    code, _, err = run("inspect", lines_file(path, [1], ["a", "b"]))
    assert code == 0
    assert "line 2 left out: the line is a list of strings: write token ids" in err


def test_inspect_reads_every_token_list_of_a_line(inspect_records):
    assert inspect_records(IDS)["tokens"] == inspect_records(*IDS)["tokens"]


def test_inspect_says_that_the_whole_file_shares(run, tmp_path):
    path = lines_file(tmp_path / "x.jsonl", *IDS)
    words = "across the whole file, the most there can be"
    assert words in run("inspect", path)[1]
    assert words not in run("inspect", path, "--batch", 8)[1]
    assert words not in run("inspect", path, "--limit", 1)[1]


def test_inspect_names_integers_of_too_many_digits(run, tmp_path):
    path = lines_file(tmp_path / "x.jsonl", f"[{'9' * 5000}]\n", [1, 2])
    code, out, err = run("inspect", path)
    assert code == 0
    assert "left out     1 bad line" in out
    assert err.startswith("line 1 left out: Exceeds the limit")


def test_inspect_without_good_lines_is_an_error(run, tmp_path):
    code, _, err = run("inspect", lines_file(tmp_path / "x.jsonl", "oops\n"))
    assert code == 2
    assert "x.jsonl holds no sequence:\n  line 1: not JSON" in err
    code, _, err = run("inspect", lines_file(tmp_path / "x.jsonl", ""))
    assert code == 2
    assert err.endswith("x.jsonl holds no sequence\n")
    code, _, err = run("inspect", lines_file(tmp_path / "x.jsonl", [], []))
    assert code == 2
    assert "all 2 sequences are empty" in err


def test_inspect_names_unknown_columns(run, tmp_path):
    path = lines_file(tmp_path / "x.jsonl", {"question": "a", "reward": 1})
    code, _, err = run("inspect", path, "--column", "prompt")
    assert code == 2
    assert "--column 'prompt' is not in line 1; there are: 'question', 'reward'" in err
    code, _, err = run("inspect", path)
    assert code == 2
    assert "there are: 'question', 'reward'; name one or more with --column" in err


@pytest.mark.parametrize(
    ("record", "columns", "texts"),
    [
        ({"question": "a", "answer": "b", "text": "z"}, [["question", "answer"]], ["ab"]),
        ({"input": "a", "output": "b"}, [["input", "output"]], ["ab"]),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            [["instruction", "input", "output"]],
            ["abc"],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [["conversations"]],
            ["<user>\na\n<assistant>\nb\n"],
        ),
        (
            {"conversations": [{"from": "gpt", "value": "b", "thinking": "a", "weight": None}]},
            [["conversations"]],
            ["<assistant>\n<thinking>\na\nb\n"],
        ),
        ({"messages": [{"from": "me", "content": "a"}]}, [["messages"]], ["<None>\na\n"]),
        ('"ab"', [], ["ab"]),
        ({"text": "ab"}, [["text"]], ["ab"]),
        ({"prompt": "a", "completion": "bc", "text": "z"}, [["prompt", "completion"]], ["abc"]),
        ({"prompt": "a", "responses": ["b", "cd"]}, [["prompt", "responses"]], ["ab", "acd"]),
        (
            {"prompt": "a", "chosen": "b", "rejected": "cd"},
            [["prompt", "chosen"], ["prompt", "rejected"]],
            ["ab", "acd"],
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": None}]},
            [["messages"]],
            ["<user>\na\n<tool>\n\n"],
        ),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
            [["prompt", "completion"]],
            ["<user>\na\n<assistant>\nb\n"],
        ),
    ],
)
def test_inspect_reads_known_columns(tmp_path, record, columns, texts):
    rollouts = read(str(lines_file(tmp_path / "x.jsonl", record)), [], None, None)
    assert [list(path) for path in rollouts.paths] == columns
    assert [x.tobytes().decode() for x in rollouts.sequences] == texts
    assert rollouts.unit == "bytes"


USER = {"role": "user", "content": "a"}
CALLS = [
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "1", "output": "4"},
]

SEALED = {"type": "reasoning", "summary": [], "encrypted_content": "xyz"}


@pytest.mark.parametrize(
    ("records", "columns", "texts"),
    [
        (
            [
                {"instruction": "a", "input": None, "output": "c"},
                {"instruction": "a", "input": "b", "output": "c"},
            ],
            ["instruction", "input", "output"],
            ["ac", "abc"],
        ),
        (
            [{"messages": [USER]}, {"system": "b", "messages": [USER]}],
            ["system", "messages"],
            ["<user>\na\n", "b<user>\na\n"],
        ),
        (
            [{"system": "b", "messages": [USER]}, {"messages": [USER]}],
            ["system", "messages"],
            ["b<user>\na\n", "<user>\na\n"],
        ),
        ([{"system": None, "messages": [USER]}], ["messages"], ["<user>\na\n"]),
        ([{"messages": [{**USER, "type": "reasoning"}]}], ["messages"], ["<user>\na\n"]),
        (
            [{"body": {"input": [SEALED]}}],
            ["body.input"],
            ["<assistant>\n<reasoning_content>\nxyz\n\n"],
        ),
        (
            [{"input_ids": [65]}, {"input_ids": [65], "output_ids": [66]}],
            ["input_ids", "output_ids"],
            ["A", "AB"],
        ),
        (
            [
                {
                    "params": {
                        "system": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}],
                        "messages": [USER],
                    }
                }
            ],
            ["params.system", "params.messages"],
            ["bc<user>\na\n"],
        ),
        (
            [{"body": {"input": [USER, *CALLS]}}],
            ["body.input"],
            [
                "<user>\na\n<assistant>\n<reasoning_content>\nhm\n\n<assistant>\n\n<tool_calls>\n"
                '[{"type": "function", "function": {"name": "f", "arguments": "{}"}}]\n<tool>\n4\n'
            ],
        ),
    ],
)
def test_inspect_reads_what_each_object_has(tmp_path, records, columns, texts):
    rollouts = read(str(lines_file(tmp_path / "x.jsonl", *records)), [], None, None)
    assert rollouts.bad == []
    assert rollouts.paths == (tuple(columns),)
    assert [bytes(x.tolist()).decode() for x in rollouts.sequences] == texts


@pytest.mark.parametrize(
    ("empty", "full", "columns"),
    [
        ({"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}, []),
        ({"prompt": "a", "outputs": []}, {"prompt": "a", "outputs": [{"text": "b"}]}, []),
        ({"x": None}, {"x": "ab"}, ["x"]),
        ({"x": {"y": None}}, {"x": {"y": "ab"}}, ["x.y"]),
    ],
)
def test_inspect_leaves_out_objects_that_hold_nothing(tmp_path, empty, full, columns):
    path = lines_file(tmp_path / "x.jsonl", empty, full, empty)
    rollouts = read(str(path), columns, None, None)
    assert [x.tobytes() for x in rollouts.sequences] == [b"ab"]
    assert [number for number, _ in rollouts.bad] == [1, 3]
    assert all("holds nothing" in why for _, why in rollouts.bad)


@pytest.mark.parametrize("full", ["ab", [1, 2]])
@pytest.mark.parametrize("empty", ["", []])
def test_inspect_takes_what_is_empty_for_text_and_for_ids(tmp_path, empty, full):
    path = lines_file(tmp_path / "x.jsonl", {"text": empty}, {"text": full}, {"text": empty})
    rollouts = read(str(path), [], None, None)
    assert rollouts.bad == []
    assert rollouts.unit == ("bytes" if full == "ab" else "tokens")
    joined = lines_file(tmp_path / "y.jsonl", {"prompt": full, "completion": empty})
    (sequence,) = read(str(joined), [], None, None).sequences
    assert sequence.tolist() == ([97, 98] if full == "ab" else [1, 2])


@pytest.mark.parametrize("indent", [None, 1])
def test_inspect_reads_one_array(run, tmp_path, indent):
    records = [{"input_ids": x} for x in IDS]
    array = json.dumps([*records, {"input_ids": [-1]}], indent=indent)
    path = lines_file(tmp_path / "x.json", f"\n{array}\n")
    code, out, err = run("inspect", path, "--json")
    assert (code, err.split(":")[0]) == (0, "item 5 left out")
    assert json.loads(out)["tokens"]["shared"] == 10
    assert json.loads(run("inspect", path, "--json", "--limit", 2)[1])["sequences"] == 2
    # Lines follow what only looks like the beginning of an array.
    code, out, err = run("inspect", lines_file(path, "[1,\n", "\n", *IDS), "--json")
    assert json.loads(out)["tokens"]["shared"] == 10
    assert json.loads(out)["bad_lines"][0]["line"] == 1


def test_inspect_unpacks_gzip(run, tmp_path):
    path = lines_file(tmp_path / "x.jsonl.gz", *IDS)
    whole = gzip.compress(path.read_bytes())
    path.write_bytes(whole)
    code, out, _ = run("inspect", path, "--json")
    assert (code, json.loads(out)["tokens"]["shared"]) == (0, 10)
    for broken in (whole[:-9], whole[:12] + b"????" + whole[16:]):
        path.write_bytes(broken)
        code, out, err = run("inspect", path)
        assert (code, out) == (2, "")
        assert f"can't read {path}: " in err


def test_inspect_joins_columns_of_token_ids(tmp_path):
    record = {"prompt_ids": [1, 2], "completion_ids": [3], "a": [8], "b": [[9], [7, 6]]}
    path = str(lines_file(tmp_path / "x.jsonl", record))
    rollouts = read(path, [], None, None)
    assert [x.tolist() for x in rollouts.sequences] == [[1, 2, 3]]
    rollouts = read(path, ["a", "b"], None, None)
    assert [x.tolist() for x in rollouts.sequences] == [[8, 9], [8, 7, 6]]


def test_inspect_says_that_text_is_compared_by_bytes(run, tmp_path):
    # é and ê share the first of their two bytes.
    path = lines_file(tmp_path / "x.jsonl", {"text": "né"}, {"text": "nê\x1b[2J"})
    code, out, _ = run("inspect", path)
    assert code == 0
    assert "bytes of UTF-8" in out
    assert re.search(r"bytes +10 +8 ", out)
    code, out, _ = run("inspect", lines_file(tmp_path / "x.jsonl", '"\\u001b[2Jx"\n' * 2))
    assert '2 x 5  "\\x1b[2Jx"' in out
    assert "\x1b" not in out


class FakeTokenizer:
    """One token per word, one special token in front; a chat template for itself."""

    def __init__(self, chat_template=None):
        self.words = []
        self.chat_template = chat_template

    def __call__(self, text, add_special_tokens):
        ids = []
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
            ids.append(1 + self.words.index(word))
        return {"input_ids": [0] * add_special_tokens + ids}

    def decode(self, ids):
        return " ".join("^" if i == 0 else self.words[i - 1] for i in ids)

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        if messages[0]["role"] == "robot":
            raise RuntimeError("no robots")
        return " ".join(f"{m['role']} {m['content']}" for m in messages)


def use_tokenizer(monkeypatch, tokenizer):
    def from_pretrained(name):
        if name != "there":
            raise OSError(f"{name} is not a local folder\nand more")
        return tokenizer

    fake = types.SimpleNamespace(
        AutoTokenizer=types.SimpleNamespace(from_pretrained=from_pretrained)
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)


def test_inspect_tokenizes(inspect_records, monkeypatch):
    use_tokenizer(monkeypatch, FakeTokenizer())
    records = [{"prompt": "see the dog", "completion": f"{x} run"} for x in ("it", "she")]
    results = inspect_records(*records, options=("--tokenizer", "there"))
    # The special token is that of the prompt alone: 1 + 3 shared, 2 each.
    assert results["tokens"]["repeated"] == 12
    assert results["tokens"]["shared"] == 8
    assert results["unit"] == "tokens"
    assert results["tree"][0] == '└─ 2 x 4  "^ see the dog"'


def test_inspect_uses_the_chat_template(inspect_records, monkeypatch):
    use_tokenizer(monkeypatch, FakeTokenizer(chat_template="yes"))
    messages = [[{"role": role, "content": "hello you"}] for role in ("user", "robot")]
    results = inspect_records(
        *({"messages": m} for m in messages), options=("--tokenizer", "there")
    )
    assert results["tokens"]["repeated"] == 3  # the template has its own special tokens
    assert not results["rendered_messages"]
    assert results["bad_lines"] == [
        {"line": 2, "reason": "the chat template refuses the messages: no robots"}
    ]


def test_inspect_names_a_tokenizer_that_fails(run, monkeypatch, tmp_path):
    path = lines_file(tmp_path / "x.jsonl", *IDS)
    use_tokenizer(monkeypatch, None)
    code, _, err = run("inspect", path, "--tokenizer", "gone")
    assert code == 2
    assert err.endswith("--tokenizer 'gone' can't be loaded: gone is not a local folder\n")
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = run("inspect", path, "--tokenizer", "there")
    assert code == 2
    assert "--tokenizer needs transformers: pip install transformers" in err


def test_inspect_reads_standard_input(run, monkeypatch):
    data = "".join(f"{ids}\n" for ids in IDS).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))
    code, out, _ = run("inspect", "-", "--json")
    assert code == 0
    assert json.loads(out)["tokens"]["shared"] == 10


def test_inspect_limit_and_batches(inspect_records):
    assert inspect_records(*IDS, options=("--limit", 2))["sequences"] == 2
    results = inspect_records(*IDS, options=("--batch", 2))
    # [1, 2, 3, 4, 5] with [1, 2, 3, 9], then the others by themselves.
    assert results["batches"] == 2
    assert results["tokens"]["shared"] == 6 + 9
    assert results["attention_pairs"]["shared"] == 15 + 4 + 28 + 3


def test_inspect_takes_memory_that_grows_with_the_tokens(inspect_records):
    # A table of all sequences, each as wide as the longest, would hold 8e9 entries.
    results = inspect_records(*([i] for i in range(4000)), [5] * 1_000_000, [5] * 1_000_000)
    assert results["tokens"]["shared"] == 4000 - 1 + 1_000_000


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_inspect_shows_progress_on_a_terminal(tmp_path, monkeypatch, has_tqdm):
    if has_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    path = str(lines_file(tmp_path / "x.jsonl", *IDS))
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    assert len(read(path, [], None, None).sequences) == 4
    assert ("0 lines" in stream.getvalue()) == has_tqdm


# ---- inspect: messages --------------------------------------------------------------------------

CALL = {"name": "look_up", "arguments": {"word": "spider"}}


def turns(answer, **said):
    """A conversation of one turn, whose assistant says `said` besides its content."""
    user = {"role": "user", "content": "legs of a spider?"}
    return [user, {"role": "assistant", "content": answer, **said}]


def texts(tmp_path, *records, columns=()):
    """What is compared of these lines, as text, and the rollouts."""
    rollouts = read(str(lines_file(tmp_path / "x.jsonl", *records)), [*columns], None, None)
    return [x.tobytes().decode() for x in rollouts.sequences], rollouts


@pytest.mark.parametrize(
    "said",
    [
        {"reasoning_content": "arachnids have eight"},
        {"reasoning": "arachnids have eight"},
        {"thinking": "arachnids have eight"},
        {"tool_calls": [{"type": "function", "function": CALL}]},
        {"function_call": CALL},
    ],
)
def test_inspect_counts_all_that_a_message_says(tmp_path, said):
    (value,) = said.values()
    written = value if isinstance(value, str) else json.dumps(value)
    for content in ("8", None):
        ((text,), rollouts) = texts(tmp_path, {"messages": turns(content, **said)})
        assert text.startswith("<user>\nlegs of a spider?\n<assistant>\n")
        assert written in text
        assert rollouts.chat.unread == set()
    # A message may have no content at all.
    message = {"role": "assistant", **said}
    assert written in texts(tmp_path, {"messages": [message]})[0][0]


def test_inspect_verdict_counts_reasoning_and_tool_calls(inspect_records):
    # 60 bytes shared, then 600 of each one's own that are no content.
    records = [
        {"messages": turns("8", reasoning_content=x * 300, tool_calls=[{"name": x * 300}])}
        for x in "ab"
    ]
    results = inspect_records(*records)
    assert results["tokens"]["ratio"] < 1.1
    assert results["verdict"].startswith("Not worth it")
    assert inspect_records(*({"messages": turns("8")} for _ in "ab"))["tokens"]["ratio"] == 2


def test_inspect_names_fields_of_messages_that_it_does_not_read(run, tmp_path):
    record = {"messages": [{"role": "tool", "name": "look_up", "content": "8", "refusal": None}]}
    path = lines_file(tmp_path / "x.jsonl", record)
    assert "for want of a chat template; without name" in " ".join(run("inspect", path)[1].split())
    assert json.loads(run("inspect", path, "--json")[1])["message_fields_not_read"] == ["name"]


def test_inspect_names_columns_that_it_does_not_read(run, tmp_path):
    record = {"prompt": "a", "completion": "b", "answer": "c", "reward": 1.0, "tools": None}
    path = lines_file(tmp_path / "x.jsonl", record)
    assert re.search(r"not read +answer$", run("inspect", path)[1], re.M)


def test_inspect_names_columns_inside_of_objects_that_it_does_not_read(tmp_path):
    body = {"model": "m", "messages": turns("8"), "tools": [{"name": "look_up"}], "n": 3}
    _, rollouts = texts(tmp_path, {"custom_id": "1", "body": body})
    assert rollouts.unread == ["custom_id", "body.model"]


def test_inspect_reads_tools_and_system_prompts(tmp_path):
    tools = [{"name": "look_up"}]
    for given in (tools, json.dumps(tools)):
        (text,), _ = texts(tmp_path, {"messages": turns("8"), "tools": given})
        assert text.startswith('<tools>\n[{"name": "look_up"}]\n<user>\n')
    (text,), _ = texts(tmp_path, {"messages": turns("8"), "tools": "no JSON"})
    assert text.startswith('<tools>\n"no JSON"\n<user>\n')
    for record in (
        {"system": "Be brief.", "messages": turns("8")},
        {"params": {"system": "Be brief.", "messages": turns("8")}},
        {"body": {"instructions": "Be brief.", "input": turns("8")}},
    ):
        (text,), rollouts = texts(tmp_path, record)
        assert text.startswith("Be brief.<user>\n")
        assert rollouts.unread == []


def test_inspect_tells_pictures_apart_and_says_that_it_does_not_count_them(run, tmp_path):
    def asked(url):
        picture = {"type": "image_url", "image_url": {"url": url}}
        parts = [picture, {"type": "text", "text": "what is it?"}, {"type": "seen", "by": "me"}]
        return {"messages": [{"role": "user", "content": parts}]}

    (one, same, other), rollouts = texts(
        tmp_path, asked("x" * 999), asked("x" * 999), asked("y" * 999)
    )
    assert one == same != other
    assert len(one) == len(other) < 120
    assert one.endswith('what is it?{"type": "seen", "by": "me"}\n')
    assert rollouts.chat.media == 3
    out = run("inspect", tmp_path / "x.jsonl")[1]
    assert re.search(r"NOT COUNTED +3 picture or such parts: each stands as", out)


def test_inspect_digests_documents_and_pictures_that_tools_found(tmp_path):
    def asked(data):
        source = {"type": "base64", "data": data}
        found = {"type": "tool_result", "content": [{"type": "image", "source": source}]}
        content = [{"type": "document", "source": source}, found]
        return {"messages": [{"role": "user", "content": content}]}

    (one, other), rollouts = texts(tmp_path, asked("x" * 999), asked("y" * 999))
    assert one != other
    assert len(one) == len(other) < 200
    assert rollouts.chat.media == 4


class DroppingTokenizer(FakeTokenizer):
    """A chat template that knows content alone, and tools where it is asked to."""

    def apply_chat_template(self, messages, tokenize, tools=()):
        return " ".join([*(t["name"] for t in tools), *(str(m["content"]) for m in messages)])


class SpeakingTokenizer(FakeTokenizer):
    """A chat template that writes all, and refuses a message that says nothing."""

    def apply_chat_template(self, messages, tokenize):
        def said(m):
            calls = [call["name"] for call in m.get("tool_calls", [])]
            words = [m.get("reasoning_content"), m["content"], *calls]
            if not any(words):
                raise RuntimeError("an empty message")
            return " ".join(filter(None, words))

        return " ".join(map(said, messages))


def test_inspect_says_what_the_chat_template_drops(run, tmp_path, monkeypatch):
    said = {"reasoning_content": "arachnids", "tool_calls": [CALL]}
    records = [{"messages": turns("8", **said)}, {"messages": turns(None, tool_calls=[CALL])}]
    path = lines_file(tmp_path / "x.jsonl", *records)
    use_tokenizer(monkeypatch, DroppingTokenizer(chat_template="yes"))
    results = json.loads(run("inspect", path, "--tokenizer", "there", "--json")[1])
    assert results["dropped_by_template"] == {"reasoning_content": 1, "tool_calls": 2}
    out = " ".join(run("inspect", path, "--tokenizer", "there")[1].split())
    assert "NOT COUNTED tool_calls of 2 messages: the chat template leaves it out" in out
    use_tokenizer(monkeypatch, SpeakingTokenizer(chat_template="yes"))
    results = json.loads(run("inspect", path, "--tokenizer", "there", "--json")[1])
    assert results["dropped_by_template"] == {}


def test_inspect_gives_tools_to_the_chat_template(inspect_records, monkeypatch):
    use_tokenizer(monkeypatch, DroppingTokenizer(chat_template="yes"))
    record = {"messages": turns("8"), "tools": [{"name": "look_up"}]}
    records = record, record | {"messages": turns("9")}
    results = inspect_records(*records, options=("--tokenizer", "there"))
    assert results["tree"][0] == '└─ 2 x 5  "look_up legs of a spider?"'


# ---- inspect: formats ---------------------------------------------------------------------------


def test_inspect_reads_outputs_of_vllm(tmp_path):
    outputs = [
        {"index": i, "text": t, "token_ids": x} for i, t, x in ((0, "c", [3]), (1, "d", [4, 5]))
    ]
    record = {"request_id": "0", "prompt": "ab", "prompt_token_ids": [1, 2], "outputs": outputs}
    rollouts = read(str(lines_file(tmp_path / "x.jsonl", record)), [], None, None)
    assert [x.tolist() for x in rollouts.sequences] == [[1, 2, 3], [1, 2, 4, 5]]
    assert rollouts.paths == (("prompt_token_ids", "outputs.token_ids"),)
    # Without ids of the prompt its text is read.
    assert texts(tmp_path, record | {"prompt_token_ids": None})[0] == ["abc", "abd"]


def test_inspect_leaves_out_what_input_lengths_hide(inspect_records):
    # NeMo-RL pads on the right, a line for each sequence or all of them in one.
    longest = max(map(len, IDS))
    padded = [x + [0] * (longest - len(x)) for x in IDS]
    lengths = list(map(len, IDS))
    right = inspect_records(*IDS)
    lines = [
        {"token_ids": x, "input_lengths": n, "content": ["a"]}
        for x, n in zip(padded, lengths, strict=True)
    ]
    for records in (lines, [{"token_ids": padded, "input_lengths": lengths}]):
        results = inspect_records(*records)
        assert results["masked_tokens"] == 4 * longest - sum(lengths)
        for key in ("tokens", "attention_pairs", "tree"):
            assert results[key] == right[key]


@pytest.mark.parametrize(
    ("lengths", "reason"),
    [
        (3, "input_lengths must be 0 to 2, as token_ids has, got 3"),
        (-1, "input_lengths must be 0 to 2, as token_ids has, got -1"),
        (True, "input_lengths must be 0 to 2, as token_ids has, got True"),
        ([1, 1], "input_lengths has not the shape of token_ids"),
        ("2", "input_lengths has not the shape of token_ids"),
    ],
)
def test_inspect_refuses_lengths_that_do_not_fit(inspect_records, lengths, reason):
    results = inspect_records([1], {"token_ids": [1, 2], "input_lengths": lengths})
    assert results["bad_lines"] == [{"line": 2, "reason": reason}]


def test_inspect_reads_requests_of_openai_and_refuses_answers(run, tmp_path):
    body = {"model": "m", "messages": turns("8"), "tools": [{"name": "look_up"}]}
    request = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (text,), rollouts = texts(tmp_path, request)
    assert text.startswith('<tools>\n[{"name": "look_up"}]\n<user>\n')
    assert rollouts.paths == (("body.messages",),)
    answer = {"choices": [{"message": {"role": "assistant", "content": "8"}}]}
    response = {"status_code": 200, "body": answer}
    path = lines_file(tmp_path / "x.jsonl", {"custom_id": "1", "response": response})
    code, _, err = run("inspect", path)
    assert code == 2
    assert "answers without their prompts: write one object per answer, whose messages" in err


def test_inspect_takes_each_object_of_a_list_by_itself(tmp_path):
    record = {
        "messages": [{"role": "user", "content": "a"}],
        "choices": [{"message": {"role": "assistant", "content": x}} for x in "bc"],
    }
    found, _ = texts(tmp_path, record, columns=["messages", "choices.message"])
    assert found == [f"<user>\na\n<assistant>\n{x}\n" for x in "bc"]
    # A name with a dot of its own comes first.
    assert texts(tmp_path, {"a.b": "x", "a": {"b": "y"}}, columns=["a.b"])[0] == ["x"]
    with pytest.raises(ReadError, match=r"'a\.c' is not in line 1; there are: 'a'"):
        texts(tmp_path, {"a": [{"b": "y"}, 3]}, columns=["a.c"])


def test_inspect_reads_parquet(run, tmp_path):
    # As TRL logs completions: through Arrow, which fills the gaps of structs with nulls.
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {
            "step": 1,
            "prompt": [{"role": "user", "content": "legs of a spider?"}],
            "completion": [{"role": "assistant", "content": x, **more}],
            "reward": 0.5,
        }
        for x, more in (("8", {}), (None, {"tool_calls": [{"function": CALL}]}))
    ]
    path = tmp_path / "completions_00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1)
    lines = lines_file(tmp_path / "x.jsonl", *rows)
    results, right = (json.loads(run("inspect", x, "--json")[1]) for x in (path, lines))
    assert results["sequences"] == 2
    for key in ("columns", "tokens", "attention_pairs", "tree", "message_fields_not_read"):
        assert results[key] == right[key]
    assert json.loads(run("inspect", path, "--json", "--limit", 1)[1])["sequences"] == 1
    ids = tmp_path / "ids.parquet"
    parquet.write_table(pyarrow.table({"input_ids": [*IDS, [-1]]}), ids)
    code, out, err = run("inspect", ids, "--json")
    assert (code, err.split(":")[0]) == (0, "row 5 left out")
    assert json.loads(out)["tokens"]["shared"] == 10
    path.write_bytes(path.read_bytes()[:-9])
    code, _, err = run("inspect", path)
    assert code == 2
    assert f"can't read {path}: " in err


def test_inspect_reads_parquet_from_a_pipe(tmp_path, monkeypatch):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": ["ab", "ac"]}), path)
    reader, writer = os.pipe()
    os.write(writer, path.read_bytes())
    os.close(writer)
    with open(reader, "rb") as pipe:
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=pipe))
        rollouts = read("-", [], None, None)
    assert [x.tobytes() for x in rollouts.sequences] == [b"ab", b"ac"]


def test_inspect_reads_parquet_with_times_that_python_has_no_type_for(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "x.parquet"
    times = {
        "when": pyarrow.array([1], pyarrow.timestamp("ns")),
        "where": pyarrow.array([1], pyarrow.timestamp("us", tz="Mars/Phobos")),
    }
    parquet.write_table(pyarrow.table({"text": ["ab"], **times}), path)
    (sequence,) = read(str(path), [], None, None).sequences
    assert sequence.tobytes() == b"ab"


def test_inspect_names_missing_pyarrow(run, tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"PAR1....")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = run("inspect", tmp_path / "x")
    assert code == 2
    assert "x is Parquet, which needs pyarrow: pip install prefix-attn[inspect]" in err


@pytest.mark.parametrize(
    ("pack", "what"),
    [
        (bz2.compress, "it is bzip2: bzcat {} | prefix-attn inspect -"),
        (lzma.compress, "it is xz: xzcat {} | prefix-attn inspect -"),
        (
            lambda data: b"\x28\xb5\x2f\xfd" + data,
            "it is zstd: zstd -dc {} | prefix-attn inspect -",
        ),
        (b"ARROW1\0\0".__add__, "it is an Arrow file: write Parquet"),
    ],
)
def test_inspect_names_formats_that_it_does_not_read(run, tmp_path, pack, what):
    path = lines_file(tmp_path / "x", *IDS)
    path.write_bytes(pack(path.read_bytes()))
    code, _, err = run("inspect", path)
    assert code == 2
    assert what.format(path) in err


def test_inspect_names_archives_of_torch(run, tmp_path):
    torch.save(IDS, tmp_path / "x.pt")
    assert (
        "as of torch.save or numpy.savez: write JSON lines" in run("inspect", tmp_path / "x.pt")[2]
    )


# ---- the page of the documentation --------------------------------------------------------------

PAGE = (ROOT / "docs" / "pages" / "cli.md").read_text()


@pytest.mark.parametrize(
    ("command", "shown"),
    re.findall(r"\$ prefix-attn ((?:estimate|inspect) .*)\n((?:.*\n)*?)```", PAGE),
)
def test_page_shows_what_is_printed(run, tmp_path, monkeypatch, command, shown):
    (rollout_lines,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.S)
    (tmp_path / "rollouts.jsonl").write_text(rollout_lines)
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(*command.split())
    assert code == 0
    assert out == shown


# ---- info ---------------------------------------------------------------------------------------


def test_info_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "prefix_attn", "info", "--json"],
        cwd=ROOT,
        env={key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["versions"]["torch"] == str(torch.__version__)
    assert results["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(results["gpus"]) == torch.cuda.device_count()
    assert results["self_test"]["result"] == "ok"
    assert [c["name"] for c in results["self_test"]["checks"]] == ["out", "dq", "dk", "dv"]
    backends = results["backends"]
    assert "needs CUDA tensors" in backends["triton"]["cpu"]["why_not"]
    assert backends["cpu"]["cpu"] | {"auto": None} == {
        "why_not": None,
        "lacks": [],
        "auto": None,
    }
    assert backends["reference"]["cpu"]["lacks"] == []
    assert results["environment"]["TRITON_INTERPRET"]["value"] is None


def test_info_without_triton_and_integrations_touches_no_driver():
    gone = "triton, transformers, trl, verl, tqdm, matplotlib"
    done = spawn(
        f"import sys; sys.modules.update(dict.fromkeys({gone!r}.split(', ')))\n"
        "import torch\n"
        "from importlib import metadata\n"
        "from prefix_attn.cli import info, main\n"
        "info._version = lambda name: '0'  # installed, and broken\n"
        "code = main(['info', '--json'])\n"
        "assert not torch.cuda.is_initialized() or torch.cuda.is_available()\n"
        "sys.exit(code)"
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert "Triton can't be imported" in results["backends"]["triton"]["cpu"]["why_not"]
    why_not = results["integrations"]["transformers"]["why_not"]
    assert why_not.startswith("ModuleNotFoundError: ")
    assert results["integrations"]["prefix_grouper"]["why_not"] is None


def test_info_names_every_integration():
    inside = {"packing", "ranks"}  # that of others
    folder = ROOT / "prefix_attn" / "integrations"
    modules = {path.stem for path in folder.iterdir() if not path.name.startswith("_")}
    assert set(info.INTEGRATIONS) == modules - inside


def test_info_prints_every_section(run, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    code, out, _ = run("info")
    assert code == 0
    assert re.search(r"^  torch +" + re.escape(str(torch.__version__)), out, flags=re.M)
    assert "now '0'" in out
    assert re.search(r"^  ok +backend ", out, flags=re.M)
    assert all(re.search(rf"^  {name} +\d", out, flags=re.M) for name in ("dq", "dk", "dv"))
    assert max(map(len, out.splitlines())) <= 80


cpu_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="breaks the CPU backend, which a GPU does not use"
)


@cpu_only
def test_info_fails_where_gradients_are_wrong(run, monkeypatch):
    right = cpu.backward

    def wrong(*arguments):
        dq, dk, dv, dsinks = right(*arguments)
        return dq, dk * 1.001, dv, dsinks

    monkeypatch.setattr(cpu, "backward", wrong)
    code, out, _ = run("info", "--json")
    assert code == 1
    test = json.loads(out)["self_test"]
    assert test["result"] == "FAILED"
    assert [c["name"] for c in test["checks"] if not c["ok"]] == ["dk"]


@cpu_only
def test_info_says_why_the_self_test_could_not_run(run, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("the library is broken")

    monkeypatch.setattr(cpu, "forward", broken)
    code, out, _ = run("info")
    assert code == 1
    assert re.search(r"FAILED +backend", out)
    assert "RuntimeError: the library is broken" in " ".join(out.split())


def test_info_lists_every_environment_variable_that_the_package_reads():
    read = set()
    for folder in (ROOT / "prefix_attn", ROOT / "kernels"):
        for path in folder.rglob("*.py"):
            text = path.read_text()
            read |= set(re.findall(r"PREFIX_ATTN_[A-Z_]+|TRITON_INTERPRET", text))
            read |= set(re.findall(r"(?:environ(?:\.get\(|\[)|getenv\()\"(\w+)\"", text))
    assert "TRITON_INTERPRET" in read
    assert read <= set(info.ENVIRONMENT)


@pytest.mark.parametrize(
    ("hip", "words"), [(None, "compute capability 9.4"), ("7.0", "Instinct, gfx942, 192.0 GiB")]
)
def test_info_names_gpus_as_their_makers_do(monkeypatch, hip, words):
    properties = types.SimpleNamespace(
        name="Instinct", major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-",
        total_memory=192 << 30, multi_processor_count=304,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    gpu = info._gpu(0)
    empty = {"backends": {}, "versions": {}, "integrations": {}, "environment": {}}
    test = {"result": "ok", "failure": None, "checks": [], "seconds": 0.0}
    test |= dict.fromkeys(("backend", "dtype", "device"), "")
    assert words in info.render({**empty, "gpus": [gpu], "self_test": test})
    monkeypatch.setattr(torch.version, "cuda", None)
    if hip:
        assert info._why_no_gpu() == "torch is built for ROCm 7.0, and finds no device"


def test_driver_version_is_that_of_the_kernel_module(tmp_path, monkeypatch):
    path = lines_file(
        tmp_path / "version", "NVRM version: NVIDIA UNIX Kernel Module  570.124.06  Wed\nGCC 13.2\n"
    )
    monkeypatch.setattr(info, "DRIVER_FILE", path)
    assert info._driver() == "570.124.06"
    monkeypatch.setattr(info, "DRIVER_FILE", tmp_path / "none")
    assert info._driver() == "unknown"


# ---- bench --------------------------------------------------------------------------------------

TINY = ("--prefix", 48, "--suffix", 16, "--group", 3, "--heads", 4, "--kv-heads", 2)
QUICK = (*TINY, "--head-dim", 16, "--minutes", 1e-9, "--device", "cpu")


def test_bench_compares_medians_with_the_ideal(run_json):
    results = run_json("bench", *QUICK)
    (row,) = results["shapes"]
    layout = PrefixLayout.from_lengths([48], [[16] * 3])
    assert row["ideal"] == pytest.approx(layout.flop_ratio)
    assert row["rounds"] == bench.MIN_ROUNDS
    repeated, ours = row["repeated_ms"], row["prefix_attn_ms"]
    assert row["speed_up"] == repeated["median"] / ours["median"] > 0
    assert row["share_of_ideal"] == row["speed_up"] / row["ideal"]
    assert repeated["p20"] <= repeated["median"] <= repeated["p80"]
    assert all(check["ok"] for check in row["checks"])
    assert results["backend"] == row["backend"] == "cpu"


def test_bench_prints_a_table(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # times of any length
    code, out, _ = run("bench", *QUICK)
    assert code == 0
    assert re.search(r"^P48 S16 G3 +[\d.e+]+ \(.*\) +[\d.]+x +1\.60x +\d+ %$", out, re.M)
    out = " ".join(out.split())
    assert "fp32, 4 query heads, 2 KV heads, head dimension 16, backend cpu" in out
    assert "of 3 interleaved rounds. Repeated: SDPA." in out


def test_bench_does_not_time_what_is_wrong(run, monkeypatch):
    right = cpu.forward

    def wrong(*arguments):
        out, lse = right(*arguments)
        return out * 1.001, lse

    monkeypatch.setattr(cpu, "forward", wrong)
    monkeypatch.setattr(bench, "_timed", None)
    code, out, _ = run("bench", *QUICK)
    assert code == 1
    assert "WRONG, not timed: P48 S16 G3 4/2 D16: out" in out


def test_bench_says_what_does_not_fit(run, monkeypatch):
    def too_much(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "_measured", too_much)
    code, _, err = run("bench", *QUICK)
    assert code == 2
    assert "P48 S16 G3 4/2 D16 in float32 does not fit in memory with the prefix repeated" in err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_bench_knows_errors_of_memory(run, monkeypatch, error):
    def failing(*arguments):
        raise error

    monkeypatch.setattr(bench, "_measured", failing)
    code, _, err = run("bench", *QUICK)
    assert code == 2
    assert "give a smaller --prefix, --suffix or --group" in err
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        run("bench", *QUICK)


def test_bench_refuses_what_the_memory_does_not_hold(run, monkeypatch, tmp_path):
    shape = case_of(48, 16, 3)
    leaves = [torch.empty(n, h, 16) for n in (96, 192) for h in (4, 2, 2, 4)]
    assert bench._bytes(shape) == sum(2 * x.nbytes for x in leaves)
    monkeypatch.setattr(bench, "MEMORY_FILE", tmp_path / "meminfo")
    monkeypatch.setattr(bench, "_announce", lambda *arguments: None)
    kib = bench._bytes(shape) // 1024
    bench.MEMORY_FILE.write_text(f"MemFree: 1 kB\nMemAvailable:   {kib - 1} kB\n")
    code, _, err = run("bench", *QUICK)
    assert code == 2
    assert "does not fit in memory with the prefix repeated: 432 KiB at least" in err
    assert "(431 KiB are free)" in err
    bench.MEMORY_FILE.write_text(f"MemFree: 1 kB\nMemAvailable:   {kib} kB\n")
    assert run("bench", *QUICK)[0] == 0


def test_bench_says_beforehand_what_takes_long(monkeypatch, capsys):
    clock = Clock(torch.device("cpu"))
    monkeypatch.setattr(clock, "seconds", lambda each: 0.1)
    small, large = case_of(48, 16, 3), case_of(4800, 1600, 3)
    bench._announce(small, small, CPU, clock, 0.0)
    assert capsys.readouterr().err == ""
    # 10,000 times the pairs, roughly: 0.2 s become 2,000 for a round, and there are four.
    bench._announce(large, small, CPU, clock, 0.0)
    assert "P4800 S1600 G3 4/2 D16 takes about 2 hours, to judge by" in capsys.readouterr().err
    bench._announce(large, small, CPU, clock, 8000.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.4, "12 seconds"), (100, "2 minutes"), (7000, "2 hours"), (2e5, "2 days")],
)
def test_durations_are_rounded(seconds, text):
    assert bench._duration(seconds) == text


def test_bench_runs_each_pass_once_before_it_counts():
    calls = []
    passes = [lambda: calls.append("repeated"), lambda: calls.append("shared")]
    times = bench._timed(passes, Clock(CPU), 0.0)
    assert [len(samples) for samples in times] == [bench.MIN_ROUNDS] * 2
    assert len(calls) == 2 * (1 + bench.MIN_ROUNDS)
    assert calls[:4] == ["repeated", "shared", "repeated", "shared"]


def test_bench_passes_give_the_gradients_of_their_inputs():
    shape = case_of(6, 2, 3, dtype="float64")
    device = torch.device("cpu")
    shared = bench._shared(shape, device)()
    assert [tuple(x.shape) for x in shared] == [(12, 4, 16), (12, 2, 16), (12, 2, 16)]
    name, repeated = bench._repeated(shape, device)
    assert name == "SDPA"
    assert [tuple(x.shape) for x in repeated()] == [(3, 4, 8, 16), (3, 2, 8, 16), (3, 2, 8, 16)]


@pytest.mark.parametrize("group", [(10**6, 10**4, 64), (0, 1, 5000), (1, 1, 10**6), (5000, 0, 2)])
def test_bench_checks_a_shape_that_is_small(group):
    small = case_of(*group).shrunk(bench.CHECK_TOKENS)
    assert 1 < small.tokens <= bench.CHECK_TOKENS
    assert small.group >= 2


def test_bench_fills_what_is_not_given():
    device, shapes = bench._plan(_options("bench", "--prefix", "100", "--device", "cpu"))
    assert device.type == "cpu"
    assert [shape.label for shape in shapes] == ["P100 S128 G8 8/2 D64"]
    _, shapes = bench._plan(_options("bench", "--device", "cpu"))
    assert len(shapes) == len(bench.CPU_SHAPES)


def test_bench_takes_the_gpu_that_pytorch_finds(monkeypatch):
    """By ROCm as well, where PyTorch has no version of CUDA."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "choose_backend", lambda *call, **named: "triton")
    device, shapes = bench._plan(_options("bench"))
    assert device.type == "cuda"
    assert len(shapes) == len(bench.CUDA_SHAPES)


def _options(*arguments):
    return parser("prefix-attn").parse_args(arguments)
