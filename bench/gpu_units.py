"""The work of `make gpu`, piece by piece: device ceilings, checks, times."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from bench import gpu_checks, providers
from bench.cases import DTYPES, Case
from bench.gpu_checks import UnsupportedError
from bench.measure import (
    Clock,
    Outcome,
    Quantiles,
    check,
    disagreement,
    packed_tensors,
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
CHECK_SECONDS, CHECK_COMPILE_SECONDS = 2.0, 10.0


class WrongResultError(Exception):
    """A provider computes something else than float64 or than the baseline."""


@dataclass(frozen=True)
class Unit:
    """A piece of work.

    Attributes:
        key: kind, then what tells it from others of that kind.
        seconds: what it is expected to take.
        run: returns rows.
        kernels: what it launches; units with the same share what they compile.
        compile_seconds: what the first of them is expected to take on top.
    """

    key: str
    seconds: float
    run: Callable[[], list[dict[str, Any]]]
    kernels: Hashable = None
    compile_seconds: float = 0.0

    def expected(self, compiled: Collection[Hashable]) -> float:
        """Seconds after units with these kernels."""
        return self.seconds + (0.0 if self.kernels in compiled else self.compile_seconds)


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
        deadline: when the run ends, as `time.time` counts.
    """

    device: torch.device
    dry: bool
    clock: Clock
    baseline_case: Case | None = None
    baseline: dict[str, torch.Tensor] = field(default_factory=dict)
    passed: dict[tuple[Any, ...], Gated] = field(default_factory=dict)
    deadline: float = float("inf")

    def gated(self, case: Case, provider: Provider) -> Gated:
        """Compares a provider with float64, once per kind of case.

        At the size of `case.shrunk()` against repeating, with the first baseline that runs as the
        budget. What computes another function, or has no baseline, is compared with dense PyTorch,
        at fewer members and heads.

        Raises:
            WrongResultError: if its errors are beyond twice those of the budget.
            UnsupportedError: if somebody else's code fails.
        """
        kind = (provider.name, case.heads_q, case.heads_kv, case.head_dim, case.dtype)
        if kind not in self.passed:
            self.passed[kind] = self._gated(case, provider)
        return self.passed[kind]

    def _gated(self, case: Case, provider: Provider) -> Gated:
        small = case.shrunk()
        for baseline in [] if provider.changes else baselines(self, case, provider):
            outcome = Outcome()
            errors = check(small, self.device, [baseline, provider], outcome)
            if provider.name in errors:
                return Gated(small, errors[provider.name])
            if any(reason.startswith(f"{provider.name} skipped") for reason in outcome.skipped):
                raise UnsupportedError("; ".join(outcome.skipped))
            if baseline.name in errors:
                raise WrongResultError("; ".join(outcome.failures))
        small = gpu_checks.narrow(case)
        return Gated(small, gpu_checks.gate(small, provider, self.device))

    def full_size(self, case: Case, provider: Provider) -> dict[str, torch.Tensor]:
        """What a baseline other than the provider gives, computed where no unit has left it.

        Nothing for the first baseline, for what computes another function, and where no baseline
        fits into memory and into the time that is left.
        """
        if provider.changes:
            return {}
        if self.baseline_case != case:
            self.baseline_case, self.baseline = case, {}
        if not self.baseline and not provider.is_baseline:
            for other in baselines(self, case, provider):
                seconds = 3 * once_seconds(case, other)
                if too_large(case, other, self.device) or time.time() + seconds > self.deadline:
                    continue
                try:
                    found = run_baseline(case, other, self.device)
                except (RuntimeError, NotImplementedError, AssertionError, TypeError):
                    continue
                if not disagreement(found, {}, case):
                    self.baseline = found
                    break
        return self.baseline


def baselines(session: Session, case: Case, provider: Provider) -> list[Provider]:
    """Those that say that they take a case, but for the provider itself."""
    return [
        other
        for other in providers_for(session)
        if other.is_baseline
        and other.name != provider.name
        and other.available(case, session.device) is None
    ]


