"""The GPU benchmark, tried on a CPU: every unit runs, interpreted, at tiny shapes."""

import csv
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from bench import __main__ as bench_main
from bench import cases, facts, measure, providers
from bench.cases import case_from_text
from bench.gpu import __main__ as gpu
from bench.gpu import checks, report, tune, units
from bench.gpu.__main__ import RECORDS, Records, read
from bench.gpu.units import Session, Unit
from bench.measure import UnsupportedError, WrongResultError
from bench.providers import MODES, PROVIDERS, Provider
from prefix_attn import PrefixLayout
from prefix_attn.cases import Case
from prefix_attn.timing import Clock

ROOT = Path(__file__).parents[1]
# Stand-ins for packages that only GPUs have: repeated attention as their users call it.
FLASH_PACKAGE = """
import torch.nn.functional as F

def flash_attn_func(q, k, v, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return {result}
"""


def run(folder, *arguments, path=(), script=("-m", "bench.gpu")):
    environment = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
    command = [sys.executable, *script, "--dry-run", "--out", str(folder), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with the two packages: one returns the output, the other more."""
    folder = tmp_path_factory.mktemp("packages")
    first, second = folder / "flash_attn_interface.py", folder / "flash_attn" / "cute"
    second.mkdir(parents=True)
    first.write_text(FLASH_PACKAGE.format(result="out.transpose(1, 2)"))
    (second / "__init__.py").write_text(FLASH_PACKAGE.format(result="(out.transpose(1, 2), None)"))
    return folder


def test_dry_run_tries_every_unit_and_goes_on_where_it_stopped(tmp_path, packages):
    first = run(tmp_path, path=[packages])
    assert first.returncode == 0, first.stdout + first.stderr
    records = read(tmp_path / RECORDS)
    ended = {r["key"]: r for r in records if r["status"] != "started"}
    assert {r["status"] for r in ended.values()} <= {"done", "unsupported"}
    refused = [key for key, r in ended.items() if r["status"] == "unsupported"]
    assert all(key.endswith(("/two calls", "/prefix-grouper")) for key in refused)
    rows = list(csv.DictReader((tmp_path / "bench.csv").open(newline="")))
    assert {"repeated FlashAttention-3", "FlexAttention", "prefix_attn"} <= {
        row["provider"] for row in rows
    }
    for row in rows:
        assert float(row["fwd_ms"]) > 0
        assert row["bwd_tflops"] or row["provider"] == "FlexAttention"
        assert row["torch"] == torch.__version__
    for name in ("check.csv", "ceiling.csv", "bench.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert json.loads((tmp_path / "results.json").read_text())["facts"]["commit"]

    # What a crash leaves: a line cut short, and a unit without an end.
    lines = (tmp_path / RECORDS).read_text().splitlines()
    last = json.loads(lines[-1])
    (tmp_path / RECORDS).write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    second = run(tmp_path, path=[packages])
    assert second.returncode == 0, second.stdout + second.stderr
    again = read(tmp_path / RECORDS)[len(lines) - 1 :]
    assert [(r["key"], r["status"]) for r in again] == [
        (last["key"], "started"),
        (last["key"], "done"),
    ]


def test_sweep_times_candidates(tmp_path):
    done = run(tmp_path, "--kernel", "backward")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "tune.csv").open(newline="")))
    assert [row["is_present"] for row in rows].count("True") == 1
    assert len(rows) == 2


# Runs `bench.gpu` with units of its own, in the workers that it starts, too.
SCRIPT = """
import os, sys, time
import torch
from bench.gpu import __main__ as gpu
from bench.gpu.units import Unit
from bench.measure import WrongResultError

def fail(error):
    raise error

gpu.COMMAND = [sys.executable, __file__]
gpu.UNIT_SECONDS = 20.0
gpu.units = lambda session: [
    Unit("time/dies", 0.0, os.abort),
    Unit("time/hangs", 0.0, lambda: time.sleep(600)),
    Unit("check/wrong", 0.0, lambda: fail(WrongResultError("not equal"))),
    Unit("time/large", 0.0, lambda: fail(torch.OutOfMemoryError("no memory left"))),
    Unit("time/late", 1e9, os.abort),
    Unit("ceiling/fine", 0.0, lambda: [{"what": "x", "unit": "y", "reached": 1.0}]),
]
sys.exit(gpu.main())
"""


def test_unit_that_dies_or_hangs_is_recorded_and_the_rest_goes_on(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folder = tmp_path / "out"
    done = run(folder, script=(str(script),))
    outcomes = {r["key"]: (r["status"], r["reason"]) for r in read(folder / RECORDS)}
    assert done.returncode == 1, done.stdout + done.stderr
    assert outcomes == {
        "time/dies": ("failed", "the process died, exit status -6"),
        "time/hangs": ("failed", "took more than 20 s"),
        "check/wrong": ("wrong", "not equal"),
        "time/large": ("failed", "out of memory: no memory left"),
        "ceiling/fine": ("done", ""),
    }
    assert "1 units did not fit into the time" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "needs a CUDA device" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0"], "must be positive, got 0"),
        (["--case", "1,1,1,1,1,16"], "give --kernel"),
        (["--kernel", "forward", "--case", "1,2"], "six integers"),
        (["--kernel", "sideways"], "invalid choice"),
        (["--kernel", "forward", "--mode", "gluon"], "invalid choice"),
        (["--out", str(Path(__file__))], "is a file"),
    ],
)
def test_wrong_command_line_says_why(arguments, words, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert words in capsys.readouterr().err


FACTS = {"device": "d", "driver": "1", "torch": "2", "triton": "3", "commit": "c"}


def test_units_are_finished_when_done_on_the_same_device_and_commit(tmp_path):
    records = Records(tmp_path, FACTS, "one")
    records.append("a", "done")
    records.append("b", "failed", "reason")
    records.append("c", "unsupported", "reason")
    records.append("d", "started")
    assert records.finished() == {"a", "b", "c"}
    assert Records(tmp_path, FACTS, "two").finished() == {"a", "c"}
    assert Records(tmp_path, FACTS | {"commit": "other"}, "one").finished() == set()


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (UnsupportedError("too large"), "unsupported", "too large"),
        (WrongResultError("dq"), "wrong", "dq"),
        (AssertionError("dq"), "failed", "AssertionError: dq"),
        (torch.OutOfMemoryError("full"), "failed", "out of memory: full"),
        (RuntimeError("boom\nmore"), "failed", "RuntimeError: boom"),
    ],
)
def test_errors_of_a_unit_are_named(error, status, reason):
    def fail():
        raise error

    assert gpu.attempt(Unit("key", 0.0, fail)) == (status, reason, [])


def test_most_telling_cases_come_first_and_all_are_there():
    found = units.cases(dry=False)
    assert len(found) == len(set(found))
    assert (found[0].prefix, found[0].head_dim, found[0].heads_kv) == (2048, 128, 8)
    assert {(c.head_dim, c.heads_kv) for c in found} == {(64, 8), (64, 32), (128, 8), (128, 32)}
    assert {(c.prefix, c.suffix, c.group) for c in found} >= {
        (p, s, g) for p in (512, 2048, 8192, 32768) for s in (128, 512, 2048) for g in (4, 16, 64)
    }


@pytest.mark.parametrize("tuned", tune.tuning.TUNED)
def test_candidates_begin_with_the_present_configuration_and_launch_something_else(tuned):
    present = tune.select_config(90, 128, torch.bfloat16, 132)
    found = tune.candidates(tuned, present, descriptors=True)
    assert found[0] == present
    labels = {tune.label(tuned, config) for config in found}
    assert len(found) == len(labels) >= 8
    if tuned == "forward":
        assert {config.forward_descriptors for config in found} == {True, False}
        # Two blocks of eight warps, and four warps on tiles as large.
        assert {"128x32 s3 w8 r128 TMA", "128x64 s2 w4 TMA", "128x64 s2 w4"} <= labels
    if tuned == "backward":
        assert {config.backward_descriptors for config in found} == {True, False}
    if tuned == tune.FUSED:  # what the backward launches where the order is free
        launched = {config.keys_for(fused=True, softcap_window=False) for config in found}
        assert len(launched) == len(found)


def _sweep_row(kernel, mode, block_m, ms):
    present = tune.select_config(90, 128, torch.bfloat16, 132)
    tile = tune.Tile(block_m, 128)
    config = replace(present, keys=tile, fused=tile)
    return {
        "kernel": kernel,
        "mode": mode,
        "ms": ms,
        "case": {"dtype": "bfloat16", "head_dim": 128},
        "arch": 90,
        "tiles": tune.asdict(config),
    }


def test_tiles_are_kept_from_modes_that_compute_the_same_only(tmp_path):
    plain = _sweep_row("backward", "prefix_attn", 64, 2.0)
    window = _sweep_row("backward", "prefix_attn window 1024", 16, 0.5)
    fused = _sweep_row(tune.FUSED, "prefix_attn deterministic=False", 32, 1.0)
    latest = [{"key": "tune/x", "rows": [row]} for row in (window, plain, fused)]
    path = tmp_path / "tiles.json"
    assert report._keep_tiles(latest, path) == ["tiles.json"]
    (entry,) = json.loads(path.read_text()).values()
    assert (entry["keys"]["block_m"], entry["fused"]["block_m"]) == (64, 32)


def test_baseline_of_a_sweep_is_kept_only_if_the_present_configuration_ran(monkeypatch):
    session = Session(torch.device("cpu"), dry=True, clock=Clock(torch.device("cpu")))
    present = tune.select_config(90, 16, torch.float32, 132)
    ours = next(p for p in PROVIDERS if p.name == "prefix_attn")

    def fail(*arguments):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(tune, "warm_up", fail)
    case = case_from_text(tune.DRY_CASE, "float32")
    with pytest.raises(RuntimeError, match="out of resources"):
        tune.time_candidate(session, "forward", case, ours, present, present)
    assert session.baseline_case != case


@pytest.fixture
def fake_cuda(monkeypatch):
    """A CUDA device of which only memory counters are asked; tensors stay on the CPU."""
    calls = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, n=name, **__: calls.append(n))
    return calls


def test_peak_memory_on_a_gpu_is_what_comes_on_top(fake_cuda, monkeypatch):
    held = {"now": 100, "most": 0}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["most"])

    def run():
        held["most"] = 170

    assert measure.peak_memory(run, torch.device("cuda")) == 70
    assert fake_cuda == ["synchronize", "reset_peak_memory_stats", "synchronize"]


def test_case_that_does_not_fit_says_what_it_would_need(monkeypatch):
    device = torch.device("cuda")
    provider = next(p for p in PROVIDERS if p.name == "repeated SDPA flash")
    case = case_from_text("32768,2048,64,32,32,128", "bfloat16")
    needed = units.bytes_needed(case, provider)
    for total, fits in ((80 << 30, False), (4 * needed, True)):
        properties = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, x=properties: x)
        said = None if fits else f"would need {needed / 2**30:.0f} GiB of 80"
        assert units.too_large(case, provider, device) == said


@pytest.fixture
def fake_hopper(monkeypatch):
    """Its name, driver and properties."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Hopper")
    return torch.device("cuda")


