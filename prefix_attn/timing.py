"""Times calls on a device: a clock, quantiles of its samples, rounds in which all take turns."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# Larger than any L2 cache: written before every CUDA timing.
L2_FLUSH_BYTES = 256 * 2**20
# A machine is busy if other programs take so much of its cores, or p20 to p80 is so much of a
# median.
BUSY_LOAD, BUSY_SPREAD = 0.5, 0.25


@dataclass(frozen=True)
class Quantiles:
    """Median, 20th and 80th percentile of a time in milliseconds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def from_seconds(cls, samples: Sequence[float]) -> Quantiles:
        """Quantiles of at least one sample, interpolated.

        Example:
            >>> Quantiles.from_seconds([1e-3, 2e-3, 4e-3])
            Quantiles(median=2.0, p20=1.4, p80=3.2)
        """
        ms = torch.tensor(samples, dtype=torch.float64) * 1e3
        p20, p80 = torch.quantile(ms, torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
        return cls(statistics.median(ms.tolist()), p20, p80)


def load_average() -> float:
    """Threads that ran or waited in the last minute, 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def busy(load: float, times: Iterable[Quantiles]) -> str:
    """Says that a machine had other work, which costs many small calls more than few large ones.

    Args:
        load: `load_average()` before the first of the times.
        times: of whatever was measured.

    Returns:
        A sentence, empty if nothing points to other work.

    Example:
        >>> busy(0.0, [Quantiles(10.0, 9.0, 14.0)])
        'The machine was busy: p20 to p80 is up to 50 % of a median. Measure again when it is idle.'
    """
    cores = os.cpu_count() or 1
    spread = max(((x.p80 - x.p20) / x.median for x in times if x.median), default=0.0)
    signs = []
    if load > BUSY_LOAD * cores:
        signs.append(f"its load average was {load:.1f} on {cores} cores before")
    if spread > BUSY_SPREAD:
        signs.append(f"p20 to p80 is up to {spread:.0%} of a median".replace("%", " %"))
    if not signs:
        return ""
    return f"The machine was busy: {', '.join(signs)}. Measure again when it is idle."


def processor_seconds(run: Callable[[], object]) -> float:
    """Seconds that the processors spend on this process in one call: what else runs counts little.

    On a CPU alone, since a GPU works on after the call.
    """
    start = time.process_time()
    run()
    return time.process_time() - start


class Clock:
    """Measures seconds on a device: of the host on a CPU, between events on CUDA.

    Attributes:
        is_cuda: whether events are read.
        flush: on CUDA, the buffer that is written before every timing, so that L2 is cold.
    """

    def __init__(self, device: torch.device) -> None:
        """Allocates the buffer on CUDA."""
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of one call."""
        return self.laps(run)[0]

    def laps(self, first: Callable[[], Any], *others: Callable[[Any], Any]) -> list[float]:
        """Seconds from the start to the end of each step; they run one after the other.

        Args:
            first: for example a forward pass.
            others: for example its backward pass. Each gets what the step before returned.
        """
        return (self._cuda_laps if self.is_cuda else self._cpu_laps)(lambda _: first(), *others)

    @staticmethod
    def _cpu_laps(*steps: Callable[[Any], Any]) -> list[float]:
        value, laps = None, []
        start = time.perf_counter()
        for step in steps:
            value = step(value)
            laps.append(time.perf_counter() - start)
        return laps

    def _cuda_laps(self, *steps: Callable[[Any], Any]) -> list[float]:
        start, *ends = (torch.cuda.Event(enable_timing=True) for _ in range(1 + len(steps)))
        value = None
        self.flush.zero_()
        start.record()
        for step, end in zip(steps, ends, strict=True):
            value = step(value)
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for end in ends]


def rounds(least: int, most: int, seconds: float) -> Iterator[int]:
    """Counts rounds from 0, and stops before one that would end after so many seconds.

    What a round takes is the mean of those before it.

    Args:
        least: rounds that are run however long they take.
        most: rounds after which it stops.
        seconds: the time for all of them.

    Example:
        >>> list(rounds(3, 200, seconds=0.0))
        [0, 1, 2]
    """
    begin = time.perf_counter()
    for index in range(most):
        spent = time.perf_counter() - begin
        if index >= least and spent * (index + 1) / index > seconds:
            return
        yield index


def interleaved(items: Sequence[T], indices: Iterable[int]) -> Iterator[tuple[int, T]]:
    """Every item once a round, with the round's number; the first moves on from round to round.

    So a machine that slows down or speeds up does so for all of them, and none always follows the
    same one.

    Args:
        items: that take turns.
        indices: numbers of the rounds, such as `rounds(...)`.

    Example:
        >>> [item for _, item in interleaved("abc", range(3))]
        ['a', 'b', 'c', 'b', 'c', 'a', 'c', 'a', 'b']
    """
    for index in indices:
        shift = index % max(1, len(items))
        for place in range(len(items)):
            yield index, items[(place + shift) % len(items)]
