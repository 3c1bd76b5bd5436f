"""Tile shapes, warps and pipeline stages, per architecture, head dimension and dtype.

Chosen from machine code that was compiled ahead of time (registers, spills, shared memory), not
yet from measurements on a GPU.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """block_m query rows by block_n keys, and the pipeline stages of the loop over them."""

    block_m: int
    block_n: int
    num_stages: int = 2

    @property
    def area(self) -> int:
        """Scores in a tile."""
        return self.block_m * self.block_n


@dataclass(frozen=True)
class Config:
    """What the launchers need beyond the tensors.

    Attributes:
        forward: tile of the forward kernel.
        forward_warps: warps of the forward kernel.
        keys: tile of the backward programs that own keys (dK, dV).
        queries: tile of the backward programs that own query rows (dQ).
        backward_warps: warps of the backward kernel, which runs both kinds.
        processors: multiprocessors, for the balance of the work lists.
    """

    forward: Tile
    forward_warps: int
    keys: Tile
    queries: Tile
    backward_warps: int
    processors: int


INTERPRETER = Config(
    forward=Tile(32, 16),
    forward_warps=4,
    keys=Tile(16, 32),
    queries=Tile(32, 16),
    backward_warps=4,
    processors=4,
)


def select_config(capability: int, head_dim: int, dtype: torch.dtype, processors: int) -> Config:
    """Returns the configuration for a device.

    Args:
        capability: compute capability as major * 10 + minor, such as 90.
        head_dim: the larger of D and DV.
        dtype: dtype of q, k and v.
        processors: multiprocessors of the device.
    """
    if dtype == torch.float32:
        # Full float32 products do not use tensor cores: larger tiles spill.
        narrow = Tile(32, 32) if head_dim <= 128 else Tile(16, 16)
        return Config(narrow, 4, narrow, narrow, 4, processors)
    if head_dim > 128:
        forward = Tile(128, 64) if capability >= 90 else Tile(64, 64)
        return Config(forward, 8, Tile(32, 32), Tile(64, 32), 8, processors)
    if capability >= 90:
        return Config(Tile(128, 64), 8, Tile(64, 128), Tile(128, 64), 8, processors)
    if head_dim > 64:
        return Config(Tile(64, 64), 4, Tile(64, 64), Tile(64, 64), 8, processors)
    return Config(Tile(128, 64), 4, Tile(64, 64), Tile(64, 64), 8, processors)
