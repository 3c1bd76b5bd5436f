"""The work of `make gpu`, piece by piece: device ceilings, checks, times."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from bench import providers
from bench.cases import DTYPES, case_from_text, cases_of_run, narrow, shrunk
from bench.gpu import checks
from bench.measure import (
    FOREIGN_ERRORS,
    Gate,
    Gated,
    Result,
    UnsupportedError,
    WrongResultError,
    may_refuse,
    require_agreement,
    warm_up,
)
from bench.providers import MODES, OURS, PROVIDERS, Prepared, Problem, Provider
from prefix_attn.cases import Case
from prefix_attn.testing import Results
from prefix_attn.timing import Clock, Quantiles, rounds

# Samples of a provider are taken for so long, within these bounds.
SAMPLE_SECONDS = 0.4
SAMPLES = (5, 20)
DRY_SAMPLES = (1, 1)
# What a unit is expected to take: what an unmeasured device reaches, what compiling takes.
GUESSED_FLOPS = 2e14
COMPILE_SECONDS = {"FlexAttention": 30.0, "repeated FlashAttention-4": 20.0, OURS: 10.0}
CHECK_SECONDS, CHECK_COMPILE_SECONDS = 2.0, 10.0
# The most telling cases.
CORE = (
    "2048,512,16,32,8,128", "8192,512,16,32,8,128", "512,512,16,32,8,128", "32768,512,4,32,8,128",
    "2048,512,16,32,8,64", "2048,512,16,32,32,128", "8192,512,16,32,8,64",
)  # fmt: skip


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
    baseline: Results = field(default_factory=dict)
    passed: dict[tuple[Any, ...], Gated] = field(default_factory=dict)
    deadline: float = float("inf")

    def gated(self, case: Case, provider: Provider) -> Gated:
        """Compares a provider with float64, once per kind of case.

        At the size of `shrunk(case)`; what computes another function at few members and heads.

        Raises:
            WrongResultError: if its errors are beyond the budget.
            UnsupportedError: if somebody else's code fails.
        """
        kind = (provider.name, case.heads_q, case.heads_kv, case.head_dim, case.dtype)
        if kind not in self.passed:
            small = narrow(case) if provider.changes else shrunk(case)
            gate = Gate(small, self.device, provider.changes)
            with may_refuse(provider):
                self.passed[kind] = gate(provider)
        return self.passed[kind]

    def baseline_of(self, case: Case, provider: Provider) -> Results:
        """What a baseline other than the provider gives, computed where no unit has left it.

        Nothing for the first baseline, for what computes another function, and where no baseline
        fits into memory and into the time that is left.
        """
        if provider.changes:
            return {}
        if self.baseline_case != case:
            self.baseline_case, self.baseline = case, {}
        if not self.baseline and not provider.is_baseline:
            for other in providers_for(self):
                late = time.time() + 3 * once_seconds(case, other) > self.deadline
                if not other.is_baseline or late or why_not(case, other, self.device):
                    continue
                try:
                    found = other.prepare(Problem.random(case, self.device, seed=0)).results()
                    require_agreement(found, {}, case)
                except (*FOREIGN_ERRORS, WrongResultError):
                    continue
                self.baseline = found
                break
        return self.baseline


def why_not(case: Case, provider: Provider, device: torch.device) -> str | None:
    """Why a provider does not take a case, by its own word or for lack of memory, or None."""
    return provider.available(case, device) or too_large(case, provider, device)


def too_large(case: Case, provider: Provider, device: torch.device) -> str | None:
    """Why a case does not fit on a device, or None."""
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    needed = bytes_needed(case, provider)
    too_many = f"would need {needed / 2**30:.0f} GiB of {total / 2**30:.0f}"
    return too_many if needed > 0.85 * total else None


def cases(dry: bool) -> list[Case]:
    """The shapes, the most telling first."""
    if dry:
        return [Case(6, 4, 2, 2, 1, 16, dtype="float32")]

    def remoteness(case: Case) -> tuple[float, ...]:
        """Near the middle of the table first, and D 128 with 8 KV heads; huge ones last."""
        return (
            case.prefix * case.group > 2**19,
            (case.heads_kv != 8) + (case.head_dim != 128),
            abs(case.suffix - 512) / 512 + abs(case.group - 16) / 16,
            case.prefix,
            case.head_dim != 128,
            case.heads_kv != 8,
        )

    others = sorted(cases_of_run(torch.device("cuda"), True, None), key=remoteness)
    core = [case_from_text(text, "bfloat16") for text in CORE]
    return list(dict.fromkeys([*core, *others]))


def providers_for(session: Session) -> list[Provider]:
    """Everything that is compared; a dry run tries what CUDA alone would have, too."""
    if not session.dry:
        return list(PROVIDERS)
    # SDPA's flash backend stands for the two that a CPU does not have.
    flash = providers.repeated_with(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    baselines = [
        replace(p, available=lambda *_: None, prepare=flash if "SDPA" in p.name else p.prepare)
        for p in PROVIDERS
        if p.is_baseline
    ]
    return [*baselines, *(p for p in PROVIDERS if not p.is_baseline)]


def bytes_needed(case: Case, provider: Provider) -> float:
    """Inputs, output and gradients, with the copies of a prefix."""
    rows = case.repeated_tokens if provider.is_baseline else case.tokens
    return 3.0 * rows * case.qkvo_bytes


def expected_seconds(case: Case, provider: Provider) -> float:
    """Of a unit that times a provider: its check, two warm runs, samples."""
    once = once_seconds(case, provider)
    return 1.0 + once * 3 + max(SAMPLES[0] * once, 2 * SAMPLE_SECONDS)


def once_seconds(case: Case, provider: Provider) -> float:
    """Of a forward and a backward pass."""
    flops = 3.5 * case.flops(provider.pairs(case))
    ratio = case.attention_ratio if provider.is_baseline else 1.0
    return flops * ratio / GUESSED_FLOPS


def time_provider(session: Session, case: Case, provider: Provider) -> list[dict[str, Any]]:
    """Checks and times one provider on one case; one row, a `Result`."""
    device = session.device
    if reason := why_not(case, provider, device):
        raise UnsupportedError(reason)
    gated = session.gated(case, provider)
    baseline = session.baseline_of(case, provider)
    prepared = provider.prepare(Problem.random(case, device, seed=0))
    peak, results = warm_up(prepared, device)
    require_agreement(results, baseline, case)
    if provider.is_baseline and not baseline:
        session.baseline_case, session.baseline = case, results
    del results
    laps = sample(session, prepared)
    more = {"peak_bytes": peak, "compared": bool(baseline)}
    return [asdict(Result.from_laps(case, provider, laps, gated, **more))]


def sample(session: Session, prepared: Prepared) -> list[list[float]]:
    """Seconds to the end of each pass, as often as `SAMPLE_SECONDS` allow."""
    bounds = DRY_SAMPLES if session.dry else SAMPLES
    return [session.clock.laps(*prepared.passes) for _ in rounds(*bounds, SAMPLE_SECONDS)]


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
        dtype = DTYPES[what.split()[0]]
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        run = partial(torch.mm, a, b)
        work, unit = 2.0 * size**3 * 1e-12, "TFLOP/s"
    run()
    times = Quantiles.from_seconds([seconds(run) for _ in range(10)])
    return [{"what": what, "unit": unit, "reached": work / times.median * 1e3, **asdict(times)}]


def units(session: Session) -> list[Unit]:
    """All work of `make gpu`, the most telling first."""
    shapes = checks.TINY if session.dry else checks.LARGE
    first, rest = checks.checks()
    if session.dry:
        first, rest = checks.tried()
    table = cases(session.dry)
    compared = providers_for(session)
    modes = list(providers.modes(4) if session.dry else MODES)

    def checking(group: list[checks.Check]) -> Iterator[Unit]:
        for one in group:
            run = partial(checks.run, one, shapes, session.device)
            yield Unit(f"check/{one.label}", CHECK_SECONDS, run, one.kind, CHECK_COMPILE_SECONDS)

    def timing(group: list[Case], ways: list[Provider]) -> Iterator[Unit]:
        for case, way in product(group, ways):
            run = partial(time_provider, session, case, way)
            kernels = (way.name, case.heads_q // case.heads_kv, case.head_dim, case.dtype)
            longer = next((x for n, x in COMPILE_SECONDS.items() if way.name.startswith(n)), 0.0)
            seconds = expected_seconds(case, way)
            yield Unit(f"time/{case.label}/{way.name}", seconds, run, kernels, longer)

    def ceilings(suffix: str) -> Iterator[Unit]:
        for what in ("copy", "bfloat16 matrix product"):
            yield Unit(f"ceiling/{what}{suffix}", 0.0, partial(ceiling, session, what))

    refused = partial(checks.refuses_float64, session.device)
    waiting = partial(checks.waits_for_nothing, first[0], shapes, session.device)
    return [
        *ceilings(""),
        *checking(first),
        *timing(table[:1], [*compared, *modes[:2]]),
        *timing(table[1 : len(CORE)], compared),
        Unit("check/float64", 0.0, refused),
        Unit("check/waiting", CHECK_SECONDS, waiting, first[0].kind, CHECK_COMPILE_SECONDS),
        *timing(table[:1], modes[2:]),
        *checking(rest),
        *timing(table[len(CORE) :], compared),
        *ceilings(", at the end"),
    ]
