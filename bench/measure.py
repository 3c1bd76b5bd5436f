"""Checks every provider against float64, then times them in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.cases import shrunk
from bench.providers import OURS, PROVIDERS, Prepared, Problem, Provider
from prefix_attn.cases import Case
from prefix_attn.testing import (
    Results,
    attention_results,
    compare_attention,
    repeated_attention,
)
from prefix_attn.timing import Clock, Quantiles, interleaved, rounds

INPUT_COPIES = 2
MIN_ROUNDS = 3
# A case stops after MIN_ROUNDS once it has run this long.
CASE_SECONDS = 40.0
# At the timed size, where float64 scores don't fit, a provider must agree with the baseline to
# this relative norm in units of the dtype's epsilon: it catches what only large shapes get wrong.
AGREEMENT_EPS = 32
# What somebody else's code raises where it can't do a case.
FOREIGN_ERRORS = (RuntimeError, AssertionError, TypeError)


class WrongResultError(Exception):
    """A provider computes something else than float64 or than the baseline."""


class UnsupportedError(Exception):
    """Somebody does not take a case; the reason is their own."""


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
        errors: of out, dq, dk, dv against float64 at `gate_case`: the largest absolute one in the
            rows that use most of their error budget.
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

    @classmethod
    def from_laps(
        cls,
        case: Case,
        provider: Provider,
        laps: list[list[float]],
        gated: Gated,
        **more: Any,
    ) -> Result:
        """A result of samples: seconds to the end of the forward pass, and of the backward pass."""
        both = [x for x in laps if len(x) == 2]
        quantiles = Quantiles.from_seconds
        return cls(
            case=case,
            provider=provider.name,
            is_baseline=provider.is_baseline,
            same=not provider.changes,
            pairs=provider.pairs(case),
            forward=quantiles([x[0] for x in laps]),
            backward=quantiles([total - forward for forward, total in both]) if both else None,
            total=quantiles([total for _, total in both]) if both else None,
            errors=gated.errors,
            gate_case=gated.case,
            rounds=len(laps),
            **more,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        """Inverse of `asdict`."""
        times = {n: values[n] and Quantiles(**values[n]) for n in ("forward", "backward", "total")}
        cases = {n: Case(**values[n]) for n in ("case", "gate_case")}
        return cls(**{**values, **times, **cases})


@dataclass
class Outcome:
    """What a case gave: results, notes on the check, what did not run, and what was wrong."""

    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def trying(self, case: Case, provider: Provider) -> Iterator[None]:
        """Notes that a provider is wrong or does not run."""
        try:
            with may_refuse(provider):
                yield
        except UnsupportedError as error:
            self.skipped.append(f"{provider.name} skipped: {error}")
        except WrongResultError as error:
            self.failures.append(f"{case.label}: {provider.name} {error}")


@contextmanager
def may_refuse(provider: Provider) -> Iterator[None]:
    """Turns an error of somebody else's code into an `UnsupportedError`; ours stay."""
    try:
        yield
    except FOREIGN_ERRORS as error:
        if provider.name.startswith(OURS):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UnsupportedError(reason) from error


@dataclass(frozen=True)
class Gated:
    """Errors of a provider that passed, by tensor, and the case where they were found."""

    case: Case
    errors: dict[str, float]


class Gate:
    """Holds providers against float64 at a case, with repeated SDPA's own error as the budget."""

    def __init__(
        self, case: Case, device: torch.device, changes: Mapping[str, Any] | None = None
    ) -> None:
        """Computes what is right at a case that is small enough.

        Args:
            case: its result and gradients in float64 are computed.
            device: where.
            changes: those of the providers.
        """
        self.changes = dict(changes or {})
        problem = Problem.random(case, device, seed=0)
        if not self.changes.pop("sinks", False):
            problem = replace(problem, inputs=replace(problem.inputs, sinks=None))
        self.problem = problem
        # The dense reference would not fit for all members: it serves what changes the rule.
        self.known: dict[str, Any] = {}
        if not changes:
            repeated = partial(repeated_attention, layout=problem.layout)
            rounded = partial(repeated, dtype=problem.inputs.q.dtype)
            wide = problem.inputs.map(Tensor.double)
            self.known["exact"] = attention_results(repeated, wide)
            self.known["pytorch"] = attention_results(rounded, wide)

    def __call__(self, provider: Provider) -> Gated:
        """Lets a provider pass.

        Raises:
            WrongResultError: if its errors are beyond the budget.
        """
        actual = provider.prepare(self.problem).results()
        layout, inputs = self.problem.layout, self.problem.inputs
        found = compare_attention(layout, inputs, actual, **self.known, **self.changes)
        if wrong := [str(comparison) for comparison in found if not comparison.ok]:
            raise WrongResultError(f"against float64: {'; '.join(wrong)}")
        errors = {name: x.largest for name, x in zip(actual, found, strict=True)}
        return Gated(self.problem.case, errors)


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


