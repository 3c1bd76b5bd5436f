"""Tiles from a sweep: kept in a file, taken only where a variable names it."""

from __future__ import annotations

import json

import pytest
import torch

from bench.gpu import tune
from prefix_attn.backends import tuning
from prefix_attn.kernels.config import INTERPRETER, Config, Tile, select_config

KEY = "sm_90 bfloat16 128 128"


def _row(ms: float, config: Config) -> dict:
    case = {"dtype": "bfloat16", "head_dim": 128}
    return {
        "ms": ms, "kernel": "backward", "case": case, "arch": 90,
        "tiles": tune.asdict(config),
    }  # fmt: skip


def test_best_candidate_of_a_sweep_is_applied(tmp_path):
    path = tmp_path / "tiles.json"
    present = select_config(90, 128, torch.bfloat16, 132)
    better = tune.replace(present, keys=Tile(32, 128, 2), backward_warps=4)
    tune.keep_best(path, [_row(2.0, present), _row(1.0, better)])
    tuning.store(path, "sm_80 float16 64 64", "forward", INTERPRETER)
    tuned = tuning.apply(str(path), KEY, present)
    assert tuned == better
    assert tuned.forward == present.forward  # a sweep of the backward decides nothing else
    assert tuning.apply(str(path), "sm_90 bfloat16 64 64", present) == present
    assert tuning.key_of(90, torch.bfloat16, 128, 128) == KEY
    assert tuning.key_of("gfx942", torch.float16, 64, 64) == "gfx942 float16 64 64"


def test_sweeps_of_both_kernels_share_an_entry(tmp_path):
    path = tmp_path / "tiles.json"
    tuning.store(path, KEY, "forward", INTERPRETER)
    tuning.store(path, KEY, "backward", INTERPRETER)
    present = select_config(90, 128, torch.bfloat16, 132)
    tuned = tuning.apply(str(path), KEY, present)
    assert (tuned.forward, tuned.keys) == (INTERPRETER.forward, INTERPRETER.keys)
    assert tuned.processors == 132


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "holds no tiles: Expecting"),
        ("[]", "holds no tiles: "),
        (json.dumps({KEY: {"tile": 1}}), "unknown name 'tile'"),
        (json.dumps({KEY: {"forward_warps": "4"}}), "forward_warps must be an integer or a tile"),
        (
            json.dumps({KEY: {"keys": {"block_m": 0, "block_n": 1, "num_stages": 1}}}),
            "keys.block_m must be a positive integer, got 0",
        ),
    ],
)
def test_file_without_tiles_is_named(content, message, tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"PREFIX_ATTN_TILES={path} .*{message}"):
        tuning.apply(str(path), KEY, INTERPRETER)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"PREFIX_ATTN_TILES=.*no\.json holds no tiles"):
        tuning.apply(str(tmp_path / "no.json"), KEY, INTERPRETER)
