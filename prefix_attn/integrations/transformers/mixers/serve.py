"""Runs the mixers of an enabled decoder along the tree of its packed row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from prefix_attn.integrations.transformers.attention import (
    ROW_KEYWORDS,
    LazyMask,
    PackedMask,
    followed,
)
from prefix_attn.integrations.transformers.code_names import code_names
from prefix_attn.integrations.transformers.decoder import Weak
from prefix_attn.integrations.transformers.mixers.find import find_mixers
from prefix_attn.integrations.transformers.mixers.functions import FUNCTIONS, MASK, running, watch
from prefix_attn.layout import PrefixLayout
from prefix_attn.recurrence import whole_sequences

# What tells mixers where the sequences of a row begin: the layout says it instead.
BOUNDS = frozenset({*ROW_KEYWORDS, "seq_idx"})

# Projections of a mixer whose input no longer depends on what its padding was projected to.
BEHIND_FUNCTIONS = frozenset({"dt_proj", "o_proj", "out_proj"})
# What mixers call with their input and the mask.
ZERO_PADDING = "apply_mask_to_padding_states"


class PackedRun(threading.local):
    """Whose packed row runs in this thread.

    Attributes:
        mixers: those of the decoder, None while no packed row runs.
    """

    mixers: Mixers | None = None


packed_run = PackedRun()


class Mixers:
    """The mixers of one decoder.

    Attributes:
        served: how each runs on a packed row, by its name in the decoder.
    """

    def __init__(self, decoder: torch.nn.Module) -> None:
        self.served: dict[str, str] = {}
        self._modules: list[Weak] = []
        self._ran: set[str] = set()  # in the packed row that runs
        for mixer in list(find_mixers(decoder)):
            for name in FUNCTIONS:
                _watch(mixer.module, name)
            how = ", ".join(mixer.functions)
            how = f"{how} along the tree" if how else "whole sequences"
            self.served[mixer.name] = f"{type(mixer.module).__name__}: {how}"
            state = _Served(self, mixer.name, mixer.functions, mixer.module.__dict__.get("forward"))
            mixer.module._prefix_attn_mixer = state  # type: ignore[assignment]
            mixer.module.forward = partial(_forward, Weak(mixer.module))
            self._modules.append(Weak(mixer.module))
        if self.served:
            _watch(decoder, MASK)

    def check(self) -> None:
        """Refuses to undo what something else was built upon.

        Raises:
            RuntimeError: if the forward of a mixer was replaced since.
        """
        for reference in self._modules:
            if not _is_ours(reference.module):
                raise RuntimeError(
                    f"the forward of {type(reference.module).__name__} was replaced after enable: "
                    "undo that first"
                )

    def remove(self) -> None:
        """Gives every mixer its own forward back."""
        for reference in self._modules:
            module = reference.module
            state: _Served = module._prefix_attn_mixer
            del module.forward, module._prefix_attn_mixer
            if state.forward is not None:
                module.forward = state.forward

    @contextmanager
    def packed(self, layout: PrefixLayout) -> Iterator[None]:
        """Around the decoder's forward on a packed row: every mixer must get its layout.

        Raises:
            RuntimeError: if one ran without.
        """
        if isinstance(layout, PrefixLayout):  # else attention says what is wrong
            followed.add(layout)
        before, packed_run.mixers = packed_run.mixers, self
        self._ran.clear()
        try:
            yield
        finally:
            packed_run.mixers = before
        for name, reference in zip(self.served, self._modules, strict=True):
            if name not in self._ran and not _is_ours(reference.module):
                raise RuntimeError(
                    f"{name} ({type(reference.module).__name__}) did not follow the prefix tree: "
                    "its forward was replaced after enable. Replace it first, then call "
                    "prefix_attn.enable(model)"
                )

    def projects_with_bias(self) -> bool:
        """Whether a bias reaches what mixers remember: ordinary batches then read left padding.

        Models set padding to zero in front of the projections, and not behind them. What comes
        behind the functions of sequences sees each token alone.
        """
        return any(
            isinstance(getattr(part, "bias", None), Tensor)
            for reference in self._modules
            for child, projection in reference.module.named_children()
            if child not in BEHIND_FUNCTIONS
            for part in projection.modules()
            if hasattr(part, "in_features")
        )

    def reads_padding_of_one_row(self) -> bool:
        """Whether transformers sets padding to zero in batches of several rows alone.

        Its versions differ, so its function is asked.
        """
        row = torch.ones(1, 2, 1, device="cpu")
        mask = torch.tensor([[0, 1]], device="cpu")  # left padding
        for reference in self._modules:
            where = code_names(reference.module).module_of(ZERO_PADDING)
            zero_padding = getattr(where, ZERO_PADDING, None)
            if zero_padding is not None and bool(zero_padding(row, mask)[0, 0, 0]):
                return True
        return False

    def note(self, name: str) -> None:
        """Notes that a mixer ran with its layout."""
        self._ran.add(name)


class _Served:
    """What is kept on a mixer."""

    def __init__(
        self,
        mixers: Mixers,
        name: str,
        functions: tuple[str, ...],
        forward: Callable[..., Any] | None,
    ) -> None:
        self.mixers = mixers
        self.name = name
        self.functions = functions
        self.forward = forward  # set on the instance before enable


def _watch(module: torch.nn.Module, name: str) -> None:
    where = code_names(module).module_of(name)
    if getattr(where, name, None) is not None:
        assert where is not None
        watch(where, name)


def _is_ours(module: torch.nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "func", None) is _forward


@torch.compiler.disable(recursive=False)
def _forward(mixer: Weak, *args: Any, **kwargs: Any) -> Any:
    """A mixer's forward after `enable`."""
    self = mixer.module
    state: _Served = self._prefix_attn_mixer
    original = state.forward or MethodType(type(self).forward, self)
    layout, args, kwargs = _take_layout(args, kwargs)
    if layout is None:
        if packed_run.mixers is state.mixers:
            raise RuntimeError(
                f"{state.name} ({type(self).__name__}) got no prefix_layout in a packed row: the "
                "modules around it drop the keyword and the mask. Call prefix_attn.disable(model)"
            )
        return original(*args, **kwargs)
    state.mixers.note(state.name)
    if not state.functions:
        return _run_whole(original, layout, args, kwargs)
    missing, out = _run_along(original, state.functions, layout, args, kwargs)
    if missing:
        raise RuntimeError(
            f"{state.name} ({type(self).__name__}) did not call {', '.join(missing)}, so it did "
            "not follow the prefix tree: other code runs in its place. Call "
            "prefix_attn.disable(model)"
        )
    return out


