"""A plugin for verl: shared prefixes in the FSDP engines, switched on by a key of verl's config.

    actor_rollout_ref.model.override_config.attn_implementation=prefix_attn

verl imports this module in every process (entry point group "verl.plugins", or
`model.external_lib=prefix_attn.integrations.verl`). It waits until verl's FSDP engine is imported,
then makes that engine call `prefix_attn.enable` on the models it builds with this attention. Of
such an engine it also serves the steps: `use_dynamic_bsz` cuts micro-batches by unique tokens, and
what the micro-batches of a training step share runs once for all of them.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from prefix_attn.bins import pack_bins

ENGINE = "verl.workers.engine.fsdp.transformer_impl"
NAME = "prefix_attn"
# What verl 0.9.1 defines and calls in its engine, by the names of the parameters.
METHODS = {
    "_build_module": ["self"],
    "forward_backward_batch": ["self", "data", "loss_function", "forward_only"],
}
CUTS = "prepare_micro_batches"
# Micro-groups may hold so many times the tokens of the largest micro-batch.
MOST_HELD = 1.1


def serve_engine(module: ModuleType) -> None:
    """Makes verl's FSDP engine share prefixes in models that ask for it.

    If this version of verl does not build and run models as 0.9.1 does, it only warns: transformers
    then refuses `attn_implementation=prefix_attn` as unknown, and other runs go on.

    Args:
        module: `verl.workers.engine.fsdp.transformer_impl`. Serving it again changes nothing.
    """
    engine: Any = getattr(module, "FSDPEngine", None)
    methods: dict[str, Any] = {name: getattr(engine, name, None) for name in METHODS}
    for name, parameters in METHODS.items():
        method = methods[name]
        if method is None or list(inspect.signature(method).parameters) != parameters:
            _warn_unknown(f"FSDPEngine should define {name}({', '.join(parameters)})")
            return
    if CUTS not in inspect.unwrap(methods["forward_backward_batch"]).__code__.co_names:
        _warn_unknown(f"FSDPEngine.forward_backward_batch should call {CUTS}")
        return
    if not hasattr(methods["_build_module"], "__wrapped__"):
        engine._build_module = _shares_prefixes(methods["_build_module"])
        engine.forward_backward_batch = _in_micro_groups(methods["forward_backward_batch"], module)


def _warn_unknown(expected: str) -> None:
    warnings.warn(
        f"prefix_attn does not know this version of verl: in {ENGINE} {expected}, as in verl "
        f"0.9.1. attn_implementation={NAME} is not available",
        stacklevel=3,
    )


def _shares_prefixes(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The engine's `_build_module`, with the model enabled where its config asks for it."""

    @functools.wraps(build)
    def build_module(self: Any) -> Any:
        if self.model_config.hf_config._attn_implementation != NAME:
            return build(self)
        from prefix_attn.integrations.transformers import enable  # registers the attention

        size = self.ulysses_sequence_parallel_size
        if size > 1:  # each rank has a slice of every micro-batch, which stays as verl cuts it
            if hasattr(self.model_config.hf_config, "vision_config"):
                raise NotImplementedError(
                    f"attn_implementation={NAME} serves no model with pictures whose rows are "
                    f"sliced, but ulysses_sequence_parallel_size is {size}: set it to 1"
                )
            return enable(
                build(self),
                sequence_parallel_group=self.ulysses_parallel_group,
                sequence_parallel_inputs="slices",
            )
        self._prefix_attn_told = set()  # reasons, and the mark of an engine that is served
        # A sample may be alone in one pass and among siblings in the next: one kernel for both.
        return enable(build(self), always=True)

    return build_module


def _in_micro_groups(step: Callable[..., Any], module: ModuleType) -> Callable[..., Any]:
    """The engine's `forward_backward_batch`, with its micro-batches cut anew and announced."""
    ordinary = getattr(module, CUTS)

    @functools.wraps(step)
    def forward_backward_batch(
        self: Any, data: Any, loss_function: Any, forward_only: bool = False
    ) -> Any:
        if getattr(self, "_prefix_attn_told", None) is None:
            return step(self, data, loss_function, forward_only)
        with ExitStack() as block:

            def cut(data: Any, dp_group: Any = None, **options: Any) -> Any:
                found = _cut_by_unique_tokens(data, dp_group)
                micro_batches, indices = found or ordinary(data, dp_group=dp_group, **options)
                if not forward_only and len(micro_batches) > 1:
                    run = _announce(self, micro_batches, dp_group)
                    if isinstance(run, str):
                        _tell_once(self, run)
                    else:
                        block.enter_context(run)
                return micro_batches, indices

            setattr(module, CUTS, cut)
            try:
                return step(self, data, loss_function, forward_only)
            finally:
                setattr(module, CUTS, ordinary)

    return forward_backward_batch


