"""Prefix Grouper's interface on shared-prefix attention: its users change one import.

    from prefix_attn.integrations.prefix_grouper import PrefixGrouper

What `PrefixGrouper.forward` does in two calls of somebody's attention function, with the prefix
repeated for every member, is here one call of `prefix_attention`.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from prefix_attn.api import prefix_attention
from prefix_attn.layout import PrefixLayout
from prefix_attn.losses.checks import integers

SCALE_NAMES = ("scale", "scaling", "softmax_scale")
DROPOUT_NAMES = ("dropout", "dropout_p", "attention_dropout")
CAUSAL_NAMES = ("is_causal", "causal")
SERVED = (*SCALE_NAMES, "sliding_window", "softcap", "s_aux", *DROPOUT_NAMES, *CAUSAL_NAMES)
# Probes remembered at most: those of the layers of a model, not those of every batch.
MAX_PROBED = 4096
SCALARS = (bool, int, float, str, type(None))

AttentionFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Group(Sequence[int]):
    """Lengths of one prefix and of its suffixes; as a sequence `[prefix, suffix, suffix, ...]`."""

    prefix_len: int
    suffix_lens: list[int]

    @property
    def num_samples(self) -> int:
        """Number of suffixes."""
        return len(self.suffix_lens)

    @property
    def total_len(self) -> int:
        """Tokens of the prefix and all suffixes."""
        return self.prefix_len + sum(self.suffix_lens)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        return [self.prefix_len, *self.suffix_lens][index]

    def __len__(self) -> int:
        return 1 + self.num_samples


class PrefixGrouper:
    """Groups of one prefix and its suffixes, each group one row of a padded (b, seq) batch.

    A row holds prefix, first suffix, second suffix and so on without gaps between them. Split into
    parts, prefixes are padded on the left (b, prefix) and suffixes on the right (n, suffix), so
    that they touch.

    Attributes:
        layout: the `PrefixLayout` of all groups; packed rows are the tokens of the batch in order.
        group_info: one `Group` per row.
        padding_mask: (b, seq) bool, True at tokens; `x_shape` is its shape.
        grouped_prefix_mask: (b, seq) bool, True at prefix tokens.
        grouped_suffix_mask: (b, seq) bool, True at suffix tokens.
        ungrouped_prefix_mask: (b, prefix) bool; `prefix_x_shape` is its shape.
        ungrouped_suffix_mask: (n, suffix) bool; `suffix_x_shape` is its shape.
        prefix_attn_mask: the same as ungrouped_prefix_mask.
        suffix_attn_mask: (n, prefix + suffix) bool.
        position_ids: (b, seq) int64, depth of each token on its path, 0 at padding.
        prefix_lens: (b,) int64.
        grouped_suffix_lens: (b,) int64, sums over the suffixes of a group.
        ungrouped_suffix_lens: (n,) int64.
        num_samples: (b,) int64, suffixes per group.
        total_lens: (b,) int64.

    Example:
        >>> grouper = PrefixGrouper([[3, 2, 1], [2, 2, 2]])
        >>> q = torch.randn(2, 4, 6, 16)
        >>> grouper.forward(None, q, q, q).shape
        torch.Size([2, 6, 4, 16])
    """

    group_info: list[Group]
    layout: PrefixLayout
    padding_mask: Tensor

    def __init__(
        self,
        group_info: Sequence[Sequence[int]] | None = None,
        device: torch.device | str | None = None,
        padding_mode: str | Tensor = "right",
    ) -> None:
        """See `init`, which without `group_info` is left to the caller."""
        if group_info is not None:
            self.init(group_info, device, padding_mode)

    def init(
        self,
        group_info: Sequence[Sequence[int]],
        device: torch.device | str | None = None,
        padding_mode: str | Tensor = "right",
    ) -> None:
        """Builds the layout and the masks.

        Args:
            group_info: `[prefix, suffix, suffix, ...]` lengths of each group, with at least one
                suffix.
            device: where masks and lengths live.
            padding_mode: "right", "left", or a (b, seq) mask of where the tokens of each group
                lie.

        Raises:
            ValueError: if a length or the mask is wrong; it names the value.
        """
        if not len(group_info):
            raise ValueError("group_info must hold at least one group")
        groups = []
        for i, lengths in enumerate(group_info):
            if len(lengths) < 2:
                raise ValueError(
                    f"group_info[{i}] must hold a prefix length and at least one suffix length, "
                    f"got {list(lengths)}"
                )
            groups.append(Group(lengths[0], list(lengths[1:])))
        self.layout = PrefixLayout.from_lengths(
            [group.prefix_len for group in groups],
            [group.suffix_lens for group in groups],
            device=device,
        )
        self.group_info = groups
        device = self.layout.device
        self.prefix_lens = torch.tensor([group.prefix_len for group in groups], device=device)
        self.num_samples = torch.tensor([group.num_samples for group in groups], device=device)
        self.total_lens = torch.tensor([group.total_len for group in groups], device=device)
        self.grouped_suffix_lens = self.total_lens - self.prefix_lens
        suffix_lens = [length for group in groups for length in group.suffix_lens]
        self.ungrouped_suffix_lens = torch.tensor(suffix_lens, device=device)

        self.padding_mask = _padding_mask(padding_mode, self.total_lens)
        place = self.padding_mask.cumsum(1) - 1
        in_prefix = place < self.prefix_lens[:, None]
        self.grouped_prefix_mask = self.padding_mask & in_prefix
        self.grouped_suffix_mask = self.padding_mask & ~in_prefix
        self.ungrouped_prefix_mask = _padding_mask("left", self.prefix_lens)
        self.ungrouped_suffix_mask = _padding_mask("right", self.ungrouped_suffix_lens)
        self.prefix_attn_mask = self.ungrouped_prefix_mask
        self.suffix_attn_mask = self.batch_repeat_cat(
            self.ungrouped_prefix_mask, self.ungrouped_suffix_mask, cat_dim=1
        )
        self.x_shape = self.padding_mask.shape
        self.prefix_x_shape = self.ungrouped_prefix_mask.shape
        self.suffix_x_shape = self.ungrouped_suffix_mask.shape
        self.grouped_prefix_indices = self.grouped_prefix_mask.nonzero()
        self.grouped_suffix_indices = self.grouped_suffix_mask.nonzero()
        self.ungrouped_prefix_indices = self.ungrouped_prefix_mask.nonzero()
        self.ungrouped_suffix_indices = self.ungrouped_suffix_mask.nonzero()
        indices = self.padding_mask.nonzero()
        self._placed = {device: (self.layout, indices)}
        self.position_ids = _scattered(self.layout.position_ids, indices, tuple(self.x_shape))

    @classmethod
    def from_ungrouped_masks(
        cls,
        prefix_mask: Tensor,
        suffix_mask: Tensor,
        group_sizes: int | Sequence[int],
        device: torch.device | str | None = None,
        padding_mode: str | Tensor = "right",
    ) -> PrefixGrouper:
        """Reads the lengths off masks of prompts (b, L1) and completions (n, L2).

        Args:
            prefix_mask: (b, L1), non-zero at tokens.
            suffix_mask: (n, L2), the suffixes of a group next to one another.
            group_sizes: suffixes per group, one number for all or one for each.
            device: as in `init`.
            padding_mode: as in `init`.

        Raises:
            TypeError: if group_sizes holds no integers.
            ValueError: if a mask or group_sizes is wrong; it names the value.
        """
        _check_mask("prefix_mask", prefix_mask)
        _check_mask("suffix_mask", suffix_mask)
        count, total = len(prefix_mask), len(suffix_mask)
        sizes = integers("group_sizes", group_sizes, count)
        if len(sizes) != count or sum(sizes) != total or min(sizes, default=0) < 0:
            raise ValueError(
                f"group_sizes must divide {total} suffixes among {count} prefixes, got "
                f"{group_sizes}"
            )
        prefix_lens = (prefix_mask != 0).sum(1).tolist()
        suffix_lens = (suffix_mask != 0).sum(1).split(sizes)
        info = [[p, *s.tolist()] for p, s in zip(prefix_lens, suffix_lens, strict=True)]
        return cls(info, device=device, padding_mode=padding_mode)

    @staticmethod
    def convert_padding(x: Tensor, x_mask: Tensor, padding_mode: str | Tensor = "right") -> Tensor:
        """Moves the tokens of (b, seq, ...) to where another padding has them, zeros elsewhere."""
        _check_mask("x_mask", x_mask)
        if x.shape[:2] != x_mask.shape:
            raise ValueError(
                f"x must have shape {(*x_mask.shape, '...')}, as x_mask, got {tuple(x.shape)}"
            )
        x_mask = (x_mask != 0).to(x.device)
        target = _padding_mask(padding_mode, x_mask.sum(1))
        return _scattered(x[x_mask], target.nonzero(), tuple(target.shape))

    def concat_input(
        self, prefix: Tensor, prefix_mask: Tensor, suffix: Tensor, suffix_mask: Tensor
    ) -> Tensor:
        """Puts prefixes (b, L1, ...) and suffixes (n, L2, ...) into one batch (b, seq, ...).

        Raises:
            ValueError: if a mask doesn't have the lengths of the groups.
        """
        parts = (
            ("prefix", prefix, prefix_mask, self.prefix_lens),
            ("suffix", suffix, suffix_mask, self.ungrouped_suffix_lens),
        )
        tokens = []
        for name, x, mask, lengths in parts:
            _check_mask(f"{name}_mask", mask)
            if x.shape[:2] != mask.shape:
                raise ValueError(
                    f"{name} must have shape {(*mask.shape, '...')}, as its mask, got "
                    f"{tuple(x.shape)}"
                )
            found = (mask != 0).sum(1).tolist()
            if found != lengths.tolist():
                raise ValueError(
                    f"{name}_mask must have {lengths.tolist()} tokens, as group_info, got {found}"
                )
            tokens.append(x[(mask != 0).to(x.device)])
        return self._joined(tokens[0], tokens[1])

    def split_output(
        self, output: Tensor, include_prefix_last: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Splits (b, seq, ...) into prefixes and suffixes.

        Args:
            output: such as logits, whose last prefix row predicts the first suffix token.
            include_prefix_last: how many of the last prefix columns go to the head of every
                suffix instead.

        Returns:
            prefix (b, L1, ...), its mask, suffix (n, L2, ...), its mask.
        """
        if type(include_prefix_last) is not int or include_prefix_last < 0:
            raise ValueError(
                f"include_prefix_last must be an integer of at least 0, got {include_prefix_last!r}"
            )
        if output.shape[:2] != self.x_shape:
            raise ValueError(
                f"output must have shape {(*self.x_shape, '...')}, got {tuple(output.shape)}"
            )
        prefix, suffix = self._split(output)
        prefix_mask, suffix_mask = self.ungrouped_prefix_mask, self.ungrouped_suffix_mask
        if include_prefix_last:
            last = -include_prefix_last
            suffix = self.batch_repeat_cat(prefix[:, last:], suffix, cat_dim=1)
            suffix_mask = self.batch_repeat_cat(prefix_mask[:, last:], suffix_mask, cat_dim=1)
            prefix, prefix_mask = prefix[:, :last], prefix_mask[:, :last]
        return prefix, prefix_mask, suffix, suffix_mask

    def forward(
        self,
        attn_func: AttentionFunction | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of every group, each prefix computed once.

        `attn_func` does not compute the result. Since its body may hold a scale, a softcap or
        dropout that are not in the arguments, it is run once on a few random tokens and has to
        agree with what is computed instead. None leaves that check out.

        Args:
            attn_func: the function that Prefix Grouper would call, or None.
            q: (b, Hq, seq, D), after position embeddings.
            k: (b, Hkv, seq, D).
            v: (b, Hkv, seq, DV).
            *args: refused: their meaning is known to `attn_func` only.
            **kwargs: `scale`, `scaling` or `softmax_scale`; `sliding_window`, keys that a query
                sees with its own; `softcap`; `s_aux`, attention sinks. Dropout of zero and
                causality may be said.

        Returns:
            (b, seq, Hq, DV), zero at padding.

        Raises:
            TypeError: naming an argument that can't be served.
            ValueError: if a shape is wrong, or `attn_func` computes something else.
        """
        options = _options(args, kwargs)
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dim() != 4 or (x.shape[0], x.shape[2]) != tuple(self.x_shape):
                batch, length = self.x_shape
                raise ValueError(
                    f"{name} must have shape ({batch}, H, {length}, D), got {tuple(x.shape)}"
                )
        if attn_func is not None and not torch.compiler.is_compiling():
            _probe(attn_func, q, k, v, kwargs, options)
        layout, indices = self._on(q.device)
        row, column = indices.unbind(1)
        q, k, v = (x[row, :, column] for x in (q, k, v))
        out: Tensor = prefix_attention(q, k, v, layout, **options)
        return _scattered(out, indices, tuple(self.x_shape))

    def ungroup(
        self, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Prefixes of q, k, v (b, H, prefix, D), then suffixes (n, H, suffix, D)."""
        parts = [self._split(x.transpose(1, 2)) for x in (q, k, v)]
        prefixes = [prefix.transpose(1, 2) for prefix, _ in parts]
        suffixes = [suffix.transpose(1, 2) for _, suffix in parts]
        return (*prefixes, *suffixes)  # type: ignore[return-value]

    def group(self, o_prefix: Tensor, o_suffix: Tensor) -> Tensor:
        """Joins (b, prefix, ...) and (n, suffix, ...) into (b, seq, ...)."""
        prefix_rows = self.ungrouped_prefix_indices.to(o_prefix.device).unbind(1)
        suffix_rows = self.ungrouped_suffix_indices.to(o_suffix.device).unbind(1)
        return self._joined(o_prefix[prefix_rows], o_suffix[suffix_rows])

    def batch_repeat_cat(self, prefix: Tensor, suffix: Tensor, cat_dim: int) -> Tensor:
        """Repeats each prefix for the suffixes of its group and puts it before them."""
        counts = self.num_samples.to(prefix.device)
        repeated = prefix.repeat_interleave(counts, dim=0, output_size=len(suffix))
        return torch.cat([repeated, suffix], dim=cat_dim)

    def _on(self, device: torch.device) -> tuple[PrefixLayout, Tensor]:
        """The layout and the (row, column) of each token on a device, moved there once."""
        if device not in self._placed:
            layout, indices = self._placed[self.layout.device]
            self._placed[device] = (layout.to(device), indices.to(device))
        return self._placed[device]

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, seq, ...) as (b, prefix, ...) and (n, suffix, ...)."""
        prefix_rows = self.grouped_prefix_indices.to(x.device).unbind(1)
        suffix_rows = self.grouped_suffix_indices.to(x.device).unbind(1)
        return (
            _scattered(x[prefix_rows], self.ungrouped_prefix_indices, tuple(self.prefix_x_shape)),
            _scattered(x[suffix_rows], self.ungrouped_suffix_indices, tuple(self.suffix_x_shape)),
        )

    def _joined(self, prefix: Tensor, suffix: Tensor) -> Tensor:
        """Tokens of all prefixes and of all suffixes, end to end, as (b, seq, ...)."""
        tokens = torch.cat([prefix, suffix])
        indices = torch.cat([self.grouped_prefix_indices, self.grouped_suffix_indices])
        return _scattered(tokens, indices, tuple(self.x_shape))


def _check_mask(name: str, mask: Tensor) -> None:
    if mask.dim() != 2:
        raise ValueError(f"{name} must have shape (b, seq), got {tuple(mask.shape)}")


def _padding_mask(padding_mode: str | Tensor, lengths: Tensor) -> Tensor:
    """(b, seq) bool, True at the tokens of rows of these lengths."""
    if isinstance(padding_mode, Tensor):
        mask = (padding_mode != 0).to(lengths.device)
        _check_mask("padding_mode", mask)
        found = mask.sum(1).tolist()
        if found != lengths.tolist():
            raise ValueError(
                f"padding_mode must have {lengths.tolist()} tokens in its rows, got {found}"
            )
        return mask
    if padding_mode not in ("left", "right"):
        raise ValueError(f"padding_mode must be 'left', 'right' or a mask, got {padding_mode!r}")
    longest = int(lengths.max()) if len(lengths) else 0
    column = torch.arange(longest, device=lengths.device)
    if padding_mode == "left":
        return column >= (longest - lengths)[:, None]
    return column < lengths[:, None]


def _scattered(tokens: Tensor, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Tokens (n, ...) at their (row, column) of a batch of this shape, zeros elsewhere."""
    row, column = indices.to(tokens.device).unbind(1)
    batch = tokens.new_zeros(*shape, *tokens.shape[1:])
    return batch.index_put((row, column), tokens)