# Compiled code would keep what `running` said when it was traced.


@torch.compiler.disable
def _run_along(
    original: Callable[..., Any],
    functions: tuple[str, ...],
    layout: PrefixLayout,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[list[str], Any]:
    """Runs a mixer whose functions follow the tree; returns those that it did not call, too."""
    before = running.layout, running.called
    running.layout, running.called = layout, frozenset()
    try:
        out = original(*args, **kwargs)
        return sorted(set(functions) - running.called), out
    finally:
        running.layout, running.called = before


@torch.compiler.disable
def _take_layout(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[PrefixLayout | None, tuple[Any, ...], dict[str, Any]]:
    """The layout that came as a keyword or within a mask, and the arguments without it.

    Both survive recomputation, as nothing around the call would.
    """
    layout = kwargs.get("prefix_layout")
    for value in (*args, *kwargs.values()):
        if layout is None and isinstance(value, (PackedMask, LazyMask)):
            layout = value.layout
    if layout is None:
        return None, args, kwargs
    left_out = BOUNDS | {"prefix_layout"}
    kept = {name: value for name, value in kwargs.items() if name not in left_out}
    return layout, tuple(map(_unmasked, args)), {n: _unmasked(x) for n, x in kept.items()}


def _unmasked(value: Any) -> Any:
    """A packed row has no padding."""
    return None if isinstance(value, (PackedMask, LazyMask)) else value


@torch.compiler.disable
def _run_whole(
    original: Callable[..., Any],
    layout: PrefixLayout,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Runs a mixer on whole sequences: tensors (1, T, ...) become (N, L, ...) and come back."""
    values, structure = tree_flatten((args, kwargs))
    tokens = (1, layout.num_tokens)
    moved = [i for i, x in enumerate(values) if isinstance(x, Tensor) and x.shape[:2] == tokens]
    outs: list[Any] = []
    returned: list[int] = []
    structure_out: Any = None

    def run(parts: Any) -> tuple[Tensor, ...]:
        nonlocal structure_out
        for i, part in zip(moved, parts, strict=True):
            values[i] = part
        given, named = tree_unflatten(values, structure)
        flat, structure_out = tree_flatten(original(*given, **named))
        shape = parts[0].shape[:2]
        outs.extend(flat)
        returned.extend(
            i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.shape[:2] == shape
        )
        return tuple(flat[i] for i in returned)

    rows = whole_sequences(run, [values[i][0] for i in moved], layout)
    for i, x in zip(returned, rows, strict=True):
        outs[i] = x[None]
    return tree_unflatten(outs, structure_out)
