"""Times candidate configurations of one kernel: `make gpu-tune KERNEL=forward`."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from dataclasses import asdict, astuple, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.cases import TIMED_DTYPES, case_from_text
from bench.gpu.units import Session, Unit, sample
from bench.measure import require_agreement, warm_up
from bench.providers import MODES, OURS, PROVIDERS, Problem, Provider
from prefix_attn.backends import triton as triton_backend
from prefix_attn.backends import tuning
from prefix_attn.cases import Case
from prefix_attn.kernels.config import Config, Tile, select_config, suits_tma
from prefix_attn.timing import Quantiles

TWO_BLOCKS = 128  # registers of a thread with which two blocks of eight warps fit
FUSED = "fused backward"  # what a backward sweep tunes where the order of sums is free
CASE = "8192,512,16,32,8,128"
DRY_CASE = "6,4,2,2,1,16"
# Expected seconds to compile and time one candidate.
CANDIDATE_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a sweep is told on the command line."""
    parser.add_argument("--kernel", choices=("forward", "backward"), help="sweep its tiles instead")
    parser.add_argument("--case", metavar="P,S,G,Hq,Hkv,D", help=f"of the sweep ({CASE})")
    parser.add_argument("--dtype", choices=TIMED_DTYPES, help="of the sweep (bfloat16)")
    parser.add_argument("--mode", choices=list(_modes()), help="of the sweep (none)")


def _modes() -> dict[str, Provider]:
    """The modes that a sweep can time: Gluon's forward has one tile."""
    names = ((mode.name.removeprefix(f"{OURS} "), mode) for mode in MODES)
    return {name: mode for name, mode in names if name != "gluon"}


def check_arguments(args: argparse.Namespace) -> None:
    """Fills in the case.

    Raises:
        ValueError: if an argument is wrong, or has no meaning without --kernel.
    """
    if not args.kernel and (args.case or args.dtype or args.mode):
        raise ValueError("--case, --dtype and --mode are for a sweep: give --kernel")
    text = args.case or (DRY_CASE if args.dry_run else CASE)
    dtype = args.dtype or ("float32" if args.dry_run else "bfloat16")
    args.tuned_case = case_from_text(text, dtype)
    fused = args.kernel == "backward" and args.mode == "deterministic=False"
    args.tuned = FUSED if fused else args.kernel


def candidates(
    tuned: str, present: Config, *, dry: bool = False, descriptors: bool = False
) -> list[Config]:
    """The present configuration, then others, nearest first.

    Args:
        tuned: a key of `tuning.TUNED`.
        present: what the package launches.
        dry: one other is enough.
        descriptors: whether the kernels may load by TMA.
    """
    found = []
    if dry:
        small = Tile(16, 16)
        found = [replace(present, forward=small, keys=small, queries=small)]
        if present.fused is not None:
            found = [replace(x, fused=small) for x in found]
    elif tuned == "forward":
        loads = (False, True) if descriptors else (False,)
        sizes = product((64, 128), (32, 64, 128), (2, 3, 4, 5), (4, 8), loads)
        for m, n, stages, warps, by_descriptor in sizes:
            config = replace(present, forward=Tile(m, n, stages), forward_warps=warps)
            found.append(replace(config, forward_descriptors=by_descriptor))
        # Two blocks fit, and nothing spills.
        found += [
            replace(x, forward_registers=TWO_BLOCKS)
            for x in found
            if (x.forward.block_m, x.forward.block_n, x.forward_warps) == (128, 32, 8)
        ]
    elif tuned == FUSED:
        # The warps are those of the other backward, whose sweep decides about them.
        for m, n, stages in product((32, 64), (64, 128), (2, 3)):
            found.append(replace(present, fused=Tile(m, n, stages)))
    else:
        keys = [Tile(m, n, s) for m, n in ((32, 128), (64, 64), (64, 128)) for s in (2, 3)]
        shapes = ((64, 32), (64, 64), (128, 32), (128, 64))
        queries = [Tile(m, n, s) for m, n in shapes for s in (2, 3, 5)]
        loads = (False, True) if descriptors else (False,)
        # dK and dV together or, where they are apart now, apart.
        values = dict.fromkeys((None, present.values))
        for key, value, query, warps, by_descriptor in product(
            keys, values, queries, (4, 8), loads
        ):
            config = replace(present, keys=key, values=value, queries=query, backward_warps=warps)
            found.append(replace(config, backward_descriptors=by_descriptor))

    def changes(config: Config) -> int:
        return sum(
            _differences(getattr(config, name), getattr(present, name))
            for name in tuning.TUNED[tuned]
        )

    others = sorted((x for x in found if x != present), key=changes)
    return [present, *others]