# ---- the attention function that is not called --------------------------------------------------


def _options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Options of `prefix_attention` from what was meant for the attention function."""
    if args:
        raise TypeError(
            f"forward takes attn_func, q, k and v, got {len(args)} more positional arguments, "
            "which only attn_func could read; pass them by name"
        )
    given = {name: value for name, value in kwargs.items() if value is not None}
    for name, value in given.items():
        if name not in SERVED:
            raise TypeError(
                f"forward can't serve {name}={value!r}: attn_func is not called. It serves "
                f"{', '.join(SERVED)}; leave {name} out if it doesn't change the result"
            )
        if name in DROPOUT_NAMES and value:
            raise TypeError(f"forward has no dropout, got {name}={value!r}")
        if name in CAUSAL_NAMES and not value:
            raise TypeError(f"forward is causal, got {name}={value!r}")
    scales = {given[name] for name in SCALE_NAMES if name in given}
    if len(scales) > 1:
        raise TypeError(f"forward got several scales: {sorted(scales)}")
    return {
        "scale": next(iter(scales), None),
        "window_size": given.get("sliding_window"),
        "softcap": given.get("softcap"),
        "sinks": given.get("s_aux"),
    }


_probed: set[Any] = set()


def _probe(
    attn_func: AttentionFunction,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kwargs: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Runs `attn_func` once on a group of three tokens and two, and compares.

    Raises:
        ValueError: if it disagrees.
    """
    shape = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    scalars = {name: x for name, x in kwargs.items() if not isinstance(x, Tensor)}
    try:
        identity = _identity(attn_func)
    except TypeError:  # probed every time
        identity = object()
    key = (identity, shape, q.dtype, q.device.type, repr(sorted(scalars.items())))
    if key in _probed:
        return
    if len(_probed) >= MAX_PROBED:
        _probed.clear()
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, head_dim, head_dim_v = shape

    def normal(heads: int, width: int) -> Tensor:
        x = 2 * torch.randn(1, heads, 5, width, generator=generator, dtype=torch.float64)
        return x.to(q.device, q.dtype)

    qs, ks, vs = normal(heads, head_dim), normal(kv_heads, head_dim), normal(kv_heads, head_dim_v)
    layout = PrefixLayout.from_lengths([3], [[2]], device=q.device)
    with torch.no_grad():
        ones = torch.ones(1, 5, dtype=torch.bool, device=q.device)
        try:
            known = _accepted(attn_func, kwargs)
            prefix = attn_func(qs[:, :, :3], ks[:, :, :3], vs[:, :, :3], ones[:, :3], **known)
            suffix = attn_func(qs[:, :, 3:], ks, vs, ones, **known)
        except Exception as reason:
            warnings.warn(
                f"attn_func could not be run on a few tokens to see whether it computes the same "
                f"({type(reason).__name__}: {reason}); pass None to leave the check out",
                stacklevel=3,
            )
            _probed.add(key)
            return
        qs, ks, vs = (x[0].transpose(0, 1).contiguous() for x in (qs, ks, vs))
        ours: Tensor = prefix_attention(qs, ks, vs, layout, **options)
        for part, length in ((prefix, 3), (suffix, 2)):
            if part.shape != (1, length, heads, head_dim_v):
                raise ValueError(
                    f"attn_func must return (b, seq, Hq, DV), here {(1, length, heads, head_dim_v)}"
                    f", got {tuple(part.shape)}"
                )
        error = float((torch.cat([prefix[0], suffix[0]]) - ours).abs().max() / ours.abs().max())
    if not error <= math.sqrt(torch.finfo(q.dtype).eps):
        raise ValueError(
            f"attn_func computes something else than causal attention with {options}: a relative "
            f"difference of {error:.1e} on a few tokens. It is not called: pass its scale, softcap "
            f"or sliding_window to forward by name; dropout can't be served"
        )
    _probed.add(key)


