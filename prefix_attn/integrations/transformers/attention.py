"""Shared-prefix attention as an attention implementation of transformers.

Importing this module registers two names for `attn_implementation`. Both run `prefix_attention`
for a packed row whose layout arrives as the keyword `prefix_layout`. For every other call, such as
generation and padded batches, "prefix_attn" runs transformers' "sdpa" and "prefix_attn_eager" the
model's own eager attention, with the same bits.

Keyword arguments of the model reach every attention layer through wrappers, checkpointing and
recomputation. A context variable would not: recomputation runs after the context has ended.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefix_attn.api import prefix_attention
from prefix_attn.integrations import OLDEST_TRANSFORMERS
from prefix_attn.integrations.transformers.blocks import (
    AND,
    BLOCKS,
    CAUSAL,
    OR,
    REMAPPED,
    SEVERAL,
    WINDOW,
)
from prefix_attn.integrations.transformers.code_names import closure_of
from prefix_attn.integrations.transformers.labels import check_labels, serve_labels
from prefix_attn.layout import PrefixLayout
from prefix_attn.micro import PassLayout
from prefix_attn.shards import RowShard

if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"transformers {transformers.__version__} is older than {OLDEST_TRANSFORMERS}, the oldest "
        "that prefix_attn serves",
        name="transformers",
    )

# transformers looks for "flash", "sdpa" and "flex_attention" inside names: these hold none.
SDPA_NAME = "prefix_attn"
EAGER_NAME = "prefix_attn_eager"

# Keywords that tell flash attention where the sequences of a row lie: a layout says the same.
ROW_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

# Tensors that models hand to attention and that do not change its result.
HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "num_items_in_batch",
        "labels",
        "shift_labels",
    }
)

# Types of layers with mixers that read a row in order, alone or beside attention.
MIXER_LAYER_TYPES = frozenset(
    {"linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding"}
)

# Layouts that mixers follow: those with which an enabled decoder ran.
followed: weakref.WeakSet[PrefixLayout] = weakref.WeakSet()

# Mask functions of transformers that a layout stands for, by name: chunks are told by local_size.
LAYOUT_RULES = frozenset({CAUSAL, WINDOW, SEVERAL, "chunked_overlay.<locals>.inner_mask"})

RANGE = (
    "has rotary frequencies that depend on the largest position of the batch, which no rank sees "
    '(rope_type "dynamic" or "longrope")'
)


class MaskMaking(threading.local):
    """How this thread makes masks.

    Attributes:
        at_once: the batch is known to run as it is, so its masks are built when they are asked for
            and not by the first layer that needs one: layers may be compiled one by one.
    """

    at_once: bool = False


mask_making = MaskMaking()


class PackedMask:
    """Stands in the place of attention_mask in the call of a packed row.

    It takes the layout into the masks that the model makes from it, and so to the attention of
    models that drop unknown keywords; and to no other model that runs meanwhile.
    """

    ndim = 4  # a 2-D mask would be cast

    def __init__(
        self,
        layout: PrefixLayout | RowShard,
        *,
        says_who_sees_whom: bool = False,
        harmless: frozenset[str] = HARMLESS,
    ) -> None:
        """Takes what the attention of a packed row needs.

        Args:
            layout: of the row, or the rows of it that this rank runs.
            says_who_sees_whom: whether it stands for a mask that says more than causality.
            harmless: keywords of the row that may reach attention and do not change its result.
        """
        self.layout = layout
        self.says_who_sees_whom = says_who_sees_whom
        self.harmless = harmless
        rows = rows_under(layout)
        self.shape = (1, 1, rows, rows)

    def __eq__(self, other: object) -> Any:
        """Not all ones: so the mask is handed on to mixers by models that ask for padding so."""
        return torch.tensor(False) if isinstance(other, int) else self is other

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"the model reads {name!r} of its attention mask, which a packed row does not have: "
            "call prefix_attn.disable(model)"
        )


class LazyMask:
    """What a mask would be built from: a packed row never needs its T x T mask.

    Attributes:
        arguments: the keyword arguments with which transformers asked for the mask.
        fallback: "sdpa" or "eager", whose mask it stands for.
        layout: that of the packed row for which the mask was asked, if `enable` runs one.
        harmless: see `PackedMask`.
    """

    ndim = 4  # generation with a static cache prepares masks outside the model and passes them in

    def __init__(
        self,
        arguments: dict[str, Any],
        fallback: str,
        layout: PrefixLayout | RowShard | None,
        harmless: frozenset[str] = HARMLESS,
    ) -> None:
        self.arguments = arguments
        self.fallback = fallback
        self.layout = layout
        self.harmless = harmless
        # Code that is compiled can't read the function: it is read when eager code asks.
        self._adds_rules = None if torch.compiler.is_compiling() else _adds_rules(arguments)
        self._call_checked = False
        self._built: tuple[Tensor | None] | None = None

    @property
    def adds_rules(self) -> bool:
        """Whether more may be seen, or less, than the causal mask, its window and padding say."""
        return _adds_rules(self.arguments) if self._adds_rules is None else self._adds_rules

    def build(self) -> Tensor | None:
        """Returns the mask of the fallback, built once for all layers."""
        # `cached_property` takes a lock before Python 3.12, which torch.compile can't trace.
        if self._built is None:
            self._built = (ALL_MASK_ATTENTION_FUNCTIONS[self.fallback](**self.arguments),)
        return self._built[0]

    def contiguous(self) -> Tensor | None:
        """The mask itself, for generation that prepares it outside the model."""
        return self.build()

    def __getitem__(self, index: Any) -> Any:
        """Slices the mask, as some models do; slices that keep everything keep it lazy."""
        length = self.arguments["kv_length"]
        parts = index if isinstance(index, tuple) else (index,)
        if all(
            part is Ellipsis
            or (
                isinstance(part, slice)
                and part.start in (None, 0)
                and part.step in (None, 1)
                and (part.stop is None or part.stop >= length)
            )
            for part in parts
        ):
            return self
        if self.layout is not None:
            raise NotImplementedError(
                f"the model slices its attention mask ({index}), which a packed row does not have"
            )
        mask = ALL_MASK_ATTENTION_FUNCTIONS[self.fallback](
            **{**self.arguments, "allow_is_causal_skip": False}
        )
        return mask[index]

    @property
    def window(self) -> int | None:
        """Keys that a query sees, itself included, as sdpa has them: layers may name others."""
        return self.arguments.get("local_size")

    def why_not(self, named: int | None) -> str | None:
        """The reason why a layout can't stand for this mask, or None.

        Args:
            named: the sliding window that the attention layer names.
        """
        asked = self.arguments
        if "allow_is_bidirectional_skip" in asked:
            return "its attention is bidirectional"
        if asked.get("attention_mask") is not None:
            return (
                "a 2-D attention_mask came together with a prefix_layout; a packed row has no "
                "padding, pass attention_mask=None"
            )
        if self.adds_rules:
            return "it adds rules of its own to the causal mask"
        config = asked.get("config")
        windows: list[int | None] = [None, named]
        if getattr(config, "attention_chunk_size", None) is None:
            windows.append(getattr(config, "sliding_window", None))
        if self.window not in windows:
            return (
                f"its mask is local ({self.window} tokens) but its attention names a "
                f"sliding_window of {named}: chunked attention is not supported"
            )
        return None

    def check_call(
        self, module: torch.nn.Module, position_ids: Any, layout: PrefixLayout | RowShard
    ) -> None:
        """Checks the labels and positions that came with a layout, once for all layers.

        Refused are labels that would be paired with the wrong rows, and positions that do not
        count on along every path.

        Args:
            module: the attention layer.
            position_ids: as the layer has them: one for each row of the layout, or something that
                can't be checked.
            layout: that the caller passed.
        """
        if self._call_checked:
            return
        self._call_checked = True
        check_labels(module)
        if not isinstance(position_ids, Tensor) or position_ids.shape != (1, rows_under(layout)):
            return
        if isinstance(layout, RowShard):
            before = layout.places[layout.layout.predictor_index]
            after = layout.places[layout.layout.target_index]
            here = (before >= 0) & (after >= 0)  # other ranks have the other rows
            before, after = before[here], after[here]
        else:
            before, after = layout.predictor_index, layout.target_index
        steps = position_ids[0, after] - position_ids[0, before]
        if not bool((steps == 1).all()):
            raise ValueError(
                "position_ids must grow by one along every path of the prefix_layout: pass "
                "position_ids=layout.position_ids[None]"
            )


def rows_under(layout: PrefixLayout | RowShard) -> int:
    """Rows that a model runs at a time: of a shard those of one rank."""
    return layout.num_rows if isinstance(layout, RowShard) else layout.num_tokens


def _adds_rules(arguments: dict[str, Any]) -> bool:
    if "allow_is_bidirectional_skip" in arguments:
        return True
    function = arguments.get("mask_function")
    if function is None or torch.compiler.is_compiling():
        return bool(arguments.get("use_vmap"))
    return _function_adds_rules(function)


def _function_adds_rules(function: Callable[..., Any]) -> bool:
    """Looks through the closures that transformers combines mask functions with."""
    if not inspect.isfunction(function) or function.__module__ != masking_utils.__name__:
        return True
    name, bound = function.__qualname__, closure_of(function)
    if name in (AND, OR):
        return any(_function_adds_rules(part) for part in bound["mask_functions"])
    if name == REMAPPED:
        return _function_adds_rules(bound["mask_function"])
    if name == BLOCKS:  # images that see all of themselves
        return bool((bound["block_sequence_ids"] >= 0).any())
    return name not in LAYOUT_RULES


def splits_rows(mask: LazyMask) -> bool:
    """Whether transformers found several sequences in the rows for which it asked this mask."""
    functions = [mask.arguments.get("mask_function")]
    while functions:
        function = functions.pop()
        if inspect.isfunction(function):
            if function.__qualname__ == SEVERAL:
                return True
            cells = closure_of(function).values()
            functions += [part for x in cells for part in (x if isinstance(x, tuple) else (x,))]
    return False


def _make_mask(fallback: str, **arguments: Any) -> LazyMask | PackedMask | Tensor | None:
    """Stands in for transformers' mask functions, which are called by keyword."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, LazyMask):
        return mask
    if isinstance(mask, PackedMask):
        if mask.says_who_sees_whom:
            return mask
        return LazyMask({**arguments, "attention_mask": None}, fallback, mask.layout, mask.harmless)
    if arguments["q_length"] == arguments["kv_length"] and arguments["q_length"] > 1:
        made = LazyMask(arguments, fallback, None)
        if mask_making.at_once:
            made.build()
        return made
    return ALL_MASK_ATTENTION_FUNCTIONS[fallback](**arguments)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | PackedMask | Tensor | None,
    *,
    fallback: str,
    prefix_layout: PrefixLayout | RowShard | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Runs one attention layer: `prefix_attention` under a layout, else the fallback.

    Args:
        module: the attention layer.
        query: (B, Hq, T, D).
        key: (B, Hkv, T, D), not repeated.
        value: (B, Hkv, T, DV).
        attention_mask: what `_make_mask` returned.
        fallback: "sdpa" or "eager".
        prefix_layout: that of the packed row, or the part of it that this rank runs.
        **options: what else the layer hands over.

    Returns:
        `(out, weights)`: out (B, T, Hq, DV); the weights only if eager attention gives them.
    """
    if isinstance(attention_mask, (LazyMask, PackedMask)) and attention_mask.layout is not None:
        # That of this type of layer; and models may drop unknown keyword arguments.
        prefix_layout = attention_mask.layout
    if prefix_layout is not None:
        return _attend_packed(module, query, key, value, attention_mask, prefix_layout, options)
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.build()
    assert not isinstance(attention_mask, PackedMask)  # it has a layout
    if fallback == "eager":
        attend = eager_attention_of(module)
    else:
        attend = ALL_ATTENTION_FUNCTIONS[fallback]
        for option, what in (("s_aux", "attention sinks"), ("softcap", "softcap")):
            if options.get(option) is not None:
                raise NotImplementedError(
                    f"{type(module).__name__} has {what}, which sdpa does not compute; use "
                    f"attn_implementation={EAGER_NAME!r} for calls without a prefix_layout"
                )
    return attend(module, query, key, value, attention_mask, **options)


def _attend_packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | PackedMask | Tensor | None,
    layout: PrefixLayout | RowShard,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    name = type(module).__name__
    window = options.pop("sliding_window", None)
    softcap, sinks = options.pop("softcap", None), options.pop("s_aux", None)
    scale, dropout = options.pop("scaling", None), options.pop("dropout", 0.0)
    if not isinstance(layout, (PrefixLayout, RowShard)):
        raise TypeError(f"prefix_layout must be a PrefixLayout, got {type(layout).__name__}")
    if isinstance(layout, PassLayout):  # of micro-groups: the keys of its prefixes are recorded
        key, value = layout.run.join(module, key, value)
    rows = rows_under(layout)
    queries = layout.num_queries if isinstance(layout, PrefixLayout) else rows
    if query.shape[0] != 1 or query.shape[2] != queries or key.shape[2] != rows:
        raise ValueError(
            f"the prefix_layout has {rows} tokens, so the row must have shape (1, {rows}); {name} "
            f"got queries {tuple(query.shape)} and keys {tuple(key.shape)} (batch, heads, tokens, "
            "dim). Caches are not supported. For slices of a row, as in sequence parallelism, pass "
            "prefix_layout=shard_rows(layout, group)"
        )
    if not torch.compiler.is_compiling():
        if isinstance(layout, RowShard):
            _check_parts(module)
        else:
            _check_mixers(module, layout)
    if dropout:
        raise ValueError(
            f"{name} has attention dropout {dropout} in training, which shared prefixes do not "
            "support: load the model with from_pretrained(..., attention_dropout=0.0), in some "
            "types attn_pdrop=0.0"
        )
    if options.get("position_bias") is not None:
        raise NotImplementedError(f"{name} adds a position bias, which is not supported")
    # Beside a mask transformers ignores `is_causal`.
    causal = options.get("is_causal") is not False or isinstance(attention_mask, LazyMask)
    harmless = HARMLESS
    if isinstance(attention_mask, (LazyMask, PackedMask)):
        harmless = attention_mask.harmless
    told = isinstance(attention_mask, PackedMask) and attention_mask.says_who_sees_whom
    if not told and not (causal and getattr(module, "is_causal", True)):
        raise NotImplementedError(f"{name} is not causal, which is not supported")
    if options.get("output_attentions"):
        raise NotImplementedError("attention weights (output_attentions) are not computed")
    for option, given in options.items():
        if isinstance(given, Tensor) and given.numel() > 1 and option not in harmless:
            raise NotImplementedError(f"{name} passes {option!r} to attention: not supported")
    if isinstance(attention_mask, LazyMask):
        reason = attention_mask.why_not(window)
        if reason is not None:
            raise ValueError(f"{name} can't run under a prefix_layout: {reason}")
        window = attention_mask.window
        if attention_mask.layout is None and not torch.compiler.is_compiling():
            attention_mask.check_call(module, options.get("position_ids"), layout)
    elif attention_mask is not None and not isinstance(attention_mask, PackedMask):
        raise ValueError(
            f"{name} got an attention mask of shape {tuple(attention_mask.shape)} together with "
            "a prefix_layout: pass attention_mask=None"
        )
    q, k, v = (_unit_stride(_as_autocast(x)[0].transpose(0, 1)) for x in (query, key, value))
    attend: Any = prefix_attention if isinstance(layout, PrefixLayout) else _attend_shard
    out = attend(
        q,
        k,
        v,
        layout,
        scale=None if scale is None else float(scale),
        window_size=None if window is None else int(window),
        softcap=softcap,
        sinks=sinks,
    )
    assert isinstance(out, Tensor)
    return out[None].contiguous(), None  # some models call view on it


@torch.compiler.disable
def _attend_shard(q: Tensor, k: Tensor, v: Tensor, shard: RowShard, **options: Any) -> Tensor:
    from prefix_attn.integrations.distributed import sharded_attention  # DTensor takes seconds

    return sharded_attention(q, k, v, shard, **options)


def mixer_layers_of(module: torch.nn.Module) -> list[str]:
    """The types of layers with mixers in the model to which an attention layer belongs."""
    types = getattr(getattr(module, "config", None), "layer_types", None) or ()
    return sorted(set(types) & MIXER_LAYER_TYPES)


def _check_mixers(module: torch.nn.Module, layout: PrefixLayout) -> None:
    """Refuses a layout that the model's mixers do not know of."""
    types = mixer_layers_of(module)
    if types and layout not in followed:
        raise NotImplementedError(
            f"{type(module).__name__} belongs to a model with {types} layers, which would ignore "
            "the prefix_layout: call prefix_attn.enable(model) first"
        )


