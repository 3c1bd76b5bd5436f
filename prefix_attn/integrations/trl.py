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
from typing import Any, ClassVar

import numpy as np
import torch
import trl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefix_attn.integrations.transformers.attention import SDPA_NAME
from prefix_attn.integrations.transformers.micro_groups import MicroGroups, micro_groups
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


def serve_tree_attention() -> None:
    """Makes `prefix_attention` the attention of TRL's AsyncGRPO. Call it before the trainer.

    AsyncGRPO packs the samples of a micro-batch into a prefix trie and selects its attention by
    name. Its own function gathers the keys and values of every path, once per segment and layer,
    for FlashAttention 3; `tree_attention` takes its place under that name.

    Raises:
        NotImplementedError: if this version of TRL does not pack as this function expects.
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
    packing.tree_attention = tree_attention
    packing.register_tree_attention()


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_kv_index: Tensor,
    tree_cu_seqlens_q: Tensor,
    tree_cu_seqlens_k: Tensor,
    tree_max_seqlen_q: int | None = None,
    tree_max_seqlen_k: int | None = None,
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
        **options: scaling, sliding_window, softcap, s_aux and what else the layer hands over.

    Returns:
        `(out, None)`, out (1, T, Hq, DV).
    """
    layout = tree_layout(tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k)
    attend = ALL_ATTENTION_FUNCTIONS[SDPA_NAME]
    return attend(module, query, key, value, attention_mask, prefix_layout=layout, **options)


@dataclass(frozen=True, eq=False)
class _KnownLayout:
    """A layout, and the tensors that it was made from besides its key `tree_kv_index`."""

    cu_seqlens: tuple[weakref.ref[Tensor], weakref.ref[Tensor]]
    versions: tuple[int, ...]
    layout: PrefixLayout

    def is_of(self, *tensors: Tensor) -> bool:
        """Whether the same tensors come again, not written to since."""
        same = all(a() is b for a, b in zip(self.cu_seqlens, tensors[1:], strict=True))
        return same and self.versions == tuple(x._version for x in tensors)


_known_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the identity of tree_kv_index


@torch.compiler.disable
def tree_layout(kv_index: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> PrefixLayout:
    """The layout of a trie that TRL packed; made once per batch, for all layers.

    Args:
        kv_index: (K,) the packed rows on the path of every segment, root first, end to end.
        cu_seqlens_q: (S + 1,) first row of each segment, and T.
        cu_seqlens_k: (S + 1,) where the path of each segment starts in `kv_index`, and K.

    Raises:
        ValueError: naming the segment whose path is not its parent's path and its own rows.
    """
    tensors = (kv_index, cu_seqlens_q, cu_seqlens_k)
    known: _KnownLayout | None = _known_layouts.get(kv_index)
    if known is None or not known.is_of(*tensors):
        ends = np.cumsum([x.numel() for x in tensors])
        host = torch.cat([x.long() for x in tensors]).cpu().numpy()  # the one copy to the host
        known = _KnownLayout(
            cu_seqlens=(weakref.ref(cu_seqlens_q), weakref.ref(cu_seqlens_k)),
            versions=tuple(x._version for x in tensors),
            layout=_layout_of_paths(*np.split(host, ends[:2])).to(kv_index.device),
        )
        _known_layouts[kv_index] = known
    return known.layout


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
