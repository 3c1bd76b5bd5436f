"""What TRL's trainers need beyond `prefix_attn.enable(model)`.

`KeepGroupsMixin` keeps the completions of one prompt in one micro-batch, where they can share it.
`MicroGroupsMixin` shares it among all micro-batches of a step, which may hold less than a group.
`serve_tree_attention` runs the prefix tries of AsyncGRPO in `prefix_attention`.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import numpy as np
import torch
import trl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefix_attn.integrations.transformers.attention import (
    SDPA_NAME,
    PackedMask,
    followed,
    mixer_layers_of,
)
from prefix_attn.integrations.transformers.decoder import Weak, decoder_of
from prefix_attn.integrations.transformers.micro_groups import MicroGroups, micro_groups
from prefix_attn.integrations.transformers.mixers import Mixers
from prefix_attn.integrations.transformers.refusals import refuse_unsupported
from prefix_attn.layout import PrefixLayout

TREE_ARGUMENTS = {
    "tree_kv_index",
    "tree_cu_seqlens_q",
    "tree_cu_seqlens_k",
    "tree_max_seqlen_q",
    "tree_max_seqlen_k",
}


class KeepGroupsMixin:
    """Makes a TRL trainer shuffle whole groups before it cuts its rollouts into micro-batches.

    TRL shuffles samples, which scatters the completions of one prompt over the micro-batches. Put
    this class in front of a trainer that draws several completions of a prompt, GRPO or RLOO:

        class Trainer(KeepGroupsMixin, GRPOTrainer):
            pass

    Which samples are drawn and how they are scored stays the same. Samples of one optimizer step
    stay together if `steps_per_generation` equals `gradient_accumulation_steps`, as it does by
    default; if it is larger, groups rather than samples are dealt to the optimizer steps.

    Raises:
        NotImplementedError: if this version of TRL does not shuffle as this class expects.
        ValueError: if micro-batches can't hold whole groups, or equal parts of one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._shuffling_function()
        super().__init__(*args, **kwargs)
        size, group = self.args.per_device_train_batch_size, self.num_generations  # type: ignore[attr-defined]
        if size % group and group % size:
            raise ValueError(
                f"per_device_train_batch_size {size} is neither a multiple nor a divisor of "
                f"num_generations {group}: groups would be cut across micro-batches"
            )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        names = self._shuffling_function().__globals__
        shuffle_samples = names["shuffle_sequence_dict"]
        names["shuffle_sequence_dict"] = shuffle_groups
        try:
            return super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        finally:
            names["shuffle_sequence_dict"] = shuffle_samples

    def _shuffling_function(self) -> Callable[..., Any]:
        """The trainer's own `_prepare_inputs`, which must shuffle samples and then split them."""
        function = inspect.unwrap(super()._prepare_inputs.__func__)  # type: ignore[misc]
        steps = ("_generate_and_score_completions", "shuffle_sequence_dict", "split_tensor_dict")
        known = set(steps) <= set(function.__code__.co_names)
        if not known or "shuffle_sequence_dict" not in function.__globals__:
            raise NotImplementedError(
                f"KeepGroupsMixin does not know {function.__qualname__} of TRL {trl.__version__}: "
                f"it should call {', '.join(steps)}. Train without the mixin: the results are "
                "right, only fewer prompts are shared within a micro-batch"
            )
        return function


