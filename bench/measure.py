"""Checks every provider against float64, then times them in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.cases import DTYPES, Case
from bench.providers import OURS, PROVIDERS, Inputs, Prepared, Provider

TENSORS = ("out", "dq", "dk", "dv")
INPUT_COPIES = 2
MIN_ROUNDS = 3
# A case stops after MIN_ROUNDS once it has run this long.
CASE_SECONDS = 40.0
# Larger than any L2 cache: written between CUDA timings.
L2_FLUSH_BYTES = 256 * 2**20
# At the timed size, where float64 scores don't fit, a provider must agree with the baseline to
# this relative norm in units of the dtype's epsilon: it catches what only large shapes get wrong.
AGREEMENT_EPS = 32


@dataclass(frozen=True)
class Quantiles:
    """Median, 20th and 80th percentile of a time in milliseconds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def from_seconds(cls, samples: list[float]) -> Quantiles:
        """Quantiles of at least one sample, interpolated."""
        ms = torch.tensor(samples, dtype=torch.float64) * 1e3
        p20, p80 = torch.quantile(ms, torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
        return cls(statistics.median(ms.tolist()), p20, p80)


def pass_times(forwards: list[float], totals: list[float]) -> dict[str, Any]:
    """`forward`, `backward` and `total` of a `Result`; `totals` is empty without a backward."""
    backwards = [total - forward for forward, total in zip(forwards, totals, strict=False)]
    return {
        "forward": Quantiles.from_seconds(forwards),
        "backward": Quantiles.from_seconds(backwards) if totals else None,
        "total": Quantiles.from_seconds(totals) if totals else None,
    }


@dataclass(frozen=True)
class Result:
    """One provider on one case.

    Attributes:
        case: what was timed.
        provider: the name of the provider.
        is_baseline: whether it repeats the prefix.
        same: whether it computes what repeating does, so that the two can be compared.
        pairs: allowed (query, key) pairs of what it computes.
        forward: time of the forward pass.
        backward: time of the backward pass, None where there is none.
        total: time of both.
        peak_bytes: inputs, gradient of the output, and the most that was allocated on top.
        errors: largest absolute error of out, dq, dk, dv against float64 at `gate_case`.
        gate_case: where the errors were measured.
        rounds: samples of each time.
        compared: whether it was held against a baseline at full size, too.
    """

    case: Case
    provider: str
    is_baseline: bool
    same: bool
    pairs: int
    forward: Quantiles
    backward: Quantiles | None
    total: Quantiles | None
    peak_bytes: int
    errors: dict[str, float]
    gate_case: Case
    rounds: int
    compared: bool


@dataclass
class Outcome:
    """What a case gave: results, notes on the check, what did not run, and what was wrong."""

    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def reference(inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients in float64, one whole sequence at a time, by explicit softmax.

    out = softmax(scale Q K^T + causal mask) V for each member; dout of a prefix row counts once,
    the gradients of shared rows add up over members.
    """
    case = inputs.case
    q, k, v = (x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    ratio = case.heads_q // case.heads_kv
    future = torch.ones(case.sequence, case.sequence, dtype=torch.bool, device=q.device).triu(1)
    out = torch.empty_like(inputs.q, dtype=torch.float64)
    for member in range(case.group):
        start = case.prefix + member * case.suffix
        rows = torch.cat([torch.arange(case.prefix), torch.arange(start, start + case.suffix)]).to(
            q.device
        )
        keys, values = (x[rows].repeat_interleave(ratio, 1) for x in (k, v))
        scores = torch.einsum("mhd,nhd->hmn", q[rows], keys) * case.head_dim**-0.5
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        whole = torch.einsum("hmn,nhd->mhd", weights, values)
        dout = inputs.dout[rows].double()
        if member:
            dout[: case.prefix] = 0
        whole.backward(dout)
        out[rows] = whole.detach()
    grads = {f"d{name}": x.grad for name, x in zip("qkv", (q, k, v), strict=True)}
    return {"out": out, **{name: grad for name, grad in grads.items() if grad is not None}}


def packed_tensors(
    prepared: Prepared, backward: bool, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Output and gradients of a provider on the packed axis."""
    out = prepared.forward()
    tensors = {"out": prepared.pack_out(out.detach())}
    if backward:
        grads = torch.autograd.grad(out, prepared.leaves, prepared.dout)
        tensors |= dict(zip(TENSORS[1:], map(prepared.pack_grad, grads), strict=True))
    return {name: x.to(dtype) for name, x in tensors.items()}


def check(
    case: Case, device: torch.device, providers: list[Provider], outcome: Outcome
) -> dict[str, dict[str, float]]:
    """Compares providers with float64 and returns the errors of those that pass.

    A provider passes when each of its errors is at most twice that of the baseline at the same
    dtype, plus one epsilon of the largest value.
    """
    inputs = Inputs.random(case, device, seed=0)
    expected = reference(inputs)
    errors: dict[str, dict[str, float]] = {}
    for provider in providers:
        backward = provider.forward_only(device) is None
        with _reporting(provider, outcome):
            actual = packed_tensors(provider.prepare(inputs), backward)
            errors[provider.name] = {
                name: (x - expected[name]).abs().max().item() for name, x in actual.items()
            }
    baselines = [errors[p.name] for p in providers if p.is_baseline and p.name in errors]
    if not baselines:
        outcome.failures.append(f"{case.label}: no repeated SDPA ran, there is no error budget")
        return {}
    eps = torch.finfo(DTYPES[case.dtype]).eps
    passed = {}
    for name, measured in errors.items():
        wrong = []
        for tensor, error in measured.items():
            band = eps * expected[tensor].abs().max().item()
            budget = 2 * min(b[tensor] for b in baselines) + band
            if not error <= budget:
                wrong.append(f"{tensor} error {error:.2e} > {budget:.2e}")
        if wrong:
            outcome.failures.append(f"{case.label}: {name}: {', '.join(wrong)}")
        else:
            passed[name] = measured
    return passed


@contextmanager
def _reporting(provider: Provider, outcome: Outcome) -> Iterator[None]:
    """Turns an error of somebody else's code into a note; ours is raised."""
    try:
        yield
    except (RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
        if provider.name.startswith(OURS):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        outcome.skipped.append(f"{provider.name} skipped: {reason}")


def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """The most bytes that `run` holds at once on top of what is there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class Clock:
    """Times one forward and backward pass on a device."""

    def __init__(self, device: torch.device) -> None:
        """Allocates the buffer that flushes L2 on CUDA."""
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, prepared: Prepared, backward: bool) -> tuple[float, float | None]:
        """Seconds of the forward pass, and of both passes where there is a backward."""
        return (self._cuda if self.is_cuda else self._cpu)(prepared, backward)

    def _cpu(self, prepared: Prepared, backward: bool) -> tuple[float, float | None]:
        start = time.perf_counter()
        out = prepared.forward()
        middle = time.perf_counter()
        if not backward:
            return middle - start, None
        torch.autograd.grad(out, prepared.leaves, prepared.dout)
        return middle - start, time.perf_counter() - start

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of anything."""
        if not self.is_cuda:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3

    def _cuda(self, prepared: Prepared, backward: bool) -> tuple[float, float | None]:
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        self.flush.zero_()
        start.record()
        out = prepared.forward()
        middle.record()
        if backward:
            torch.autograd.grad(out, prepared.leaves, prepared.dout)
        end.record()
        torch.cuda.synchronize()
        total = start.elapsed_time(end) * 1e-3 if backward else None
        return start.elapsed_time(middle) * 1e-3, total


def run_case(case: Case, device: torch.device, rounds: int, tick: Callable[[str], None]) -> Outcome:
    """Gates and times all providers on a case.

    Args:
        case: what to run.
        device: where.
        rounds: samples of each provider; slow cases stop at `MIN_ROUNDS`.
        tick: called with a word on what is done next.
    """
    outcome = Outcome()
    providers = []
    for provider in PROVIDERS:
        reason = provider.available(case, device)
        if reason is None:
            providers.append(provider)
        elif not provider.is_baseline:
            outcome.skipped.append(f"{provider.name} skipped: {reason}")
        reason = provider.forward_only(device)
        if provider in providers and reason:
            outcome.skipped.append(f"{provider.name} forward only: {reason}")
    gate = case.shrunk()
    tick("float64 check")
    errors = check(gate, device, providers, outcome)
    where = "" if gate == case else f" at the shrunk P{gate.prefix} S{gate.suffix}"
    worst = {name: max(e.values()) for name, e in errors.items()}
    passed = ", ".join(f"{name} {error:.1e}" for name, error in worst.items()) or "nobody"
    outcome.notes.append(
        f"float64 check{where} passed (largest error of out, dq, dk, dv) by: {passed}"
    )
    providers = [p for p in providers if p.name in errors]
    copies = [Inputs.random(case, device, seed) for seed in range(INPUT_COPIES)]
    prepared: dict[str, list[Prepared]] = {}
    peaks: dict[str, int] = {}
    agreed: dict[str, Tensor] = {}
    compared = set()
    for provider in providers:
        tick(f"warm-up {provider.name}")
        with _reporting(provider, outcome):
            bound = [provider.prepare(inputs) for inputs in copies]
            tensors: dict[str, Tensor] = {}
            peaks[provider.name] = bound[0].input_bytes + warm_up(
                bound[0], provider.forward_only(device) is None, device, tensors
            )
            wrong = disagreement(tensors, agreed, case)
            if wrong:
                outcome.failures.append(f"{case.label}: {provider.name} at full size: {wrong}")
            else:
                prepared[provider.name] = bound
                if agreed:
                    compared.add(provider.name)
                if provider.is_baseline:
                    agreed = agreed or tensors
    providers = [p for p in providers if p.name in prepared]
    times = _time_rounds(providers, prepared, device, rounds, tick)
    for provider in providers:
        forwards, totals = times[provider.name]
        outcome.results.append(
            Result(
                case=case,
                provider=provider.name,
                is_baseline=provider.is_baseline,
                same=not provider.changes,
                pairs=provider.pairs(case),
                **pass_times(forwards, totals),
                peak_bytes=peaks[provider.name],
                errors=errors[provider.name],
                gate_case=gate,
                rounds=len(forwards),
                compared=provider.name in compared,
            )
        )
    return outcome


def warm_up(
    prepared: Prepared, backward: bool, device: torch.device, tensors: dict[str, Tensor]
) -> int:
    """Runs once, keeps the packed tensors for comparison, and returns the peak on top of inputs.

    On CUDA a first run outside the measurement absorbs compilation and workspaces.
    """
    kept: list[Tensor] = []

    def run() -> None:
        out = prepared.forward()
        kept.append(out)
        if backward:
            kept.extend(torch.autograd.grad(out, prepared.leaves, prepared.dout))

    if device.type == "cuda":
        run()
        kept.clear()
    peak = peak_memory(run, device)
    tensors["out"] = prepared.pack_out(kept[0].detach())
    for name, grad in zip(TENSORS[1:], kept[1:], strict=False):
        tensors[name] = prepared.pack_grad(grad)
    return peak


def disagreement(tensors: dict[str, Tensor], agreed: dict[str, Tensor], case: Case) -> str:
    """Which tensors are not finite or differ from the baseline by more than rounding, or nothing.

    Without a baseline, the first is all that is seen.
    """
    limit = min(0.05, AGREEMENT_EPS * torch.finfo(DTYPES[case.dtype]).eps)
    wrong = []
    for name, x in tensors.items():
        if not torch.isfinite(x).all():
            wrong.append(f"{name} is not finite")
        elif name in agreed:
            expected = agreed[name].float()
            distance = ((x.float() - expected).norm() / expected.norm()).item()
            if not distance <= limit:
                wrong.append(f"{name} differs from the baseline by {distance:.1e} > {limit:.1e}")
    return ", ".join(wrong)


def _time_rounds(
    providers: list[Provider],
    prepared: dict[str, list[Prepared]],
    device: torch.device,
    rounds: int,
    tick: Callable[[str], None],
) -> dict[str, tuple[list[float], list[float]]]:
    """Interleaves providers, their order and inputs rotated from round to round."""
    times: dict[str, tuple[list[float], list[float]]] = {p.name: ([], []) for p in providers}
    clock = Clock(device)
    begin = time.perf_counter()
    for index in range(rounds):
        spent = time.perf_counter() - begin
        if index >= MIN_ROUNDS and spent * (index + 1) / index > CASE_SECONDS:
            break
        shift = index % max(1, len(providers))
        for provider in providers[shift:] + providers[:shift]:
            tick(f"round {index + 1}/{rounds} {provider.name}")
            forward, total = clock(
                prepared[provider.name][index % INPUT_COPIES],
                provider.forward_only(device) is None,
            )
            times[provider.name][0].append(forward)
            if total is not None:
                times[provider.name][1].append(total)
    return times
