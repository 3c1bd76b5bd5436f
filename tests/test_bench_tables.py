"""The generated tables in the pages are those of the files that they come from."""

import csv
import importlib.util
from itertools import product

import pytest
import torch

from bench import models, peers, publish, report, sequence_parallel, shapes
from bench.cases import pairs
from bench.facts import environment
from bench.measure import Result
from bench.providers import MODES, PROVIDERS
from prefix_attn.cases import Case
from prefix_attn.timing import Quantiles

# A group of three; prefix and suffix are longer and shorter than the windows.
CASE = Case(7, 4, 3, 4, 2, 16, "float32")


@pytest.mark.parametrize("page", publish.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_their_files(page):
    text = page.read_text()
    assert "<!-- bench:begin" in text
    assert publish.filled(text) == text, "run python -m bench.publish"


def test_gpu_table_names_the_device_and_leaves_gaps(tmp_path):
    row = {
        "prefix": 2048, "suffix": 512, "group": 16, "heads_q": 32, "heads_kv": 8, "head_dim": 128,
        "provider": "prefix_attn", "fwd_ms": 1.5, "fwd_tflops": 400.2, "bwd_ms": "",
        "bwd_tflops": "", "total_ms": "", "total_speedup": "", "ideal": 3.5, "share_of_ideal": "",
        "peak_mib": 100.0, "device": "a GPU", "driver": "1.2", "threads": 8, "dtype": "bfloat16",
        "torch": "2.11", "triton": "3.6.0", "commit": "c",
    }  # fmt: skip
    path = tmp_path / "gpu.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    text = publish.markdown(path)
    cells = "2048, 512, 16, 32/8, 128 | prefix_attn | 1.500 | 400 | - | - | - | - | 3.50x | - | 100"
    assert cells in text
    assert "a GPU, driver 1.2, bfloat16, torch 2.11, Triton 3.6.0, commit c" in text


def test_run_without_a_marker_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "bench.csv").write_text("a\n")
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    assert publish.main(["no-such-name", "--run", str(tmp_path)]) == 1
    assert "no page has the marker" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (peers.main, ["--rounds", "2"], "--rounds must be at least 3, got 2"),
        (shapes.main, ["--rounds", "0"], "--rounds must be at least 3, got 0"),
        (models.main, ["mistral"], "needs transformers: pip install"),
        (sequence_parallel.main, ["--saved"], "needs transformers: pip install"),
    ],
)
def test_what_no_benchmark_can_run_is_refused_by_name(
    main, arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_run_of_another_benchmark_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "bench.csv").write_text("shape,provider\n")
    kept = tmp_path / "peers.csv"
    kept.write_text("tree,library\n")
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    assert publish.main(["peers", "--run", str(tmp_path)]) == 1
    assert "begins with 'shape'" in capsys.readouterr().err
    assert kept.read_text() == "tree,library\n"


@pytest.mark.parametrize(
    ("window_size", "prefix_causal"), [*product((None, 1, 3, 5, 9, 11, 20), (True, False))]
)
def test_pairs_are_those_of_the_mask(window_size, prefix_causal):
    keep = CASE.layout(torch.device("cpu")).materialize(
        window_size=window_size, prefix_causal=prefix_causal
    )
    assert pairs(CASE, window_size, prefix_causal) == int(keep.sum())


def _results(case):
    """One second for every provider and mode of a case."""
    second = Quantiles(1000.0, 1000.0, 1000.0)
    return [
        Result(
            case=case, provider=p.name, is_baseline=p.is_baseline, same=not p.changes,
            pairs=p.pairs(case), forward=second, backward=second, total=second, peak_bytes=0,
            errors={}, gate_case=case, rounds=3, compared=True,
        )
        for p in (*PROVIDERS, *MODES)
    ]  # fmt: skip


