"""Which kernels are compiled in which configurations: programs, and sets of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from bench.cases import DTYPES
from prefix_attn.kernels.config import AMD, Config, Tile, name_of, select_config

KERNELS = ("forward", "backward", "delta", "reduce")
BOTH = KERNELS[:2]  # those that multiply matrices
# D, or D/DV where they differ.
HEAD_DIMS = ("64", "80", "96", "128", "192/128", "256")
# Of NVIDIA, whose machine code has a model; those of AMD are in `kernels.config`.
ARCHITECTURES = (80, 90, 100)
# What changes the kernels: arguments of `prefix_attention`, where sinks stands for a tensor, and
# the segments that a layout's queries are restricted to.
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window_size": 96},
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": True},
    "bidirectional": {"prefix_causal": False},
    "subset": {"queries_for": [1, 2]},
    "fused": {"deterministic": False},
}
COMBINED = ("window", "softcap", "sinks", "bidirectional")
HEADS, KV_HEADS = 32, 8
# Versions of Triton before the newest one that is tested.
OLDER = ("3.6.", "3.7.", "3.8.")
PROCESSORS = 132


class LoopKind(Enum):
    """The kinds of loops that multiply matrices, by the source function that holds them.

    Where dK and dV are summed apart, `key_tile` is called twice, for dK first.
    """

    FORWARD = "forward_kernel"
    KEYS = "key_tile"
    VALUES = "key_tile 2"
    QUERIES = "query_tile"


# Matrix products per tile that are as long or wide as D, and as DV.
PRODUCTS = {
    LoopKind.FORWARD: (1, 1),
    LoopKind.KEYS: (2, 2),
    LoopKind.VALUES: (1, 1),
    LoopKind.QUERIES: (2, 1),
}


@dataclass(frozen=True)
class Program:
    """One kernel in one configuration.

    Attributes:
        kernel: its name without `_kernel`.
        arch: such as 90 or "gfx942", see `select_config`.
        dtype: a key of `DTYPES`.
        head_dim: D.
        config: tiles, warps, stages.
        options: keys of `OPTIONS`.
        head_dim_v: DV, or None for D.
    """

    kernel: str
    arch: int | str
    dtype: str
    head_dim: int
    config: Config
    options: tuple[str, ...] = ()
    head_dim_v: int | None = None

    @classmethod
    def from_selection(
        cls,
        kernel: str,
        arch: int | str,
        dtype: str,
        head_dim: int,
        options: tuple[str, ...] = (),
        head_dim_v: int | None = None,
    ) -> Program:
        """The program that the package would launch there."""
        config = select_config(
            arch,
            head_dim,
            DTYPES[dtype],
            PROCESSORS,
            head_dim_v=head_dim_v,
            tf32=dtype == "tf32",
        )
        return cls(kernel, arch, dtype, head_dim, config, options, head_dim_v)

    @property
    def dims(self) -> tuple[int, int]:
        """D and DV."""
        return self.head_dim, self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def label(self) -> str:
        """A short name, unique in a report: `sm_90 bf16 D192/128 backward softcap`."""
        dtype = self.dtype.replace("bfloat", "bf").replace("float", "fp")
        size = f"D{self.head_dim}" + ("" if self.head_dim_v is None else f"/{self.head_dim_v}")
        return " ".join((name_of(self.arch), dtype, size, self.kernel, *self.options))

    @property
    def has_loop(self) -> bool:
        """Whether it is one of the kernels that multiply matrices."""
        return self.kernel in BOTH

    @property
    def warps(self) -> int:
        """Warps of a block."""
        config = self.config
        return {"forward": config.forward_warps, "backward": config.backward_warps}.get(
            self.kernel, 4
        )

    @property
    def shape(self) -> str:
        """Tiles, warps and stages; for the backward those of dK and dV, then those of dQ.

        Where dK and dV are summed apart, each has a tile.
        """
        tiles = {
            "forward": (self.config.forward,),
            "backward": (
                self.keys,
                self.config.values,
                None if self.is_fused else self.config.queries,
            ),
        }.get(self.kernel, ())
        return " ".join([" + ".join(str(x) for x in tiles if x), f"w{self.warps}"]).strip()

    def kind(self, function: str) -> LoopKind:
        """The kind of the loops of a source function; the forward has one kind.

        Raises:
            ValueError: if loops of this function are of no kind that is known.
        """
        return LoopKind.FORWARD if self.kernel == "forward" else LoopKind(function)

    @property
    def calls(self) -> dict[str, int]:
        """How often source functions are called, if more than once."""
        return {} if self.config.values is None else {LoopKind.KEYS.value: 2}

    def area(self, kind: LoopKind) -> int:
        """Scores in a tile."""
        tile = {
            LoopKind.FORWARD: self.config.forward,
            LoopKind.KEYS: self.keys,
            LoopKind.VALUES: self.config.values,
            LoopKind.QUERIES: self.config.queries,
        }[kind]
        assert tile is not None
        return tile.area

    def width(self, kind: LoopKind, *, padded: bool = False) -> int:
        """Multiply-adds per score."""
        d, dv = (1 << (x - 1).bit_length() if padded else x for x in self.dims)
        with_d, with_dv = PRODUCTS[kind]
        if kind is LoopKind.KEYS:
            with_d += self.is_fused
            with_dv -= self.config.values is not None
        return with_d * d + with_dv * dv

    def repeated(self, kind: LoopKind) -> int:
        """The part of `width` that programs of dK compute as well: S, and dP in those of dQ."""
        return {LoopKind.QUERIES: sum(self.dims), LoopKind.VALUES: self.head_dim}.get(kind, 0)

    @property
    def is_amd(self) -> bool:
        """Whether it is for a GPU of AMD."""
        return isinstance(self.arch, str)

    @property
    def is_fused(self) -> bool:
        """Whether it is a backward in which programs that own keys add up dQ."""
        chosen = "fused" in self.options and self.kernel == "backward"
        return chosen and self.config.fused is not None

    @property
    def keys(self) -> Tile:
        """The tile of dK and dV."""
        softcap_window = {"softcap", "window"} <= set(self.options)
        return self.config.keys_for(fused=self.is_fused, softcap_window=softcap_window)


def selected(
    architectures: list[int | str],
    dtypes: list[str],
    head_dims: list[str],
    kernels: list[str],
    options: tuple[str, ...] = (),
) -> list[Program]:
    """What the package launches on these architectures; head dimensions as in `HEAD_DIMS`."""
    return [
        Program.from_selection(kernel, arch, dtype, head_dim, options, *head_dim_v)
        for arch in architectures
        for dtype in dtypes
        for head_dim, *head_dim_v in (map(int, size.split("/")) for size in head_dims)
        for kernel in kernels
    ]


def with_options(
    architectures: list[int | str], head_dims: list[str], *chosen: str
) -> list[Program]:
    """Forward and backward with options, where these change them; bfloat16."""
    programs = selected(architectures, ["bfloat16"], head_dims, ["forward", "backward"], chosen)
    return [x for x in programs if "fused" not in chosen or x.is_fused]


def quick() -> list[Program]:
    """The set of the tests on the newest Triton: three minutes on two cores."""
    plain = selected([*ARCHITECTURES], ["bfloat16"], [*HEAD_DIMS], [*BOTH])
    alone = [x for option in OPTIONS for x in with_options([90], ["128"], option)]
    combined = with_options([90], ["128"], *COMBINED)
    fused = with_options([90, 100], ["64"], "fused")
    return plain + alone + combined + fused + selected([*AMD], ["bfloat16"], ["64", "128"], [*BOTH])


def tested(triton_version: str) -> list[Program]:
    """The set of the tests on a version of Triton."""
    return chosen() if triton_version.startswith(OLDER) else quick()


def chosen() -> list[Program]:
    """The set of the tests on older versions of Triton: each tile and way to load once."""
    return [
        *selected([90], ["bfloat16"], ["64", "96", "128", "192/128", "256"], [*BOTH]),
        *with_options([90], ["128"], *COMBINED),
        *with_options([90], ["64", "128"], "fused"),
        *selected([80, 100], ["bfloat16"], ["128"], [*BOTH]),
        *selected(["gfx942"], ["bfloat16"], ["128"], [*BOTH]),
        *selected([90], ["bfloat16"], ["128"], ["delta", "reduce"]),
    ]


def consumer() -> list[Program]:
    """Forward and backward of the cards with the least shared memory, in all dtypes and sizes.

    With all options, and with each of them at 128. float16 needs as much shared memory as bfloat16,
    and sm_86 has the instructions of sm_89.
    """
    dtypes, head_dims = ["bfloat16", "tf32", "float32"], ["16", "32", *HEAD_DIMS]
    alone = [(option,) for option in OPTIONS if option != "fused"]  # they have no tile for it
    found = [
        *(x for y in ((), COMBINED) for x in selected([89, 120], dtypes, head_dims, [*BOTH], y)),
        *(x for y in alone for x in selected([89, 120], dtypes, ["128"], [*BOTH], y)),
    ]
    return _once(found)


def everything() -> list[Program]:
    """What is compiled by hand: `quick` and what other architectures, dtypes and sizes add to it.

    Options together hold more registers than each of them alone, so that other head dimensions than
    128 need these only. float16 differs from bfloat16 in no more than how values are converted.
    """
    architectures: list[int | str] = [*ARCHITECTURES]
    both = [*BOTH]
    programs = [
        *quick(),
        *chosen(),
        *selected(architectures, ["bfloat16"], [*HEAD_DIMS], ["delta", "reduce"]),
        *selected(architectures, ["float32"], ["64", "128", "256"], [*KERNELS]),
        *selected(architectures, ["tf32"], ["64", "128", "256"], both),
        *selected(architectures, ["float16"], ["64", "128"], both),
        *selected([89, 120], ["bfloat16"], ["64", "128", "256"], both),
        *(x for option in OPTIONS for x in with_options(architectures, ["128"], option)),
        *with_options(architectures, [*HEAD_DIMS], *COMBINED),
        *with_options(architectures, ["64", "128"], *COMBINED, "fused"),
        *selected([*AMD], ["bfloat16"], [*HEAD_DIMS], both),
        *selected([*AMD], ["bfloat16"], ["128"], ["delta", "reduce"]),
        *selected([*AMD], ["float16"], ["128"], both),
        *selected([*AMD], ["float32"], ["64", "128", "256"], both),
        *selected(["gfx942"], ["tf32"], ["64", "128", "256"], both),
        *with_options([*AMD], ["64", "128", "256"], *COMBINED),
    ]
    return _once(programs)


def _once(programs: list[Program]) -> list[Program]:
    return list({program.label: program for program in programs}.values())
