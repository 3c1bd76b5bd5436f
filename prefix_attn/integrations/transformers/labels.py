"""The loss that transformers computes from `labels`, for rows that a `prefix_layout` packs.

transformers shifts labels by one along the row. In a packed row the last token of a prefix predicts
the first token of every continuation, and the last token of a segment may be followed by a token
that continues another one. So models that run under a layout get a loss function that pairs rows
and labels by the layout.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from functools import cache, partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForTokenClassification

from prefix_attn.layout import PrefixLayout
from prefix_attn.shards import RowShard

INSTEAD = (
    "leave labels out and take out.logits[0, layout.predictor_index] with "
    "labels[0, layout.target_index]"
)


def loss_over_layout(
    loss: Callable[..., Any],
    logits: Tensor,
    labels: Tensor | None,
    *arguments: Any,
    prefix_layout: PrefixLayout | RowShard | None = None,
    shift_labels: Tensor | None = None,
    **keywords: Any,
) -> Any:
    """Calls a loss of transformers; under a layout, with every label next to what predicts it.

    Args:
        loss: the model's loss function.
        logits: (1, T, V) under a layout.
        labels: (1, T) in the order of the packed row, those to be ignored -100. Tokens that start a
            sequence have no predecessor: their labels are not used.
        *arguments: what else the model hands over.
        prefix_layout: that of the packed row, if it is one.
        shift_labels: labels that the caller has paired with rows already: used as they are.
        **keywords: what else the model hands over.

    Raises:
        NotImplementedError: if the loss function can't take pairs, or the row is spread over ranks.
        ValueError: if logits or labels don't fit the layout.
    """
    if shift_labels is not None:
        keywords["shift_labels"] = shift_labels
    if prefix_layout is None or shift_labels is not None or loss is ForTokenClassification:
        return loss(logits, labels, *arguments, **keywords)
    if loss is not ForCausalLMLoss and "shift_labels" not in inspect.signature(loss).parameters:
        raise NotImplementedError(
            f"the loss function {_name_of(loss)} can't run under a prefix_layout, it takes no "
            f"shift_labels: {INSTEAD}"
        )
    if isinstance(prefix_layout, RowShard):
        raise NotImplementedError(
            "labels can't be paired with the rows of one rank: leave labels out and call "
            "prefix_attn.losses.packed_log_probs with the shard"
        )
    row = (1, prefix_layout.num_tokens)
    if labels is None or labels.shape != row or logits.shape[:2] != row:
        raise ValueError(
            f"labels under a prefix_layout need labels and logits of shape {row} (rows, tokens), "
            f"got {None if labels is None else tuple(labels.shape)} and "
            f"{tuple(logits.shape[:2])}"
        )
    pairs = labels.to(logits.device)[:, prefix_layout.target_index]
    return loss(
        logits[:, prefix_layout.predictor_index], None, *arguments, shift_labels=pairs, **keywords
    )


def check_labels(module: torch.nn.Module) -> None:
    """Refuses a running forward that has labels and won't hand its layout to the loss.

    Args:
        module: a layer of the model that runs; its model is looked up among the callers.

    Raises:
        NotImplementedError: naming the model.
    """
    frame: FrameType | None = sys._getframe(1)
    outermost: PreTrainedModel | None = None
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_locals.get("labels") is not None:
            model = frame.f_locals.get("self")
            if isinstance(model, PreTrainedModel) and any(m is module for m in model.modules()):
                outermost = model
        frame = frame.f_back
    if outermost is None:
        return
    loss = outermost.loss_function
    if isinstance(loss, partial):
        loss = loss.args[0]  # of loss_over_layout
    if loss is not ForTokenClassification and not _hands_layout_to_loss(type(outermost).forward):
        raise NotImplementedError(
            f"{type(outermost).__name__} computes its loss from labels without the prefix_layout, "
            f"so it would be wrong where sequences fork: {INSTEAD}"
        )


@cache
def _hands_layout_to_loss(forward: Callable[..., Any]) -> bool:
    """Whether a forward computes its loss as `self.loss_function(..., labels, **keywords)`."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
    except (OSError, TypeError):
        return False
    if "prefix_layout" in source:  # its author knows of layouts
        return True
    found = False
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not _takes_labels(node):
            continue
        called = ast.unparse(node.func)
        if called == "self.loss_function" and any(word.arg is None for word in node.keywords):
            found = True
        elif not called.startswith("self."):
            return False
    return found


def _takes_labels(call: ast.Call) -> bool:
    values = [*call.args, *(word.value for word in call.keywords)]
    return any(isinstance(value, ast.Name) and value.id == "labels" for value in values)


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def serve_labels(names: frozenset[str]) -> None:
    """Lets models with certain attention implementations pair labels by their layout.

    Only what `loss_function` of such a model returns changes, and that only under a layout.

    Args:
        names: of the attention implementations.
    """
    ordinary: Any = PreTrainedModel.loss_function
    if getattr(ordinary.fget, "serves_layouts", False):
        return

    def loss_function(model: PreTrainedModel) -> Callable[..., Any]:
        loss: Callable[..., Any] = ordinary.fget(model)
        if model.config.get_text_config()._attn_implementation not in names:
            return loss
        return partial(loss_over_layout, loss)

    loss_function.serves_layouts = True  # type: ignore[attr-defined]
    PreTrainedModel.loss_function = property(loss_function, ordinary.fset)