class MicroGroupsMixin(KeepGroupsMixin):
    """Makes a TRL trainer run each prompt once for all micro-batches of an optimizer step.

    The micro-batches of a step are announced to `prefix_attn.micro_groups`. So a micro-batch may
    hold less than a group, and the memory of a step does not grow with the group. Put this class
    in front of GRPO or RLOO, and enable the trainer's model before `train`:

        class Trainer(MicroGroupsMixin, GRPOTrainer):
            pass

    Attributes:
        micro_group_options: keyword arguments of `micro_groups`, such as `{"offload": True}`.
    """

    micro_group_options: ClassVar[dict[str, Any]] = {}
    _micro_groups: MicroGroups | None = None
    _left_in_block = 0  # micro-batches
    _left_in_step = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch; the last one that was announced ends the block of `micro_groups`."""
        try:
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self._end_micro_groups(*sys.exc_info())
            raise
        self._left_in_block -= 1
        self._left_in_step -= 1
        if not self._left_in_block:
            self._end_micro_groups()
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._micro_groups is None:  # type: ignore[attr-defined]
            announced = self._announced()
            run = micro_groups(self.model_wrapped, announced, **self.micro_group_options)  # type: ignore[attr-defined]
            self._micro_groups, self._left_in_block = run.__enter__(), len(announced)
        return inputs

    def _announced(self) -> list[dict[str, Tensor]]:
        """The micro-batches that are left of this optimizer step, up to the next generation."""
        trainer: Any = self
        self._left_in_step = self._left_in_step or trainer.current_gradient_accumulation_steps
        step, every = trainer._step, trainer.args.steps_per_generation
        left = every * trainer.num_iterations - step % (every * trainer.num_iterations)
        count = min(self._left_in_step, left)
        batches = [trainer._buffered_inputs[(step + i) % every] for i in range(count)]
        return [
            {
                "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                "attention_mask": torch.cat(
                    [batch["prompt_mask"], batch["completion_mask"]], dim=1
                ),
            }
            for batch in batches
        ]

    def _end_micro_groups(self, *error: Any) -> None:
        run, self._micro_groups = self._micro_groups, None
        if error:
            self._left_in_step = 0
        if run is not None:
            run.__exit__(*(error or (None, None, None)))


def shuffle_groups(batch: dict[str, Any]) -> dict[str, Any]:
    """Shuffles runs of samples with one prompt; the samples of a run keep their order.

    Args:
        batch: what TRL's `shuffle_sequence_dict` takes, with `prompt_ids` and `prompt_mask`
            (N, P). Other entries are tensors (N, ...), scalars, lists of N, or None.

    Raises:
        NotImplementedError: if the batch has no prompts to tell groups apart by.
    """
    missing = [name for name in ("prompt_ids", "prompt_mask") if batch.get(name) is None]
    if missing:
        raise NotImplementedError(
            f"KeepGroupsMixin does not know the batches of TRL {trl.__version__}: no "
            f"{' and no '.join(missing)} among {sorted(batch)}"
        )
    prompts = torch.stack([batch["prompt_ids"], batch["prompt_mask"]]).cpu()
    begins = torch.ones(prompts.shape[1], dtype=torch.bool)
    begins[1:] = (prompts[:, 1:] != prompts[:, :-1]).any(2).any(0)
    run = begins.cumsum(0) - 1
    rank = torch.randperm(int(begins.sum()))
    order = torch.argsort(rank[run], stable=True)

    def permute(x: Any) -> Any:
        if x is None or (isinstance(x, Tensor) and x.ndim == 0):
            return x
        return x[order.to(x.device)] if isinstance(x, Tensor) else [x[i] for i in order]

    return {name: permute(x) for name, x in batch.items()}


# ---- prefix tries of AsyncGRPO ----------------------------------------------------------------


def serve_tree_attention(
    model: torch.nn.Module | None = None, *, mixers_follow: bool = False
) -> None:
    """Makes `prefix_attention` the attention of TRL's AsyncGRPO. Call it before the trainer.

    AsyncGRPO packs the samples of a micro-batch into a prefix trie and selects its attention by
    name. Its own function gathers the keys and values of every path, once per segment and layer,
    for FlashAttention 3; `tree_attention` takes its place under that name.

    Args:
        model: one with recurrent, linear-attention or convolutional mixers, which then follow the
            trie as they do in `prefix_attn.enable`. Models of attention alone need not be named.
        mixers_follow: another package makes such mixers follow the trie, so they are not refused.

    Raises:
        NotImplementedError: if this version of TRL does not pack as this function expects, or if
            the model's layers would be wrong on a packed row.
        ValueError: if the model is enabled: its rows are packed already.
    """
    try:
        from trl.experimental.async_grpo import packing

        theirs = inspect.signature(packing.tree_attention).parameters
        ready = set(theirs) >= TREE_ARGUMENTS and callable(packing.register_tree_attention)
    except (ImportError, AttributeError):
        ready = False
    if not ready:
        raise NotImplementedError(
            f"serve_tree_attention does not know TRL {trl.__version__}: "
            "trl.experimental.async_grpo.packing should define register_tree_attention and "
            f"tree_attention(..., {', '.join(sorted(TREE_ARGUMENTS))})"
        )
    if model is not None:  # before anything changes, since it may be refused
        _serve_mixers(decoder_of(model))
    packing.tree_attention = (
        partial(tree_attention, mixers_follow=True) if mixers_follow else tree_attention
    )
    packing.register_tree_attention()


@dataclass
class _Tries:
    """What `serve_tree_attention` keeps on a decoder."""

    mixers: Mixers
    forward: Callable[..., Any] | None  # set on the instance before


def _serve_mixers(decoder: PreTrainedModel) -> None:
    if "_prefix_attn" in decoder.__dict__:
        raise ValueError(
            f"{type(decoder).__name__} is enabled, but AsyncGRPO packs rows itself: call "
            "prefix_attn.disable(model) first"
        )
    if "_prefix_attn_tries" in decoder.__dict__:
        return
    refuse_unsupported(decoder)
    tries: Any = _Tries(Mixers(decoder), decoder.__dict__.get("forward"))
    decoder._prefix_attn_tries = tries
    decoder.forward = partial(_forward_trie, Weak(decoder))


@torch.compiler.disable(recursive=False)
def _forward_trie(decoder: Weak, *args: Any, **kwargs: Any) -> Any:
    """A decoder's forward that hands the layout of a trie to mixers and attention."""
    self = decoder.module
    tries: _Tries = self._prefix_attn_tries
    original = tries.forward or MethodType(type(self).forward, self)
    if kwargs.get("tree_cu_seqlens_q") is None:
        return original(*args, **kwargs)
    layout = _layout_of_arguments(kwargs)
    with tries.mixers.packed(layout):
        packed = {"prefix_layout": layout, "attention_mask": PackedMask(layout)}
        return original(*args, **{**kwargs, **packed})