def _differences(a: object, b: object) -> int:
    """Numbers in which two values of a configuration differ."""
    if isinstance(a, Tile) and isinstance(b, Tile):
        return sum(x != y for x, y in zip(astuple(a), astuple(b), strict=True))
    return int(a != b)


def label(tuned: str, config: Config) -> str:
    """Tiles, stages and warps."""
    values = [getattr(config, name) for name in tuning.TUNED[tuned]]
    tiles = [x for x in values if isinstance(x, Tile)]
    warps = config.forward_warps if tuned == "forward" else config.backward_warps
    descriptors = {"forward": config.forward_descriptors, "backward": config.backward_descriptors}
    tma = " TMA" if descriptors.get(tuned) else ""
    limited = tuned == "forward" and config.forward_registers is not None
    registers = f" r{config.forward_registers}" if limited else ""
    return f"{' + '.join(map(str, tiles))} w{warps}{registers}{tma}"


def units(session: Session, args: argparse.Namespace) -> list[Unit]:
    """One unit per candidate."""
    case: Case = args.tuned_case
    arch, processors = _arch(session.device), 132
    if session.device.type == "cuda":
        processors = torch.cuda.get_device_properties(session.device).multi_processor_count
    present = select_config(arch or 90, case.head_dim, case.torch_dtype, processors)
    ours = next(p for p in PROVIDERS if p.name == OURS)
    provider = _modes()[args.mode] if args.mode else ours
    tuned: str = args.tuned
    if tuned == FUSED and present.fused is None:
        raise SystemExit(f"{case.label}: deterministic=False has no tile of its own to sweep here")
    # Consumer Blackwell has TMA, but not the shared memory for these tiles.
    has_tma = isinstance(arch, int) and 90 <= arch < 120
    descriptors = has_tma and suits_tma(case.head_dim, case.head_dim, case.torch_dtype.itemsize)
    seconds = 0.0 if session.dry else CANDIDATE_SECONDS
    prefix = f"tune/{args.kernel}/{case.label} {case.dtype} {args.mode or 'plain'}"
    found = []
    for config in candidates(tuned, present, dry=session.dry, descriptors=descriptors):
        run = partial(time_candidate, session, tuned, case, provider, config, present)
        found.append(Unit(f"{prefix}/{label(tuned, config)}", seconds, run))
    return found


def _arch(device: torch.device) -> int | str:
    """As `select_config` takes it, 0 in a dry run."""
    return triton_backend.arch_of(device) if device.type == "cuda" else 0


def keep_best(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the fastest candidate of a sweep where PREFIX_ATTN_TILES can name it.

    Args:
        path: the file; what it holds for other shapes stays.
        rows: those of `time_candidate`, of one kernel and one case.
    """
    best = min(rows, key=lambda row: row["ms"])
    values = {
        name: Tile(**value) if isinstance(value, dict) else value
        for name, value in best["tiles"].items()
    }
    case = best["case"]
    key = tuning.key_of(best["arch"], case["dtype"], case["head_dim"], case["head_dim"])
    tuning.store(path, key, best["kernel"], Config(**values))


def is_kept(row: dict[str, Any]) -> bool:
    """Whether a row says which tile is best: a mode that computes less is faster with any."""
    return row["mode"] == OURS or row["kernel"] == FUSED


def using(config: Config) -> AbstractContextManager[Any]:
    """Launches with a configuration, whatever the device is."""

    def config_for(q: Tensor, v: Tensor) -> Config:
        return config

    return mock.patch.object(triton_backend, "config_for", config_for)


def time_candidate(
    session: Session,
    tuned: str,
    case: Case,
    provider: Provider,
    config: Config,
    present: Config,
) -> list[dict[str, Any]]:
    """Times a configuration whose result agrees with that of the present one.

    Raises:
        WrongResultError: if it does not.
    """
    prepared = provider.prepare(Problem.random(case, session.device, seed=0))
    if session.baseline_case != case:
        with using(present):
            _, session.baseline = warm_up(prepared, session.device)
        session.baseline_case = case
    with using(config):
        _, results = warm_up(prepared, session.device)
        require_agreement(results, session.baseline, case)
        laps = sample(session, prepared)
    kernel = "forward" if tuned == "forward" else "backward"
    seconds = [x[0] if kernel == "forward" else x[1] - x[0] for x in laps]
    own = Quantiles.from_seconds(seconds)
    flops = case.flops(provider.pairs(case)) * (1.0 if kernel == "forward" else 2.5)
    return [
        {
            "case": asdict(case),
            "kernel": tuned,
            "mode": provider.name,
            "config": label(tuned, config),
            "is_present": config == present,
            "tiles": asdict(config),
            "arch": _arch(session.device),
            "ms": own.median,
            "p20_ms": own.p20,
            "p80_ms": own.p80,
            "tflops": flops / own.median * 1e-9,
        }
    ]