def run_baseline(case: Case, provider: Provider, device: torch.device) -> dict[str, torch.Tensor]:
    """Packed output and gradients of a provider, in the dtype of the case."""
    prepared = provider.prepare(Inputs.random(case, device, seed=0))
    return packed_tensors(prepared, provider.forward_only(device) is None, DTYPES[case.dtype])


def too_large(case: Case, provider: Provider, device: torch.device) -> str | None:
    """Why a case does not fit on a device, or None."""
    if device.type != "cuda":
        return None
    total, needed = torch.cuda.get_device_properties(device).total_memory, bytes_needed
    if needed(case, provider) <= 0.85 * total:
        return None
    return f"would need {needed(case, provider) / 2**30:.0f} GiB of {total / 2**30:.0f}"


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


def expected_seconds(case: Case, provider: Provider) -> float:
    """Of a unit that times a provider: its check, two warm runs, samples."""
    once = once_seconds(case, provider)
    return 1.0 + once * 3 + max(SAMPLES[0] * once, 2 * SAMPLE_SECONDS)


def once_seconds(case: Case, provider: Provider) -> float:
    """Of a forward and a backward pass."""
    flops = 3.5 * case.flops(provider.pairs(case))
    ratio = case.layout(torch.device("cpu")).flop_ratio if provider.is_baseline else 1.0
    return flops * ratio / GUESSED_FLOPS


def compile_seconds(provider: Provider) -> float:
    """Of the first unit with a provider's kernels."""
    return COMPILE_SECONDS.get(provider.name.partition(" ")[0], 0.0)


def time_provider(session: Session, case: Case, provider: Provider) -> list[dict[str, Any]]:
    """Checks and times one provider on one case; one row that `bench.report` can read."""
    device = session.device
    reason = provider.available(case, device) or too_large(case, provider, device)
    if reason:
        raise UnsupportedError(reason)
    gated = session.gated(case, provider)
    baseline = session.full_size(case, provider)
    prepared = provider.prepare(Inputs.random(case, device, seed=0))
    backward = provider.forward_only(device) is None
    tensors: dict[str, torch.Tensor] = {}
    peak = prepared.input_bytes + warm_up(prepared, backward, device, tensors)
    # At full size, where float64 does not fit.
    if wrong := disagreement(tensors, baseline, case):
        raise WrongResultError(f"at full size: {wrong}")
    if provider.is_baseline and not baseline:
        dtype = DTYPES[case.dtype]
        session.baseline_case = case
        session.baseline = {name: x.to(dtype) for name, x in tensors.items()}
    del tensors
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
            "errors": gated.errors,
            "gate_case": asdict(gated.case),
            "rounds": len(forwards),
            "compared": bool(baseline),
        }
    ]


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
    modes = list(providers.modes(4) if session.dry else MODES)
    usual, longer = (0.0, 0.0) if session.dry else (CHECK_SECONDS, CHECK_COMPILE_SECONDS)

    def checking(group: list[gpu_checks.Check]) -> Iterator[Unit]:
        for one in group:
            run = partial(gpu_checks.run, one, shapes, session.device)
            yield Unit(f"check/{one.label}", usual, run, ("check", *one.kind), longer)

    def timing(group: list[Case], ways: list[Provider]) -> Iterator[Unit]:
        for case in group:
            for way in ways:
                run = partial(time_provider, session, case, way)
                kernels = (way.name, case.heads_q // case.heads_kv, case.head_dim, case.dtype)
                key, seconds = f"time/{case.label}/{way.name}", 0.0
                if not session.dry:
                    seconds = expected_seconds(case, way)
                yield Unit(key, seconds, run, kernels, 0.0 if session.dry else compile_seconds(way))

    def ceilings(suffix: str) -> Iterator[Unit]:
        for what in ("copy", "bfloat16 matrix product"):
            yield Unit(f"ceiling/{what}{suffix}", 0.0, partial(ceiling, session, what))

    refused = partial(gpu_checks.refuses_float64, session.device)
    return [
        *ceilings(""),
        *checking(first),
        *timing(table[:1], [*compared, *modes[:2]]),
        *timing(table[1:7], compared),
        Unit("check/float64", 0.0, refused),
        *timing(table[:1], modes[2:]),
        *checking(rest),
        *timing(table[7:], compared),
        *ceilings(", at the end"),
    ]