def test_modes_count_their_own_pairs_and_have_no_speedup_where_they_compute_something_else(
    tmp_path,
):
    case = Case(2048, 512, 16, 32, 8, 128, "bfloat16")
    rows = report.compare(_results(case))
    facts = environment(torch.device("cpu"))
    report.write(_results(case), facts, tmp_path, cases=0)
    lines = {r["provider"]: r for r in csv.DictReader((tmp_path / "bench.csv").open(newline=""))}
    ours, window = lines["prefix_attn"], lines["prefix_attn window 1024"]
    # Rows before the window's length see fewer keys, every later one sees 1024.
    pairs = 1024 * 1025 // 2 + 1024 * 1024 + 16 * 512 * 1024
    assert int(window["pairs"]) == pairs
    assert float(window["fwd_tflops"]) == pytest.approx(4 * 128 * 32 * pairs * 1e-12, rel=1e-5)
    assert float(window["bwd_tflops"]) == pytest.approx(2.5 * float(window["fwd_tflops"]), rel=1e-5)
    assert float(window["total_tflops"]) == pytest.approx(
        3.5 * float(window["fwd_tflops"]), rel=1e-5
    )
    empty = ("fwd_speedup", "total_speedup", "ideal", "share_of_ideal")
    assert [window[name] for name in empty] == [""] * 4
    assert all(ours[name] for name in empty)
    for name in ("prefix_attn deterministic=False", "prefix_attn gluon"):
        assert [lines[name][x] for x in (*empty, "pairs")] == [ours[x] for x in (*empty, "pairs")]
    shown = report.table(rows).splitlines()
    assert any(" window 1024 " in x and x.split()[-4:-1] == ["-", "-", "-"] for x in shown)
    text = publish.markdown(_with_driver(tmp_path / "bench.csv"))
    assert "TFLOP/s count the pairs of each mode" in text


def _with_driver(path):
    """The same file as a GPU would have written it."""
    rows = [r | {"driver": "1.2"} for r in csv.DictReader(path.open(newline=""))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_picture_takes_what_computes_the_same(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = report.compare(_results(CASE)[::-1])
    assert report.draw(rows, environment(torch.device("cpu")), tmp_path / "bench.png", most=1)
    assert (tmp_path / "bench.png").stat().st_size > 0


def test_shapes_are_checked_and_timed(tmp_path, monkeypatch, capsys):
    comb = shapes.Shape("comb", (3,) * 6, shapes._comb(3), window_size=4)
    capped = shapes._groups("capped", 5, 2, 2, softcap=2.0, sinks=True)
    monkeypatch.setattr(shapes, "SHAPES", (comb, capped))
    assert shapes.main(["--rounds", "3", "--out", str(tmp_path)]) == 0
    lines = list(csv.DictReader((tmp_path / "bench.csv").open(newline="")))
    assert [(x["shape"], x["provider"]) for x in lines] == [
        ("comb", "repeated SDPA, boolean mask"),
        ("comb", "prefix_attn"),
        ("capped", "repeated formula"),
        ("capped", "prefix_attn"),
    ]
    assert "of ideal" in capsys.readouterr().out
    text = publish.markdown(tmp_path / "bench.csv")
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "bench.png").stat().st_size > 0
    ours = shapes.cells(lines[1])
    assert ours[:2] == ("comb", "prefix_attn")
    assert f"| {' | '.join(ours)} |" in text
    assert text.endswith("masked or padding.")

    monkeypatch.setattr(shapes, "prefix_attention", lambda q, *args, **options: q + 1)
    assert shapes.main(["--rounds", "3", "--out", str(tmp_path), "comb"]) == 1
    assert "WRONG, not timed: comb" in capsys.readouterr().err


def test_shapes_are_the_trees_that_they_name():
    assert shapes._binary(3) == (-1, 0, 1, 1, 0, 4, 4)
    assert shapes._comb(3) == (-1, 0, 0, 2, 2, 4)
    groups = shapes._groups("two", 5, 2, 2, 2)
    assert (groups.lengths, groups.parents) == ((5, 2, 2) * 2, (-1, 0, 0, -1, 3, 3))
    assert groups.members == 2