def _accepted(function: AttentionFunction, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function has names for: it may close over the others."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # not written in Python
        return kwargs
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}


class _Same:
    """An object by its identity, without keeping it alive: gone, it is equal to nothing."""

    def __init__(self, x: Any) -> None:
        self.ref = weakref.ref(x)
        self.number = id(x)

    def __eq__(self, other: object) -> bool:
        x = self.ref()
        return isinstance(other, _Same) and x is not None and x is other.ref()

    def __hash__(self) -> int:
        return self.number


def _identity(function: Any) -> Any:
    """What tells attention functions apart: their code, and the values that it can read.

    Raises:
        TypeError: if it holds something whose identity can't be kept.
    """
    if isinstance(function, functools.partial):
        bound = (*function.args, *sorted(function.keywords.items()))
        return _identity(function.func), _value(bound)
    code = getattr(function, "__code__", None)
    if code is None:
        return _value(function)
    names = function.__globals__
    read = (
        getattr(function, "__self__", None),
        function.__defaults__,
        tuple(sorted((function.__kwdefaults__ or {}).items())),
        tuple(_contents(cell) for cell in function.__closure__ or ()),
        tuple(x for x in map(names.get, code.co_names) if isinstance(x, SCALARS)),
    )
    return _Same(code), _value(read)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _value(x: Any) -> Any:
    """Numbers and names by value; everything else by identity and by its numbers and names."""
    if isinstance(x, SCALARS):
        return repr(x)
    if isinstance(x, (tuple, list)):
        return tuple(map(_value, x))
    if isinstance(x, dict):
        return tuple((_value(name), _value(y)) for name, y in x.items())
    held = getattr(x, "__dict__", {}).items()
    return _Same(x), tuple((name, repr(y)) for name, y in held if isinstance(y, SCALARS))
