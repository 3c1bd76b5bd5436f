"""Tiles that a sweep found on a GPU, kept in a file: an opt-in that replaces the built-in ones.

`make gpu-tune KERNEL=forward OUT=folder` writes `folder/tiles.json`; with the environment variable
PREFIX_ATTN_TILES=folder/tiles.json every later call takes what is in it. Nothing is ever tuned at
a first call.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefix_attn.kernels.config import Config, Tile, name_of

VARIABLE = "PREFIX_ATTN_TILES"
# What a sweep of each kernel decides.
TUNED = {
    "forward": ("forward", "forward_warps", "forward_descriptors", "forward_registers"),
    "backward": ("keys", "values", "queries", "backward_warps", "backward_descriptors"),
    "fused backward": ("fused",),
}


def key_of(arch: int | str, dtype: object, head_dim: int, head_dim_v: int) -> str:
    """The entry of a file: such as "sm_90 bfloat16 128 128"."""
    return f"{name_of(arch)} {str(dtype).removeprefix('torch.')} {head_dim} {head_dim_v}"


def store(path: Path, key: str, kernel: str, config: Config) -> None:
    """Writes what a sweep of one kernel found; other entries and kernels stay as they are."""
    content = json.loads(path.read_text()) if path.exists() else {}
    found = asdict(config)
    content.setdefault(key, {}).update({name: found[name] for name in TUNED[kernel]})
    path.write_text(json.dumps(content, indent=1) + "\n")


def apply(path: str, key: str, config: Config) -> Config:
    """The configuration with what the file says of `key`.

    Raises:
        ValueError: if the file can't be read or holds something else; it names the file.
    """
    return replace(config, **_load(path).get(key, {}))


@lru_cache
def _load(path: str) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(Path(path).read_text())
        return {key: {n: _value(n, x) for n, x in entry.items()} for key, entry in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{VARIABLE}={path} holds no tiles: {error}") from error


def _value(name: str, value: Any) -> Any:
    if name not in {name for names in TUNED.values() for name in names}:
        raise ValueError(f"unknown name {name!r}")
    if isinstance(value, dict):
        sizes = Tile(**value)
        for size in fields(sizes):
            number = getattr(sizes, size.name)
            if type(number) is not int or number < 1:
                raise ValueError(f"{name}.{size.name} must be a positive integer, got {number!r}")
        return sizes
    if value is None and name in ("forward_registers", "values"):
        return value
    if type(value) not in (int, bool):
        raise ValueError(f"{name} must be an integer or a tile, got {value!r}")
    return value