def run_case(
    case: Case, device: torch.device, most_rounds: int, tick: Callable[[str], None]
) -> Outcome:
    """Gates and times all providers on a case.

    Args:
        case: what to run.
        device: where.
        most_rounds: samples of each provider; slow cases stop at `MIN_ROUNDS`.
        tick: called with a word on what is done next.
    """
    outcome = Outcome()
    providers = []
    for provider in PROVIDERS:
        reason = provider.available(case, device)
        if reason is None:
            providers.append(provider)
            if reason := provider.forward_only(device):
                outcome.skipped.append(f"{provider.name} forward only: {reason}")
        elif not provider.is_baseline:
            outcome.skipped.append(f"{provider.name} skipped: {reason}")
    tick("float64 check")
    small = shrunk(case)
    gate, passed = Gate(small, device), dict[str, Gated]()
    for provider in providers:
        with outcome.trying(case, provider):
            passed[provider.name] = gate(provider)
    del gate  # what it holds is no part of the peaks
    at = f" at the shrunk P{small.prefix} S{small.suffix} G{small.group}"
    where = "" if small == case else at
    worst = [f"{name} {max(gated.errors.values()):.1e}" for name, gated in passed.items()]
    outcome.notes.append(
        f"float64 check{where} passed (largest error of out, dq, dk, dv) by: "
        + (", ".join(worst) or "nobody")
    )
    copies = [Problem.random(case, device, seed) for seed in range(INPUT_COPIES)]
    prepared: dict[str, list[Prepared]] = {}
    peaks: dict[str, int] = {}
    baseline: Results = {}
    compared = set()
    for provider in providers:
        if provider.name not in passed:
            continue
        tick(f"warm-up {provider.name}")
        with outcome.trying(case, provider):
            bound = [provider.prepare(problem) for problem in copies]
            peak, results = warm_up(bound[0], device)
            require_agreement(results, baseline, case)
            prepared[provider.name], peaks[provider.name] = bound, peak
            if baseline:
                compared.add(provider.name)
            elif provider.is_baseline:
                baseline = results
    providers = [p for p in providers if p.name in prepared]
    laps: dict[str, list[list[float]]] = {p.name: [] for p in providers}
    clock = Clock(device)
    counted = rounds(MIN_ROUNDS, most_rounds, CASE_SECONDS)
    for index, provider in interleaved(providers, counted):
        tick(f"round {index + 1}/{most_rounds} {provider.name}")
        passes = prepared[provider.name][index % INPUT_COPIES].passes
        laps[provider.name].append(clock.laps(*passes))
    for p in providers:
        more = {"peak_bytes": peaks[p.name], "compared": p.name in compared}
        outcome.results.append(Result.from_laps(case, p, laps[p.name], passed[p.name], **more))
    return outcome


def warm_up(prepared: Prepared, device: torch.device) -> tuple[int, Results]:
    """Runs once; returns the peak of memory, inputs included, and the packed results.

    On CUDA a first run outside the measurement absorbs compilation and workspaces.
    """
    kept: list[Tensor] = []

    def run() -> None:
        out = prepared.forward()
        kept.append(out)
        for step in prepared.passes[1:]:
            kept.extend(step(out))

    if device.type == "cuda":
        run()
        kept.clear()
    peak = prepared.input_bytes + peak_memory(run, device)
    return peak, prepared.packed(*kept)


def require_agreement(results: Results, baseline: Results, case: Case) -> None:
    """Compares results at full size with a baseline; without one, only that they are finite.

    Raises:
        WrongResultError: where they are not finite or differ by more than rounding.
    """
    limit = min(0.05, AGREEMENT_EPS * torch.finfo(case.torch_dtype).eps)
    wrong = []
    for name, x in results.items():
        if not torch.isfinite(x).all():
            wrong.append(f"{name} is not finite")
        elif name in baseline:
            expected = baseline[name].float()
            distance = ((x.float() - expected).norm() / expected.norm()).item()
            if not distance <= limit:
                wrong.append(f"{name} differs from the baseline by {distance:.1e} > {limit:.1e}")
    if wrong:
        raise WrongResultError(f"at full size: {', '.join(wrong)}")
