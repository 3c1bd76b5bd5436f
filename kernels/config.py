"""Tile shapes, warps and pipeline stages, per architecture, head dimension and dtype.

Chosen from machine code that was compiled ahead of time (registers, spills, shared memory), not
yet from measurements on a GPU.
"""

from dataclasses import dataclass, replace

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

    def __str__(self) -> str:
        """Such as `128x64 s5`."""
        return f"{self.block_m}x{self.block_n} s{self.num_stages}"


@dataclass(frozen=True)
class Config:
    """What the launchers need beyond the tensors.

    Attributes:
        forward: tile of the forward kernel.
        forward_warps: warps of the forward kernel.
        keys: tile of the backward programs that own keys (dK, dV).
        values: tile of the backward programs that own keys and sum dV alone, if dK and dV are
            apart: then those of `keys` sum dK alone.
        queries: tile of the backward programs that own query rows (dQ).
        backward_warps: warps of the backward kernel, which runs all kinds.
        processors: multiprocessors, for the balance of the work lists.
        heads_in_two: whether two tiles cover a head, where they have less padding than one.
        l2_bytes: second-level cache, for the order in which heads are run.
        forward_descriptors: whether the forward kernel loads K and V by TMA, if `suits_tma`.
        backward_descriptors: whether the backward kernel loads Q, dO, K and V so.
        forward_registers: the most that a thread of the forward kernel may have, if it is limited.
        fused: tile of the backward programs that own keys where these add up dQ too, if that pays.
        softcap_window: tile of the backward programs that own keys under a softcap and a window at
            once, if `keys` is too large for that.
    """

    forward: Tile
    forward_warps: int
    keys: Tile
    queries: Tile
    backward_warps: int
    processors: int
    forward_descriptors: bool = False
    backward_descriptors: bool = False
    forward_registers: int | None = None
    fused: Tile | None = None
    softcap_window: Tile | None = None
    values: Tile | None = None
    heads_in_two: bool = False
    l2_bytes: int = 50 << 20

    def keys_for(self, *, fused: bool, softcap_window: bool) -> Tile:
        """The tile of the backward programs that own keys under the options of a call."""
        if fused and self.fused is not None:
            return self.fused
        return (
            self.softcap_window if softcap_window and self.softcap_window is not None else self.keys
        )

    def heads_per_section(self, num_kv_heads: int, bytes_per_head: int) -> int:
        """KV heads that run before the others start: as many as half of the cache holds."""
        most = max(1, self.l2_bytes // 2 // max(1, bytes_per_head))
        return max(n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0 and n <= most)


INTERPRETER = Config(
    forward=Tile(32, 16),
    forward_warps=4,
    keys=Tile(16, 32),
    queries=Tile(32, 16),
    backward_warps=4,
    processors=4,
    fused=Tile(16, 32),
    softcap_window=Tile(32, 32),
    forward_descriptors=True,
    backward_descriptors=True,
    heads_in_two=True,
    l2_bytes=1 << 14,
)


# Architectures of AMD that have tiles: MI300, MI350.
AMD = ("gfx942", "gfx950")


def suits_tma(head_dim: int, head_dim_v: int, itemsize: int) -> bool:
    """Whether TMA can address heads of these sizes: in steps of 16 bytes."""
    return head_dim * itemsize % 16 == 0 and head_dim_v * itemsize % 16 == 0


def name_of(arch: int | str) -> str:
    """An architecture as compilers write it: "sm_90" or "gfx942"."""
    return arch if isinstance(arch, str) else f"sm_{arch}"


def version_of(arch: int | str) -> str:
    """An architecture as its maker writes it: "9.0" or "gfx942"."""
    return arch if isinstance(arch, str) else f"{arch // 10}.{arch % 10}"


def why_no_tiles(arch: int | str) -> str | None:
    """The reason why there are no tiles for a GPU, or None; `arch` as in `select_config`."""
    if isinstance(arch, str):
        if arch in AMD:
            return None
        return f"of AMD's GPUs needs gfx942 (MI300) or gfx950 (MI350), got {arch}"
    if arch < 80:
        return f"needs compute capability 8.0 (A100, RTX 30) or newer, got {version_of(arch)}"
    return None


def select_config(
    arch: int | str,
    head_dim: int,
    dtype: torch.dtype,
    processors: int,
    *,
    head_dim_v: int | None = None,
    tf32: bool = False,
) -> Config:
    """Returns the configuration for a device.

    Args:
        arch: compute capability as major * 10 + minor, such as 90, or the architecture of an AMD
            GPU, such as "gfx942".
        head_dim: D.
        dtype: dtype of q, k and v.
        processors: multiprocessors of the device.
        head_dim_v: DV; D by default.
        tf32: whether float32 products run on tensor cores.
    """
    dims = head_dim, head_dim if head_dim_v is None else head_dim_v
    head_dim = max(dims)
    if isinstance(arch, str):
        return _amd(arch, head_dim, dtype, processors)
    if dtype == torch.float32:
        return _float32(head_dim, processors, tf32)
    if arch in (86, 89) or arch >= 120:
        return _small(head_dim, processors)
    if arch < 90:
        return _ampere(head_dim, processors)
    descriptors = suits_tma(min(dims), max(dims), dtype.itemsize)
    config = _hopper(head_dim, processors, arch < 100, descriptors)
    if arch >= 100 or not descriptors or head_dim <= 64:
        # Below 64 the tiles are too narrow for Hopper's instruction to gain.
        return config
    config = replace(config, heads_in_two=True)
    return _hopper_in_two(config, dims) if 128 < head_dim <= 192 else config


# bench/machine_code_budget.json has registers, spills and shared memory of every choice below. The
# loops over key columns load an index before K and V, which takes half of the pipeline: only with 5
# stages (3 in the loop over rows) do loads run a whole tile ahead.


def _float32(head_dim: int, processors: int, tf32: bool) -> Config:
    if tf32 and head_dim <= 64:
        return Config(Tile(64, 32), 4, Tile(32, 64), Tile(64, 32), 4, processors)
    if tf32 and head_dim <= 128:
        return Config(Tile(64, 32), 4, Tile(32, 32), Tile(32, 32), 4, processors)
    # Full float32 products do not use tensor cores: with 4 warps or larger tiles these spill. D 256
    # spills in every shape.
    tile = Tile(32, 32) if head_dim <= 64 else Tile(16, 16)
    return Config(tile, 8, tile, tile, 8, processors)


def _small(head_dim: int, processors: int) -> Config:
    """sm_86, sm_89, sm_120: at most 99 KB of shared memory in a block."""
    if head_dim <= 64:
        # The tiles of sm_80 fit, those of the forward twice.
        return _ampere(head_dim, processors)
    if head_dim <= 128:
        # One block fits anyhow, so loads run ahead.
        return Config(Tile(64, 64, 5), 4, Tile(64, 64), Tile(64, 64), 8, processors)
    # 64x64 needs more shared memory than there is.
    return Config(Tile(64, 32), 8, Tile(32, 32), Tile(32, 32), 8, processors)


def _ampere(head_dim: int, processors: int) -> Config:
    """sm_80: 163 KB of shared memory in a block."""
    if head_dim <= 64:
        # Two blocks of the forward fit. dQ on 128x64 spills, and 64x64 with 8 warps computes half
        # of its products twice.
        return Config(Tile(128, 64, 5), 4, Tile(64, 128, 3), Tile(128, 32, 5), 8, processors)
    if head_dim <= 128:
        # Two blocks of the forward hide each other's loads; 5 stages leave room for one, and 128x64
        # spills.
        return Config(Tile(64, 64), 4, Tile(64, 64, 3), Tile(64, 64, 5), 8, processors)
    return Config(Tile(64, 64), 8, Tile(32, 32, 3), Tile(64, 32, 5), 8, processors)


def _hopper(head_dim: int, processors: int, is_hopper: bool, descriptors: bool) -> Config:
    """sm_90, and sm_100 with the same tiles: 227 KB of shared memory in a block."""
    if head_dim <= 64:
        # Two blocks of the forward fit; 8 warps leave room for one. The fused backward has five
        # products instead of seven in the same tiles.
        config = Config(Tile(128, 64, 5), 4, Tile(64, 128, 3), Tile(128, 64, 5), 8, processors)
        if descriptors:
            return replace(
                config,
                keys=Tile(64, 128),
                fused=Tile(64, 128),
                forward_descriptors=True,
                backward_descriptors=True,
            )
        return config
    if head_dim <= 128:
        # Forward: with pointers 128x128 spills, and with 4 warps 128x64 does. By TMA 128x128 takes
        # fewer clocks per key.
        # Backward: 64x64 keys spill more and compute half of S and dP twice.
        # Fused: on sm_100 tensor memory is too small.
        # A softcap with a window: 64x128 keys spill in the full loop, too, 32x128 keys nowhere. On
        # sm_100 the former spill outside of it only.
        config = Config(Tile(128, 64, 5), 8, Tile(64, 128, 3), Tile(128, 64, 5), 8, processors)
        if is_hopper:
            config = replace(config, softcap_window=Tile(32, 128))
        if descriptors:
            config = replace(
                config,
                forward=Tile(128, 128),
                keys=Tile(64, 128),
                forward_descriptors=True,
                backward_descriptors=True,
            )
        return replace(config, fused=Tile(64, 128)) if is_hopper and descriptors else config
    config = Config(Tile(128, 32, 5), 8, Tile(32, 32, 3), Tile(64, 32, 5), 8, processors)
    if descriptors:
        # With pointers 128x64 spills in the forward. 128 keys have registers for one accumulator
        # of 256 columns: dK and dV apart compute S once more, but by the instruction of the
        # architecture, which 32 keys are too few for. In shared memory, K and V of 128 keys leave
        # room for two stages of 32 rows, and K alone for 64.
        return replace(
            config,
            forward=Tile(128, 64),
            keys=Tile(32, 128),
            values=Tile(64, 128),
            queries=Tile(128, 32),
            forward_descriptors=True,
            backward_descriptors=True,
        )
    return config


def _hopper_in_two(config: Config, dims: tuple[int, int]) -> Config:
    """Heads of 128 and at most 64 columns side by side, on sm_90: tiles like those of 128."""
    # Shared memory has room for 128 keys in the forward where V has 128 columns at most.
    forward = Tile(128, 128) if dims[1] <= 128 else config.forward
    return replace(
        config,
        forward=forward,
        keys=Tile(64, 128),
        values=Tile(64, 128),
        queries=Tile(128, 64),
    )


def _amd(arch: str, head_dim: int, dtype: torch.dtype, processors: int) -> Config:
    """CDNA 3 with 64 KB of shared memory in a block, CDNA 4 with 160 KB: four warps of 64 threads.

    Each warp has 16 or 32 keys, or query rows, of its own: where a tile has fewer, warps compute
    the same scores. With at most 256 registers a second block hides what the first one waits for.
    """
    if dtype == torch.float32:
        if head_dim <= 64:
            return Config(Tile(128, 32, 1), 4, Tile(16, 64, 1), Tile(64, 16, 1), 4, processors)
        if head_dim <= 128:
            return Config(Tile(64, 32, 1), 4, Tile(16, 64, 1), Tile(64, 16, 1), 4, processors)
        # 64 keys spill.
        return Config(Tile(64, 16, 1), 4, Tile(16, 32, 1), Tile(32, 16, 1), 4, processors)
    if head_dim <= 64:
        return Config(Tile(128, 64), 4, Tile(32, 128, 1), Tile(128, 32, 1), 4, processors)
    if head_dim <= 128:
        # With 64 keys in the forward one block fits.
        return Config(Tile(128, 32), 4, Tile(16, 64, 1), Tile(64, 16, 1), 4, processors)
    # On CDNA 3 one block fits with either, on CDNA 4 two with 64 rows.
    forward = Tile(128, 32, 1) if arch == "gfx942" else Tile(64, 32, 1)
    return Config(forward, 4, Tile(16, 64, 1), Tile(64, 16, 1), 4, processors)