# ---- micro-batches by unique tokens -------------------------------------------------------------


def _cut_by_unique_tokens(data: Any, group: Any) -> tuple[list[Any], list[list[int]]] | None:
    """What `use_dynamic_bsz` asks for: micro-batches, and the samples of each.

    Returns:
        None where verl's own cut stays: without `use_dynamic_bsz`, for samples that it was told to
        keep in pairs or larger groups, and for pictures, whose tokens look alike.
    """
    from verl.utils import tensordict_utils

    read = functools.partial(tensordict_utils.get_non_tensor_data, data)
    if not read("use_dynamic_bsz", True) or read("force_group_size", 1) > 1:
        return None
    if "multi_modal_inputs" in data.keys():  # noqa: SIM118 - a TensorDict
        return None
    ids = data["input_ids"]
    sequences = ids.values().cpu().split(ids.offsets().diff().tolist())
    bins = pack_alike(sequences, int(data["max_token_len_per_gpu"]), group)
    return [tensordict_utils.index_select_tensor_dict(data, chosen) for chosen in bins], bins


def pack_alike(
    sequences: Sequence[Tensor], max_tokens: int, group: dist.ProcessGroup | None
) -> list[list[int]]:
    """`pack_bins` with the same number of bins on every rank.

    Args:
        sequences: token ids of this rank.
        max_tokens: unique tokens that a bin holds at most.
        group: the ranks, None for this one alone.

    Raises:
        ValueError: on every rank, if a sequence of any is longer than a bin, or if a rank has fewer
            sequences than another needs bins.
    """
    from prefix_attn.integrations.ranks import told_by_all

    longest = max(map(len, sequences), default=0)
    bins = pack_bins(sequences, max_tokens) if longest <= max_tokens else []
    told = told_by_all((longest, len(bins), len(sequences)), [group] if group is not None else [])
    longest, num_bins = max(x[0] for x in told), max(x[1] for x in told)
    fewest = min(x[2] for x in told)
    if longest > max_tokens:
        raise ValueError(
            f"a sequence has {longest} tokens, a micro-batch holds max_token_len={max_tokens}"
        )
    if num_bins > fewest:
        raise ValueError(
            f"a rank needs {num_bins} micro-batches of max_token_len={max_tokens}, another has "
            f"only {fewest} sequences, too few to fill as many"
        )
    return pack_bins(sequences, max_tokens, num_bins=num_bins) if len(bins) < num_bins else bins


# ---- micro-groups -------------------------------------------------------------------------------


def _announce(
    engine: Any, micro_batches: list[Any], group: dist.ProcessGroup | None
) -> AbstractContextManager[Any] | str:
    """The block of `micro_groups` for a step, or the reason why each micro-batch runs apart.

    Ranks come to the same answer.
    """
    from prefix_attn.integrations.ranks import told_by_all
    from prefix_attn.integrations.transformers.micro_groups import micro_groups

    if engine.model_config.enable_activation_offload:
        return "enable_activation_offload counts the passes of layers itself"
    if getattr(engine.model_config.hf_config, "vision_config", None) is not None:
        return "the model embeds pictures before its decoder runs"
    calls = [engine.prepare_model_inputs(batch)[0] for batch in micro_batches]
    run, reason = None, ""
    try:
        run = micro_groups(engine.module, calls)
        if run.tokens_held > MOST_HELD * run.tokens_apart:
            reason = (
                "they lie scattered over the micro-batches, and more tokens would be held at once. "
                "Keep groups together, or set use_dynamic_bsz=true"
            )
    except (NotImplementedError, ValueError) as error:
        reason = str(error)
    # Of every rank, also where only some of them share parameters: none may wait here alone.
    told = told_by_all(reason, [group] if group is not None else [])
    if run is None or any(told):
        return reason or max(told)
    return run


def _tell_once(engine: Any, reason: str) -> None:
    if reason not in engine._prefix_attn_told:
        engine._prefix_attn_told.add(reason)
        warnings.warn(
            f"prompts of a step are shared inside each micro-batch alone: {reason}", stacklevel=2
        )


# ---- when the engine is imported ----------------------------------------------------------------


class EngineFinder(MetaPathFinder):
    """Serves the engine as soon as it is imported, so that importing verl stays as quick."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds the engine with the other finders; its module is served once it has run."""
        if name != ENGINE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_serve(module: ModuleType) -> None:
                run(module)
                serve_engine(module)

            spec.loader.exec_module = run_and_serve  # type: ignore[method-assign]
        return spec


if ENGINE in sys.modules:
    serve_engine(sys.modules[ENGINE])
else:
    sys.meta_path.insert(0, EngineFinder())
