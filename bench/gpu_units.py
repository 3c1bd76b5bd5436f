"""The work of `make gpu`, piece by piece: device ceilings, checks, times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from bench import gpu_checks, providers
from bench.cases import Case
from bench.measure import (
    Clock,
    Outcome,
    Quantiles,
    check,
    disagreement,
    pass_times,
    warm_up,
)
from bench.providers import MODES, OURS, PROVIDERS, Inputs, Prepared, Provider

# Samples of a provider are taken for so long, within these bounds.
SAMPLE_SECONDS = 0.4
SAMPLES = (5, 20)
DRY_SAMPLES = (1, 1)
# What a unit is expected to take: what an unmeasured device reaches, what compiling takes.
GUESSED_FLOPS = 2e14
COMPILE_SECONDS = {"FlexAttention": 30.0, OURS: 10.0}


class WrongResultError(Exception):
    """A provider computes something else than float64 or than the baseline."""


class UnsupportedError(Exception):
    """A provider does not take a case; the reason is its own."""


@dataclass(frozen=True)
class Unit:
    """A piece of work.

    Attributes:
        key: kind, then what tells it from others of that kind.
        seconds: what it is expected to take.
        run: returns rows.
    """

    key: str
    seconds: float
    run: Callable[[], list[dict[str, Any]]]


@dataclass(frozen=True)
class Gated:
    """Errors of a provider against float64, and the case where they were found."""

    case: Case
    errors: dict[str, float]


@dataclass
class Session:
    """What a worker keeps between units.

    Attributes:
        device: where it runs.
        dry: on a CPU, with shapes that only try the code.
        clock: times things on that device.
        baseline_case: the case that `baseline` is of.
        baseline: packed result of the first baseline.
        passed: what `gated` found, by provider, heads, head dimension and dtype.
    """

    device: torch.device
    dry: bool
    clock: Clock
    baseline_case: Case | None = None
    baseline: dict[str, torch.Tensor] = field(default_factory=dict)
    passed: dict[tuple[Any, ...], Gated] = field(default_factory=dict)

    def gated(self, case: Case, provider: Provider) -> Gated:
        """Compares a provider with float64, once per kind of case.

        Raises:
            WrongResultError: if its errors are beyond twice those of a baseline.
        """
        kind = (provider.name, case.heads_q, case.heads_kv, case.head_dim, case.dtype)
        if kind not in self.passed:
            outcome = Outcome()
            others = [p for p in providers_for(self) if p.is_baseline and p.name != provider.name]
            baseline = next((p for p in others if p.available(case, self.device) is None), None)
            both = [provider] if baseline is None else [baseline, provider]
            errors = check(case, self.device, both, outcome).get(provider.name)
            if errors is None:
                raise WrongResultError("; ".join(outcome.failures + outcome.skipped))
            self.passed[kind] = Gated(case, errors)
        return self.passed[kind]


def cases(dry: bool) -> list[Case]:
    """The shapes, the most telling first."""
    if dry:
        return [Case(6, 4, 2, 2, 1, 16, dtype="float32")]
    core = [
        (p, s, g, 32, 8, 128)
        for p, s, g in ((2048, 512, 16), (8192, 512, 16), (512, 512, 16), (32768, 512, 4))
    ]
    core += [(2048, 512, 16, 32, 8, 64), (2048, 512, 16, 32, 32, 128), (8192, 512, 16, 32, 8, 64)]
    others = [
        (p, s, g, 32, heads_kv, head_dim)
        for p in (512, 2048, 8192, 32768)
        for s in (128, 512, 2048)
        for g in (4, 16, 64)
        for head_dim in (128, 64)
        for heads_kv in (8, 32)
    ]
    # Near the middle of the table first, and D 128 with 8 KV heads; huge ones last.
    others.sort(
        key=lambda x: (
            x[0] * x[2] > 2**19,
            (x[4] != 8) + (x[5] != 128),
            abs(x[1] - 512) / 512 + abs(x[2] - 16) / 16,
            x[0],
        )
    )
    return [Case(*shape, dtype="bfloat16") for shape in dict.fromkeys((*core, *others))]


def providers_for(session: Session) -> list[Provider]:
    """Everything that is compared; a dry run tries what CUDA alone would have, too."""
    if not session.dry:
        return list(PROVIDERS)
    # SDPA's flash backend stands for the two that a CPU does not have.
    stand_in = providers.repeated_with(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    return [
        Provider(p.name, lambda *_: None, stand_in, is_baseline=True)
        if "SDPA" in p.name
        else Provider(p.name, lambda *_: None, p.prepare, is_baseline=True)
        if p.is_baseline
        else p
        for p in PROVIDERS
    ]


def bytes_needed(case: Case, provider: Provider) -> float:
    """Inputs, output and gradients, with the copies of a prefix."""
    rows = case.group * case.sequence if provider.is_baseline else case.tokens
    size = 4 if case.dtype == "float32" else 2
    return 3.0 * rows * (2 * case.heads_q + 2 * case.heads_kv) * case.head_dim * size


def expected_seconds(case: Case, provider: Provider, dry: bool) -> float:
    """Of a unit that times a provider: compiling, two warm runs, samples."""
    if dry:
        return 0.0
    useful = case.forward_flops + case.backward_flops
    ratio = case.layout(torch.device("cpu")).flop_ratio if provider.is_baseline else 1.0
    once = useful * ratio / GUESSED_FLOPS
    return (
        COMPILE_SECONDS.get(provider.name, 1.0)
        + once * 3
        + max(SAMPLES[0] * once, 2 * SAMPLE_SECONDS)
    )


def time_provider(
    session: Session, case: Case, provider: Provider, gate: bool
) -> list[dict[str, Any]]:
    """Times one provider on one case; one row that `bench.report` can read."""
    device = session.device
    reason = provider.available(case, device)
    if reason:
        raise UnsupportedError(reason)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if bytes_needed(case, provider) > 0.85 * total:
            needed = bytes_needed(case, provider) / 2**30
            raise UnsupportedError(f"would need {needed:.0f} GiB of {total / 2**30:.0f}")
    shrunk = case.shrunk()
    errors: dict[str, float] = {}
    if gate:
        gated = session.gated(shrunk, provider)
        errors, shrunk = gated.errors, gated.case
    prepared = provider.prepare(Inputs.random(case, device, seed=0))
    backward = provider.forward_only(device) is None
    tensors: dict[str, torch.Tensor] = {}
    peak = prepared.input_bytes + warm_up(prepared, backward, device, tensors)
    if gate:
        _compare_with_baseline(session, case, provider, tensors)
    forwards, totals = sample(session, prepared, backward)
    times = pass_times(forwards, totals)
    return [
        {
            "case": asdict(case),
            "provider": provider.name,
            "is_baseline": provider.is_baseline,
            "same": not provider.changes,
            "pairs": provider.pairs(case),
            **{name: times[name] and asdict(times[name]) for name in times},
            "peak_bytes": peak,
            "errors": errors,
            "gate_case": asdict(shrunk),
            "rounds": len(forwards),
        }
    ]


def _compare_with_baseline(
    session: Session, case: Case, provider: Provider, tensors: dict[str, torch.Tensor]
) -> None:
    """At full size, where float64 does not fit, providers must agree with the first baseline."""
    if session.baseline_case != case:
        session.baseline_case, session.baseline = case, {}
    if wrong := disagreement(tensors, session.baseline, case):
        raise WrongResultError(f"at full size: {wrong}")
    if provider.is_baseline and not session.baseline:
        session.baseline = tensors


def sample(session: Session, prepared: Prepared, backward: bool) -> tuple[list[float], list[float]]:
    """Seconds of forward, and of both passes, as often as `SAMPLE_SECONDS` allow."""
    least, most = DRY_SAMPLES if session.dry else SAMPLES
    forwards: list[float] = []
    totals: list[float] = []
    begin = time.perf_counter()
    while len(forwards) < most:
        if len(forwards) >= least and time.perf_counter() - begin > SAMPLE_SECONDS:
            break
        forward, total = session.clock(prepared, backward)
        forwards.append(forward)
        if total is not None:
            totals.append(total)
    return forwards, totals


def ceiling(session: Session, what: str) -> list[dict[str, Any]]:
    """What the device itself reaches: GB/s of a copy, TFLOP/s of a matrix product."""
    device, seconds = session.device, session.clock.seconds
    size = 64 if session.dry else 8192
    unit: str
    if what == "copy":
        x = torch.ones(size * size * 8, dtype=torch.int8, device=device)
        y = torch.empty_like(x)
        run: Callable[[], object] = partial(y.copy_, x)
        work, unit = 2.0 * x.numel() * 1e-9, "GB/s"
    else:
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[what.split()[0]]
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        run = partial(torch.mm, a, b)
        work, unit = 2.0 * size**3 * 1e-12, "TFLOP/s"
    run()
    times = Quantiles.from_seconds([seconds(run) for _ in range(10)])
    return [{"what": what, "unit": unit, "reached": work / times.median * 1e3, **asdict(times)}]


def units(session: Session) -> list[Unit]:
    """All work of `make gpu`, the most telling first."""
    shapes = gpu_checks.TINY if session.dry else gpu_checks.LARGE
    first, rest = gpu_checks.checks()
    if session.dry:
        first, rest = gpu_checks.tried()
    table = cases(session.dry)
    compared = providers_for(session)
    long = 0.0 if session.dry else 12.0

    def checking(group: list[gpu_checks.Check]) -> Iterator[Unit]:
        for one in group:
            run = partial(gpu_checks.run, one, shapes, session.device)
            yield Unit(f"check/{one.label}", long, run)

    def timing(group: list[Case], ways: list[Provider], gate: bool = True) -> Iterator[Unit]:
        for case in group:
            for way in ways:
                run = partial(time_provider, session, case, way, gate)
                seconds = expected_seconds(case, way, session.dry)
                yield Unit(f"time/{case.label}/{way.name}", seconds, run)

    def ceilings(suffix: str) -> Iterator[Unit]:
        for what in ("copy", "bfloat16 matrix product"):
            yield Unit(f"ceiling/{what}{suffix}", 0.0, partial(ceiling, session, what))

    refused = partial(gpu_checks.refuses_float64, session.device)
    return [
        *ceilings(""),
        *checking(first),
        *timing(table[:4], compared),
        *checking(rest[:4]),
        *timing(table[4:7], compared),
        *checking(rest[4:]),
        Unit("check/float64", 0.0, refused),
        *timing(table[:1], list(MODES[:1] if session.dry else MODES), gate=False),
        *timing(table[7:], compared),
        *ceilings(", at the end"),
    ]
