"""The clock, its quantiles, and the rounds that benchmarks share."""

from __future__ import annotations

import time

import pytest
import torch

from prefix_attn import timing
from prefix_attn.timing import Clock, Quantiles, busy, interleaved, rounds


class Ticking:
    """A host clock that moves on by what is spent, and by nothing else."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def spend(self, seconds):
        self.now += seconds


class FakeEvent:
    """A CUDA event that ends 2 ms after the one recorded before it."""

    recorded = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.recorded += 1
        self.place = FakeEvent.recorded

    def elapsed_time(self, end):
        return 2.0 * (end.place - self.place)


def test_quantiles_are_in_milliseconds_and_interpolated():
    assert Quantiles.from_seconds([0.005]) == Quantiles(5.0, 5.0, 5.0)
    q = Quantiles.from_seconds([4e-3, 1e-3, 2e-3, 3e-3])
    assert (q.median, q.p20, q.p80) == pytest.approx((2.5, 1.6, 3.4))


def test_clock_counts_laps_from_the_start(monkeypatch):
    host = Ticking(monkeypatch)
    clock = Clock(torch.device("cpu"))

    def forward():
        host.spend(2.0)
        return "out"

    def backward(out):
        assert out == "out"
        host.spend(3.0)

    assert clock.laps(forward, backward) == [2.0, 5.0]
    assert clock.seconds(forward) == 2.0


def test_clock_reads_events_and_flushes_on_a_gpu(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    clock = Clock(torch.device("cpu"))
    clock.is_cuda, clock.flush = True, torch.ones(4)
    seen = []
    laps = clock.laps(lambda: bool(clock.flush.any()), seen.append)
    assert laps == pytest.approx([2e-3, 4e-3])
    assert seen == [False]  # L2 was flushed before the first step
    assert len(waits) == 1


def test_rounds_stop_before_one_that_would_end_too_late(monkeypatch):
    host = Ticking(monkeypatch)
    counted = []
    for index in rounds(2, 100, seconds=10.0):
        counted.append(index)
        host.spend(3.0)
    assert counted == [0, 1, 2]  # a fourth would end after 12 seconds
    assert list(rounds(2, 5, seconds=1e9)) == list(range(5))


def test_rounds_run_the_fewest_however_long_they_take(monkeypatch):
    host = Ticking(monkeypatch)
    counted = []
    for index in rounds(3, 9, seconds=0.0):
        counted.append(index)
        host.spend(1000.0)
    assert counted == [0, 1, 2]


def test_interleaved_gives_everyone_each_place_once():
    turns = list(interleaved("abcd", range(4)))
    for place in range(4):
        assert {turns[4 * index + place][1] for index in range(4)} == set("abcd")
    assert [index for index, _ in turns] == [i for i in range(4) for _ in range(4)]
    assert list(interleaved([], range(3))) == []


def test_clock_allocates_nothing_on_a_cpu():
    assert not hasattr(Clock(torch.device("cpu")), "flush")


def test_busy_names_load_and_spread(monkeypatch):
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 4)
    steady, spread = Quantiles(10.0, 9.0, 11.0), Quantiles(10.0, 8.0, 11.0)
    assert busy(2.0, [steady]) == busy(0.0, []) == ""
    assert busy(2.1, [steady]) == (
        "The machine was busy: its load average was 2.1 on 4 cores before. Measure again when it "
        "is idle."
    )
    assert "p20 to p80 is up to 30 % of a median" in busy(0.0, [steady, spread])