def _layout_of_arguments(arguments: dict[str, Any]) -> PrefixLayout:
    names = ("kv_index", "cu_seqlens_q", "cu_seqlens_k", "segment_parents", "segment_depths")
    return tree_layout(*(arguments.get(f"tree_{name}") for name in names))


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedMask | None,
    *,
    tree_kv_index: Tensor | None = None,
    tree_cu_seqlens_q: Tensor | None = None,
    tree_cu_seqlens_k: Tensor | None = None,
    tree_max_seqlen_q: int | None = None,
    tree_max_seqlen_k: int | None = None,
    tree_segment_parents: Tensor | None = None,
    tree_segment_depths: Tensor | None = None,
    prefix_layout: PrefixLayout | None = None,
    mixers_follow: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention along the paths of a trie: what TRL's function of this name computes.

    Args:
        module: the attention layer.
        query: (1, Hq, T, D).
        key: (1, Hkv, T, D).
        value: (1, Hkv, T, DV).
        attention_mask: None.
        tree_kv_index: see `tree_layout`.
        tree_cu_seqlens_q: see `tree_layout`.
        tree_cu_seqlens_k: see `tree_layout`.
        tree_max_seqlen_q: not needed.
        tree_max_seqlen_k: not needed.
        tree_segment_parents: see `tree_layout`.
        tree_segment_depths: see `tree_layout`.
        prefix_layout: of the trie, where the decoder knows it already.
        mixers_follow: recurrent mixers of the model follow the trie by other means.
        **options: scaling, sliding_window, softcap, s_aux and what else the layer hands over.

    Returns:
        `(out, None)`, out (1, T, Hq, DV).

    Raises:
        NotImplementedError: if the model has recurrent mixers that nobody serves.
    """
    layout = prefix_layout
    if layout is None:
        layout = tree_layout(
            tree_kv_index,
            tree_cu_seqlens_q,
            tree_cu_seqlens_k,
            tree_segment_parents,
            tree_segment_depths,
        )
    if mixers_follow:
        followed.add(layout)
    types = mixer_layers_of(module)
    if types and layout not in followed:
        raise NotImplementedError(
            f"{type(module).__name__} belongs to a model with {types} layers, which would mix the "
            "samples of a trie: call serve_tree_attention(model) with the model"
        )
    attend = ALL_ATTENTION_FUNCTIONS[SDPA_NAME]
    others = {name: x for name, x in options.items() if not name.startswith("tree_")}
    return attend(module, query, key, value, attention_mask, prefix_layout=layout, **others)


@dataclass(frozen=True, eq=False)
class _KnownLayout:
    """A layout, and the tensors that it was made from besides its key."""

    others: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    layout: PrefixLayout

    def is_of(self, *tensors: Tensor) -> bool:
        """Whether the same tensors come again, not written to since."""
        if len(tensors) != len(self.versions):
            return False
        same = all(a() is b for a, b in zip(self.others, tensors[1:], strict=True))
        return same and self.versions == tuple(x._version for x in tensors)


_known_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the identity of the first tensor


@torch.compiler.disable
def tree_layout(
    kv_index: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    parents: Tensor | None = None,
    depths: Tensor | None = None,
) -> PrefixLayout:
    """The layout of a trie that TRL packed; made once per batch, for all layers.

    The trie is told by `parents`, or else by the paths of all segments.

    Args:
        kv_index: (K,) the packed rows on the path of every segment, root first, end to end.
        cu_seqlens_q: (S + 1,) first row of each segment, and T.
        cu_seqlens_k: (S + 1,) where the path of each segment starts in `kv_index`, and K.
        parents: (S,) the segment that each one continues, -1 for roots; entries behind the first S
            are padding.
        depths: (S,) how many segments lie above each one: checked, if given with parents.

    Raises:
        ValueError: naming the segment whose path is not its parent's path and its own rows, or
            whose depth or path disagrees with its parent.
    """
    given = {
        "kv_index": kv_index,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "parents": parents,
        "depths": depths,
    }
    tensors = {name: x for name, x in given.items() if x is not None}
    if cu_seqlens_q is None or (parents is None and (kv_index is None or cu_seqlens_k is None)):
        raise ValueError(
            "a trie needs tree_cu_seqlens_q, and tree_segment_parents or both tree_kv_index and "
            f"tree_cu_seqlens_k; got {', '.join(tensors) or 'none of them'}"
        )
    first, *others = tensors.values()
    known: _KnownLayout | None = _known_layouts.get(first)
    if known is None or not known.is_of(first, *others):
        ends = np.cumsum([x.numel() for x in tensors.values()])
        flat = torch.cat([x.long().flatten() for x in tensors.values()])  # one copy to the host
        host = dict(zip(tensors, np.split(flat.cpu().numpy(), ends[:-1]), strict=True))
        if parents is not None:
            layout = _layout_of_parents(**host)
        else:
            paths = (host["kv_index"], host["cu_seqlens_q"], host["cu_seqlens_k"])
            layout = _layout_of_paths(*paths)
        known = _KnownLayout(
            others=tuple(weakref.ref(x) for x in others),
            versions=tuple(x._version for x in (first, *others)),
            layout=layout.to(cu_seqlens_q.device),
        )
        _known_layouts[first] = known
    return known.layout


def _layout_of_parents(
    cu_seqlens_q: np.ndarray,
    parents: np.ndarray,
    depths: np.ndarray | None = None,
    cu_seqlens_k: np.ndarray | None = None,
    kv_index: np.ndarray | None = None,
) -> PrefixLayout:
    lengths = np.diff(cu_seqlens_q)
    if len(parents) < len(lengths) or (depths is not None and len(depths) < len(lengths)):
        raise ValueError(
            f"tree_segment_parents and tree_segment_depths must have an entry for each of the "
            f"{len(lengths)} segments, got {len(parents)}"
            + ("" if depths is None else f" and {len(depths)}")
        )
    layout = PrefixLayout.from_tree(lengths.tolist(), parents[: len(lengths)].tolist())
    levels: list[int] = []
    tokens = layout.forest.depths + lengths  # on the path of each segment
    for i, parent in enumerate(layout.forest.parents.tolist()):
        levels.append(levels[parent] + 1 if parent >= 0 else 0)
        if depths is not None and depths[i] != levels[i]:
            raise ValueError(
                f"tree_segment_depths[{i}] must be {levels[i]}, one more than that of its parent "
                f"{parent}, got {depths[i]}"
            )
        if cu_seqlens_k is not None and cu_seqlens_k[i + 1] - cu_seqlens_k[i] != tokens[i]:
            raise ValueError(
                f"the path of segment {i} must hold {tokens[i]} rows, as its parent {parent} says, "
                f"got {cu_seqlens_k[i + 1] - cu_seqlens_k[i]}"
            )
    return layout


def _layout_of_paths(
    kv_index: np.ndarray, cu_seqlens_q: np.ndarray, cu_seqlens_k: np.ndarray
) -> PrefixLayout:
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            "tree_cu_seqlens_q and tree_cu_seqlens_k must have one entry per segment and one more, "
            f"got {len(cu_seqlens_q)} and {len(cu_seqlens_k)} entries"
        )
    lengths = np.diff(cu_seqlens_q)
    paths = np.split(kv_index, cu_seqlens_k[1:-1])
    parents = []
    for i, path in enumerate(paths):
        own = np.arange(cu_seqlens_q[i], cu_seqlens_q[i + 1])
        above = path[: len(path) - len(own)]
        # The segment of the last row above, if there is one.
        last = above[-1] if len(above) else -1
        parent = int(np.searchsorted(cu_seqlens_q, last, side="right")) - 1
        expected = own
        if 0 <= parent < i:
            expected = np.concatenate([paths[parent], own])
        if parent >= i or not np.array_equal(path, expected):
            raise ValueError(
                f"the path of segment {i} must be that of a segment before it and then the rows "
                f"{cu_seqlens_q[i]} to {cu_seqlens_q[i + 1] - 1} of its own, got {path.tolist()}"
            )
        parents.append(parent)
    return PrefixLayout.from_tree(lengths.tolist(), parents)