def test_sweep_on_hopper_tries_loads_by_descriptor(fake_hopper):
    session = Session(fake_hopper, dry=False, clock=Clock(torch.device("cpu")))
    for arguments, words in (
        (["--kernel", "forward"], {"TMA"}),
        (["--kernel", "forward", "--case", "6,4,2,2,1,80"], {"TMA"}),
        (["--kernel", "forward", "--case", "6,4,2,2,1,84"], set()),  # 168 bytes a head
        (["--kernel", "backward"], {"TMA"}),
        (["--kernel", "backward", "--mode", "deterministic=False"], set()),
    ):
        found = tune.units(session, gpu.parse(arguments))
        assert len({unit.key for unit in found}) == len(found) >= 8
        assert {"TMA" for unit in found if unit.key.endswith("TMA")} == words
    with pytest.raises(SystemExit, match="no tile of its own to sweep here"):
        tune.units(session, gpu.parse([*arguments, "--case", "6,4,2,2,1,84"]))


def test_facts_of_a_gpu_name_it_and_its_driver(fake_hopper, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 590.48\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = facts.environment.__wrapped__(fake_hopper)
    assert (found["device"], found["driver"]) == ("Hopper", "590.48")
    monkeypatch.setenv("PATH", "")
    assert facts._driver() == "unknown"


def test_late_stream_is_another_one_that_waits_and_is_waited_for(monkeypatch):
    events = []

    class Stream:
        def __init__(self, name):
            self.name = str(name)

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def entered(stream):
        events.append(f"in {stream.name}")
        yield

    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("late"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("default"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(2, 2))
    with checks._late_stream(torch.device("cuda")):
        events.append("work")
    assert events == ["late waits for default", "in late", "work", "default waits for late"]


@pytest.mark.parametrize("layer", [1, 2])
def test_check_finds_a_later_layer_that_waits_for_the_gpu(layer, monkeypatch):
    modes, calls, attend = ["default"], [], checks.prefix_attention

    def waiting(q, k, v, layout, backend):
        calls.append(1)
        if len(calls) == layer and modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return attend(q, k, v, layout, backend="cpu")

    layout = PrefixLayout.from_lengths([3], [[2]])
    monkeypatch.setattr(checks, "_layout", lambda *_: layout)
    monkeypatch.setattr(checks, "prefix_attention", waiting)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    check = partial(checks.waits_for_nothing, checks.tried()[0][0], {}, torch.device("cuda"))
    if layer == 2:
        with pytest.raises(WrongResultError, match="a later layer waits for the GPU: called a"):
            check()
    else:  # the first one builds and copies work lists
        check()
    assert modes == ["default", "error", "default"]
    assert len(calls) == 2


def test_device_that_answers_no_more_ends_the_worker(fake_cuda, monkeypatch):
    device = torch.device("cuda")
    assert gpu._device_answers(device)
    assert fake_cuda == ["synchronize", "empty_cache"]

    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert not gpu._device_answers(device)


@pytest.mark.parametrize("group", [1, 2], ids=["all heads", "head groups"])
def test_two_calls_match_repeating(group):
    """Prefix Grouper's stand-in, with the mask that it has on a GPU."""
    case = replace(case_from_text("6,4,2,2,1,16", "float32"), heads_kv=2 // group)
    problem = providers.Problem.random(case, torch.device("cpu"), seed=0)
    on_gpu = SimpleNamespace(case=case, inputs=SimpleNamespace(q=SimpleNamespace(is_cuda=True)))
    bias = providers._suffix_mask(on_gpu)
    dense = providers._suffix_mask(problem)
    q, k = torch.randn(1, 2, case.suffix, 16), torch.randn(1, 2, case.prefix + case.suffix, 16)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, k, k, attn_mask=bias),
        F.scaled_dot_product_attention(q, k, k, attn_mask=dense),
    )
    two, repeated = providers._prepare_two_calls(problem), providers._prepare_repeated(problem)
    actual, expected = two.results(), repeated.results()
    for name, exact in expected.items():
        torch.testing.assert_close(actual[name], exact, rtol=1e-5, atol=1e-5)


def test_bench_starts_without_tqdm_and_matplotlib(tmp_path):
    code = (
        "import importlib.util as u, runpy, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n in ('tqdm', 'matplotlib') else find(n, *a)\n"
        "sys.modules['tqdm'] = sys.modules['matplotlib'] = None\n"
        "sys.argv = ['bench', '--case', '6,4,2,2,1,16', '--rounds', '3']\n"
        f"sys.argv += ['--out', {str(tmp_path)!r}]\n"
        "runpy.run_module('bench', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "matplotlib is not installed, so there is no picture" in done.stdout
    assert "float64 check" in done.stderr
    assert (tmp_path / "bench.csv").stat().st_size > 0


def test_report_without_records_says_so(tmp_path, capsys):
    assert report.write(tmp_path, []) == 1
    assert "no records" in capsys.readouterr().out


CPU = torch.device("cpu")
CASE = Case(9, 5, 3, 4, 2, 16, dtype="float32")
# In 16 bits, as on a GPU.
HALF = replace(CASE, dtype="bfloat16")
OURS = next(p for p in PROVIDERS if p.name == "prefix_attn")
SDPA = next(p for p in PROVIDERS if p.name == "repeated SDPA")


def session(**more):
    return Session(CPU, dry=False, clock=Clock(CPU), **more)


def failing(name, error):
    """A baseline that says that it takes a case and then does not."""

    def prepare(problem):
        raise error

    return Provider(name, lambda *_: None, prepare, is_baseline=True)


def changed(provider, name, change):
    """The same provider with another output."""

    def prepare(problem):
        prepared = provider.prepare(problem)
        return replace(prepared, forward=lambda: change(prepared.forward()))

    return replace(provider, name=name, prepare=prepare)


def passed(run, name):
    """Lets a provider of this name time CASE unchecked."""
    run.passed[name, 4, 2, 16, "float32"] = measure.Gated(CASE, {})


def test_small_benchmark_times_what_is_right_and_names_what_is_not(tmp_path, monkeypatch, capsys):
    wrong = changed(OURS, "wrong", lambda out: out * 1.001)
    other = failing("other", RuntimeError("No available kernel"))
    monkeypatch.setattr(measure, "PROVIDERS", (SDPA, other, OURS, wrong))
    arguments = ["--case", "48,16,3,4,2,16", "--rounds", "3", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--out", str(tmp_path)])
    assert bench_main.main() == 1
    printed = capsys.readouterr()
    assert "WRONG, not timed: P48 S16 G3 4/2 D16: wrong against float64: out" in printed.err
    assert "other skipped: No available kernel" in printed.out
    ours, baseline = (
        next(row for row in csv.DictReader((tmp_path / "bench.csv").open()) if row["provider"] == x)
        for x in ("prefix_attn", "repeated SDPA")
    )
    assert (ours["compared"], baseline["compared"], ours["rounds"]) == ("True", "False", "3")
    assert float(baseline["total_speedup"]) == 1.0
    assert float(ours["total_speedup"]) == pytest.approx(
        float(baseline["total_ms"]) / float(ours["total_ms"]), rel=1e-4
    )
    assert all(0 < float(ours[f"error_{name}"]) < 1e-5 for name in ("out", "dq", "dk", "dv"))
    assert "wrong" not in (tmp_path / "bench.csv").read_text()


@pytest.mark.parametrize("mode", [MODES[0], *MODES[2:]], ids=lambda mode: mode.name)
def test_modes_are_held_against_float64(mode):
    mode = next(m for m in providers.modes(4) if m.name.split()[1] == mode.name.split()[1])
    (row,) = units.time_provider(session(), HALF, mode)
    assert set(row["errors"]) == {"out", "dq", "dk", "dv"}
    assert row["compared"] == row["same"] == (not mode.changes)
    assert row["gate_case"]["prefix"] == CASE.prefix
    wrong = changed(mode, f"{mode.name} wrong", lambda out: out * 1.1)
    with pytest.raises(WrongResultError, match="against float64: out"):
        units.time_provider(session(), HALF, wrong)


def test_mode_that_does_another_thing_than_it_says_is_wrong():
    window = next(m for m in providers.modes(4) if "window" in m.name)
    with pytest.raises(WrongResultError, match="against float64: out"):
        units.time_provider(session(), HALF, replace(window, prepare=OURS.prepare))


def test_gate_keeps_the_window_and_stays_small():
    for case in units.cases(dry=False):
        small = cases.narrow(case)
        assert small.tokens <= cases.GATE_TOKENS
        assert small.heads_q // small.heads_kv == case.heads_q // case.heads_kv
        small = cases.shrunk(case)
        assert small.prefix + small.suffix <= cases.GATE_SEQUENCE
        assert small.group <= cases.GATE_MEMBERS
    first = cases.narrow(units.cases(dry=False)[0])
    assert first.prefix + first.suffix > MODES[2].changes["window_size"]


def test_next_baseline_is_taken_where_the_first_does_not_run(monkeypatch):
    broken = failing("repeated SDPA cuDNN", RuntimeError("No available kernel"))
    monkeypatch.setattr(units, "PROVIDERS", [broken, SDPA, OURS])
    run = session()
    (row,) = units.time_provider(run, HALF, OURS)
    assert row["errors"]
    assert row["compared"]
    with pytest.raises(UnsupportedError, match="No available kernel"):
        units.time_provider(run, HALF, broken)
    monkeypatch.setattr(units, "PROVIDERS", [broken, OURS])
    (row,) = units.time_provider(session(), HALF, OURS)
    assert row["errors"]
    assert not row["compared"]


@pytest.mark.parametrize("line", ["raise ImportError('no libcudart')", "raise OSError('driver')"])
def test_flash_package_that_fails_to_import_is_unsupported(tmp_path, monkeypatch, line):
    """One that was built for another PyTorch: our own units go on without it as a baseline."""
    (tmp_path / "flash_of_another_torch.py").write_text(line)
    monkeypatch.syspath_prepend(str(tmp_path))
    available = partial(providers._has_module, module="flash_of_another_torch")
    broken = replace(failing("repeated other", RuntimeError()), available=available)
    monkeypatch.setattr(units, "PROVIDERS", [broken, OURS])
    run = session()
    with pytest.raises(UnsupportedError, match=r"flash_of_another_torch can't be imported \("):
        units.time_provider(run, HALF, broken)
    (row,) = units.time_provider(run, HALF, OURS)
    assert not row["compared"]


def test_baseline_is_computed_where_no_unit_left_it():
    run = session()
    (row,) = units.time_provider(run, CASE, OURS)
    assert row["compared"]
    wrong = changed(OURS, "other", lambda out: out * 1.01)
    passed(run, "other")
    with pytest.raises(WrongResultError, match="at full size: out differs"):
        units.time_provider(run, CASE, wrong)


def test_missing_baseline_is_recorded_and_nan_is_wrong():
    late = session(deadline=0.0)
    (row,) = units.time_provider(late, CASE, OURS)
    assert not row["compared"]
    (row,) = units.time_provider(late, CASE, SDPA)
    assert not row["compared"]
    (row,) = units.time_provider(late, CASE, OURS)
    assert row["compared"]
    late = session(deadline=0.0)
    passed(late, "nan")
    wrong = changed(OURS, "nan", lambda out: out * float("nan"))
    with pytest.raises(WrongResultError, match="out is not finite"):
        units.time_provider(late, CASE, wrong)


def test_gluon_checks_are_unsupported_where_it_says_why_not():
    every = [check for group in checks.checks() for check in group]
    assert len({check.label for check in every}) == len(every)
    gluon = [check for check in every if check.gluon]
    assert {(c.head_dim, c.layout) for c in gluon if c.dtype == "bfloat16"} >= {
        (d, layout) for d in (64, 128) for layout in ("groups", "tree", "split")
    }
    with pytest.raises(UnsupportedError, match=r"9\.0|Gluon"):
        checks.run(gluon[0], checks.TINY, CPU)


def test_core_and_the_modes_that_pay_come_within_the_time():
    planned = units.units(Session(torch.device("cuda"), dry=False, clock=None))
    keys = [unit.key for unit in planned]
    assert len(set(keys)) == len(keys)
    core = units.cases(dry=False)[:7]
    last = max(i for i, key in enumerate(keys) if key.startswith(f"time/{core[-1].label}/"))
    modes = [keys.index(f"time/{core[0].label}/{mode.name}") for mode in MODES]
    second = keys.index(f"time/{core[1].label}/{PROVIDERS[0].name}")
    assert max(modes[:2]) < second

    def minutes(end):
        compiled = set()
        total = 0.0
        for unit in planned[:end]:
            total += unit.expected(compiled)
            compiled.add(unit.kernels)
        return total / 60

    assert minutes(max(last, *modes) + 1) < gpu.parse([]).minutes
    assert minutes(len(keys)) > minutes(last + 1) > 1


def test_table_holds_what_a_run_that_goes_on_skips(tmp_path):
    Records(tmp_path, FACTS | {"python": "3.11"}, "one").append("ceiling/x", "done", rows=[])
    Records(tmp_path, FACTS | {"commit": "b"}, "one").append("ceiling/y", "done", rows=[])
    later = Records(tmp_path, FACTS | {"python": "3.12"}, "two")
    later.append("ceiling/z", "done", rows=[])
    assert later.finished() == set(report._latest(read(later.path)))
    assert later.finished() == {"ceiling/x", "ceiling/z"}


def test_commit_names_what_was_edited(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    for folder in facts.MEASURED:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("a\n")
    copy = facts._commit(tmp_path)
    assert copy.startswith("content-")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    clean = facts._commit(tmp_path)
    assert len(clean) == 12
    found = {copy, clean}
    for text in ("b\n", "c\n"):
        (tmp_path / "kernels" / "a.py").write_text(text)
        commit = facts._commit(tmp_path)
        assert commit.startswith(f"{clean}-dirty-")
        found.add(commit)
    assert len(found) == 4
    inner = tmp_path / "copy"
    inner.mkdir()
    assert facts._commit(inner).startswith("content-")