def rope_reads_range(config: Any) -> bool:
    """Whether the rotary frequencies depend on the largest position in the batch."""
    text = repr(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    return "'dynamic'" in text or "'longrope'" in text


def _check_parts(module: torch.nn.Module) -> None:
    """Refuses the rows of one rank where a layer of the model needs them all."""
    types = mixer_layers_of(module)
    if types or rope_reads_range(getattr(module, "config", None)):
        why = f"has {types} layers, which read a row in order" if types else RANGE
        raise NotImplementedError(
            f"{type(module).__name__} can't run under a RowShard: its model {why}"
        )


def _as_autocast(x: Tensor) -> Tensor:
    """Casts as autocast does for PyTorch's own attention."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def eager_attention_of(module: torch.nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention of the file that defines a layer.

    Raises:
        NotImplementedError: if it has none.
    """
    for cls in type(module).__mro__:  # sharding puts classes of its own in front
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise NotImplementedError(f"{type(module).__name__} has no eager attention to fall back to")


for _name, _fallback in ((SDPA_NAME, "sdpa"), (EAGER_NAME, "eager")):
    AttentionInterface.register(_name, partial(_attend, fallback=_fallback))
    AttentionMaskInterface.register(_name, partial(_make_mask, _fallback))
serve_labels(frozenset({SDPA_NAME, EAGER_NAME}))
