"""Micro-groups: the micro-batches of a step, with the prefixes that they share run once.

`MicroGroups` stands in for the forward of an enabled decoder while its block lasts. What it plans,
records and sums is in `prefix_attn.micro`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from prefix_attn.checks import is_integer
from prefix_attn.integrations.packing import Packing, PassThroughError, joint_ids
from prefix_attn.integrations.ranks import sharing_groups, told_by_all
from prefix_attn.integrations.transformers.attention import ROW_KEYWORDS, PackedMask
from prefix_attn.integrations.transformers.calls import HANDLED, as_asked, find_packing
from prefix_attn.integrations.transformers.decoder import decoder_of
from prefix_attn.integrations.transformers.enable import check_once
from prefix_attn.integrations.transformers.micro_refusals import recomputes, refuse_unserved
from prefix_attn.integrations.transformers.token_keywords import KNOWN
from prefix_attn.micro import Barrier, Block, Join, Pairs, Part, Pass, Plan, WholeBackward
from prefix_attn.radix import find_prefixes
from prefix_attn.recurrence import HandBack

READ = ("input_ids", "attention_mask", "position_ids", *ROW_KEYWORDS)  # of an announced batch

Name = tuple[str, int | None]  # of an output, and the place in it if it is a tuple


def micro_groups(
    model: torch.nn.Module,
    micro_batches: Iterable[Mapping[str, Any]],
    *,
    offload: bool = False,
    min_tokens: int = 64,
    process_group: dist.ProcessGroup | None = None,
) -> MicroGroups:
    """Runs the prefixes that the micro-batches of a step share once, forward and backward.

    Inside the block the enabled model is called with every micro-batch, in the order announced,
    and each loss has its `backward()` before the next call. Gradients are those of the ordinary
    micro-batches. The memory of activations is that of the prefixes that are open and of one
    micro-batch, however many members a group has.

    The prefix runs before its first micro-batch; its own backward is part of the backward of its
    last one. Calls without gradients are not counted and run as ever.

    Args:
        model: as it is called, enabled by `prefix_attn.enable`; possibly inside PEFT, DDP or FSDP.
        micro_batches: keyword arguments of the calls: (B, L) padded or (1, N) rows. Only
            `input_ids`, `attention_mask` and `position_ids` are read here.
        offload: keep recorded keys and values in host memory, fetched layer by layer. This saves
            memory where activations are recomputed, and only there: otherwise the graph of the
            prefix holds them in any case.
        min_tokens: prefixes that begin and end in the same micro-batches run again in each of them
            if they have fewer tokens than this together.
        process_group: ranks that have to run the same passes; by default those that share
            parameters by FSDP.

    Returns:
        A context manager with the counts of the plan.

    Raises:
        ValueError: if the model is not enabled, if a micro-batch can't be packed, or if ranks
            announce different numbers of them.
        NotImplementedError: if the model can't be served, naming why.

    Example:
        >>> with micro_groups(model, batches) as run:
        ...     for batch in batches:
        ...         model(**batch, use_cache=False).logits.sum().backward()
        >>> run.tokens_run
    """
    return MicroGroups(
        model,
        micro_batches,
        offload=offload,
        min_tokens=min_tokens,
        process_group=process_group,
    )


class MicroGroups:
    """The block that `micro_groups` returns.

    Attributes:
        tokens_run: tokens that all calls run together.
        tokens_held: the most tokens whose activations are held at once.
        tokens_apart: the same without micro-groups: those of the largest micro-batch.
        num_prefixes: segments of the prefix tree that run once for several micro-batches.
    """

    tokens_run: int
    tokens_held: int
    tokens_apart: int
    num_prefixes: int

    def __init__(
        self,
        model: torch.nn.Module,
        micro_batches: Iterable[Mapping[str, Any]],
        *,
        offload: bool,
        min_tokens: int,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._model, self._backbone = model, decoder_of(model)
        if "_prefix_attn" not in self._backbone.__dict__:
            raise ValueError(
                f"{type(model).__name__} is not enabled: call prefix_attn.enable first"
            )
        if self._backbone._prefix_attn.ranks is not None:
            raise NotImplementedError(
                "micro-groups do not support sequence parallelism: call enable without a "
                "sequence_parallel_group"
            )
        if not is_integer(min_tokens) or min_tokens < 0:
            raise ValueError(f"min_tokens must be a number of tokens, got {min_tokens!r}")
        refuse_unserved(model, self._backbone)
        self._groups = [process_group] if process_group is not None else sharing_groups(model)
        self._read(micro_batches)
        self._plan = self._make_plan(offload, min_tokens)
        self.tokens_run = self._plan.tokens_run
        self.tokens_held = self._plan.tokens_held
        self.tokens_apart = self._plan.tokens_apart
        self.num_prefixes = self._plan.num_prefixes
        self._next = 0  # micro-batch
        self._waiting: list[Tensor] | None = None  # for the embeddings of a pass
        self._passed: list[Tensor] = []
        self._output_type: Any = None
        self._exits: list[Callable[[], None]] = []

    # ---- the plan -------------------------------------------------------------------------------

    def _read(self, micro_batches: Iterable[Mapping[str, Any]]) -> None:
        """Reads what is announced.

        Raises:
            ValueError: on all ranks that share parameters, if one can't read its micro-batches or
                if their numbers differ. One that went on would wait for the others.
        """
        self._batches: list[dict[str, Any]] = []
        reason: ValueError | None = None
        try:
            self._batches = _announced(micro_batches)
            packings = [self._packing(i, batch) for i, batch in enumerate(self._batches)]
            self._slots = [_sequences_of(packing) for packing in packings]
            self._row_index = [packing.row_index.cpu() for packing in packings]
            self._kinds = [_positions(batch).cpu().numpy() for batch in self._batches]
            numbers = sorted({len(positions) for positions in self._kinds})
            if len(numbers) > 1:
                raise ValueError(
                    f"position_ids of micro-batches have {numbers} kinds: give all one"
                )
        except ValueError as error:
            reason = error
        count = len(self._batches)
        told = told_by_all((count, reason is None), self._groups)
        if reason is not None:
            raise reason
        if not all(read for _, read in told):
            raise ValueError(
                "another rank that shares parameters can't run its micro-batches in micro_groups, "
                "and says why"
            )
        counts = [number for number, _ in told]
        if min(counts) < max(counts):
            raise ValueError(
                f"ranks that share parameters announce {min(counts)} to {max(counts)} "
                f"micro-batches, this one {count}: all have to run the same number"
            )

    def _packing(self, i: int, call: Mapping[str, Any]) -> Packing:
        """Reads micro-batch i as `enable` does.

        Raises:
            ValueError: with the reason why it can't be packed.
        """
        kwargs = {"use_cache": False, **call}
        for name in (*self._backbone._prefix_attn.token_keywords, *KNOWN):
            if kwargs.get(name) is not None:
                raise NotImplementedError(
                    f"micro_groups can't serve the token keyword {name}: call the model outside of "
                    "it"
                )
        try:
            return find_packing(self._backbone, kwargs, 1.0, always=True)
        except PassThroughError as reason:
            raise ValueError(
                f"micro_groups can't run micro-batch {i}, which enable would pass through: {reason}"
            ) from reason

    def _make_plan(self, offload: bool, min_tokens: int) -> Plan:
        ids: list[np.ndarray] = [b["input_ids"].cpu().long().numpy() for b in self._batches]
        flat = np.concatenate([x.ravel() for x in ids])
        places = np.concatenate([x.reshape(len(x), -1) for x in self._kinds], axis=1)
        valid = np.concatenate([(rows >= 0).ravel().numpy() for rows in self._row_index])
        # What lies at padding is in no sequence, and may be negative.
        keys = joint_ids([np.where(valid, part, 0) for part in (flat, *places)])
        before = np.cumsum([0, *(x.size for x in ids)])
        sequences: list[np.ndarray] = []
        slots: list[np.ndarray] = []
        batch_of: list[int] = []
        for batch, mine in enumerate(self._slots):
            for at in mine:
                slots.append(before[batch] + at)
                sequences.append(keys[slots[-1]])
                batch_of.append(batch)
        forest = find_prefixes(sequences)
        self._ids = np.empty(forest.num_tokens, dtype=np.int64)
        self._places = np.empty((len(places), forest.num_tokens), dtype=np.int64)
        for at, rows in zip(slots, forest.sequence_rows, strict=True):
            self._ids[rows], self._places[:, rows] = flat[at], places[:, at]
        plan = Plan(
            forest,
            np.array(batch_of),
            len(self._batches),
            min_tokens=min_tokens,
            offload=offload,
            agree=self._agree if self._groups else None,
            in_company=dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1,
        )
        self._local_rows: list[Tensor] = []  # (B, L), -1 at padding: rows of each pass's layout
        number = 0
        for batch, run in enumerate(plan.passes):
            rows = np.full(ids[batch].size, -1)
            for at in self._slots[batch]:
                rows[at] = np.searchsorted(run.all_rows, forest.sequence_rows[number])
                number += 1
            self._local_rows.append(torch.from_numpy(rows).view(ids[batch].shape))
        return plan

    def _agree(self, pairs: Pairs) -> Pairs:
        """The (first, last) micro-batches of all ranks' blocks."""
        return set().union(*told_by_all(frozenset(pairs), self._groups))

    # ---- the block ------------------------------------------------------------------------------

    def __enter__(self) -> MicroGroups:
        backbone = self._backbone
        if self._next:
            raise RuntimeError("this block of micro_groups has run: announce micro-batches anew")
        ordinary = backbone.forward
        if isinstance(getattr(ordinary, "__self__", None), MicroGroups):
            raise RuntimeError(
                f"{type(backbone).__name__} is inside micro_groups already: end that block first"
            )
        state = backbone._prefix_attn
        self._ordinary = ordinary
        self._original = state.forward or MethodType(type(backbone).forward, backbone)
        backbone.forward = self._forward
        embedding = backbone.get_input_embeddings()
        hooks = (
            embedding.register_forward_hook(self._embedded),
            register_optimizer_step_pre_hook(self._check_step),
        )
        self._exits = [hook.remove for hook in hooks]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._backbone.forward = self._ordinary
        for leave in self._exits:
            leave()
        try:
            if kind is None:
                self._check_complete()
        finally:
            for block in self._plan.blocks:
                block.release()

    def _check_complete(self) -> None:
        count = len(self._batches)
        if self._next != count:
            raise RuntimeError(
                f"{self._next} of {count} announced micro-batches ran: gradients of prefixes that "
                "were left open are lost. Run all of them inside micro_groups, or announce fewer"
            )
        for block in self._plan.blocks:
            if block.is_open:
                raise RuntimeError(
                    f"backward() of micro-batch {block.last} did not run inside micro_groups: it "
                    "is the last one that shares prefixes, whose gradients are lost. Call it, "
                    "with a loss of zero if need be"
                )
            if block.is_late:
                raise RuntimeError(
                    f"backward() of a micro-batch came after that of micro-batch {block.last}, the "
                    "last one that shares prefixes with it, whose gradients are lost. Call "
                    "backward() of every micro-batch before the next one runs"
                )

    def _check_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Before any optimizer's step: parameters may not change while prefixes are open."""
        opened = [block for block in self._plan.blocks if block.is_open]
        if not opened:
            return
        ours = {id(parameter) for parameter in self._model.parameters()}
        for group in optimizer.param_groups:
            if any(id(parameter) in ours for parameter in group["params"]):
                raise RuntimeError(
                    f"{type(optimizer).__name__}.step() while prefixes are open, which micro-batch "
                    f"{max(block.last for block in opened)} closes with its backward(): step after "
                    "that, or announce the micro-batches of one step"
                )

    # ---- calls ----------------------------------------------------------------------------------

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward inside the block."""
        backbone = self._backbone
        state = backbone._prefix_attn
        if not torch.is_grad_enabled():
            return self._ordinary(*args, **kwargs)
        kwargs.update(zip(state.parameters, args, strict=False))
        batch = self._checked(kwargs)
        if batch == 0:
            refuse_unserved(self._model, backbone)  # again: now what calls the model is known
        if state.check_pending:
            check_once(backbone, state, self._original, kwargs)
        self._next += 1
        ran = 0
        for block in self._plan.blocks:
            if block.first == batch:
                block.keep_outputs(self._run_block(block, kwargs))
                ran += block.num_tokens
        out = self._run_batch(batch, kwargs)
        counts = state.counts
        counts.calls += 1
        counts.packed_calls += 1
        counts.tokens_in += sum(len(slots) for slots in self._slots[batch])
        counts.tokens_run += ran + self._plan.passes[batch].num_tokens
        return as_asked(out, backbone, kwargs)

    def _checked(self, kwargs: dict[str, Any]) -> int:
        """The number of the micro-batch that runs.

        Raises:
            ValueError: if it is not the one that was announced.
            NotImplementedError: if its embeddings come from outside.
        """
        batch, count = self._next, len(self._batches)
        if batch >= count:
            raise ValueError(f"{count} micro-batches were announced, this call is one more")
        if kwargs.get("input_ids") is None:
            raise NotImplementedError(
                "micro_groups can't serve inputs_embeds, which models with pictures pass to their "
                "decoder: call the model outside of it"
            )
        announced = self._batches[batch]
        same = _equal(kwargs["input_ids"], announced["input_ids"])
        if same:
            packing = self._packing(batch, kwargs)
            valid = self._row_index[batch] >= 0
            ours, theirs = _positions(announced).cpu(), _positions(kwargs).cpu()
            same = _equal(packing.row_index >= 0, valid) and _equal(
                ours[:, valid], theirs[:, valid]
            )
            if same and not _equal(packing.row_index, self._row_index[batch]):
                raise ValueError(
                    f"micro-batch {batch} was announced with {len(self._slots[batch])} sequences, "
                    f"its call takes it for {len(_sequences_of(packing))}: rows of several need "
                    "use_cache=False"
                )
        if not same:
            raise ValueError(
                f"micro-batch {batch} is not the one that was announced: input_ids, "
                "attention_mask and position_ids have to be those given to micro_groups, in its "
                "order"
            )
        return batch

    def _embedded(self, module: torch.nn.Module, args: Any, out: Tensor) -> Tensor:
        """After the embeddings of a pass: puts the barrier there."""
        if self._waiting is None or not torch.is_grad_enabled():
            return out
        waiting, self._waiting = self._waiting, None
        anchor = torch.zeros((), device=out.device, requires_grad=True)
        out, *self._passed = Barrier.apply(anchor, out, *waiting)
        return out

    def _run(
        self, run: Pass, closing: list[Block], kwargs: dict[str, Any]
    ) -> tuple[dict[Name, Tensor], dict[tuple[Block, Name], Tensor]]:
        """Runs a pass.

        Args:
            run: what runs.
            closing: blocks whose graph becomes part of that of this pass.
            kwargs: of the call.

        Returns:
            `(outputs, closed)`: outputs of the pass (n, ...), and of the closing blocks.
        """
        names = [(block, name) for block in closing for name in block.outputs or {}]
        waiting = [block.outputs[name] for block, name in names if block.outputs is not None]
        if not run.num_tokens:
            return {}, dict(zip(names, waiting, strict=True))
        device = kwargs["input_ids"].device
        layout = run.layout(device)
        ids, places = self._ids[run.rows], self._places[:, run.rows]
        if run.stands_in:
            ids, places = np.zeros(1, np.int64), np.zeros((len(self._places), 1), np.int64)
        positions = torch.from_numpy(places).to(device)
        call = {name: value for name, value in kwargs.items() if name not in HANDLED}
        call.update(
            input_ids=torch.from_numpy(ids).to(device)[None],
            position_ids=positions if len(positions) == 1 else positions[:, None],
            attention_mask=PackedMask(layout),
            use_cache=False,
            return_dict=True,
            prefix_layout=layout,
        )
        self._waiting, self._passed = waiting, []
        out = self._original(**call)
        if self._waiting is not None:
            self._waiting = None
            raise NotImplementedError(
                f"{type(self._backbone).__name__} does not call get_input_embeddings() for its "
                "input_ids, which micro_groups needs: run it without micro_groups"
            )
        if run.loops and recomputes(self._backbone):
            raise NotImplementedError(
                f"{type(self._backbone).__name__} runs its layers in a loop and recomputes them: "
                "micro_groups can't tell the turns apart then. Switch gradient checkpointing off"
            )
        self._output_type = type(out)
        outputs = dict(_outputs_of(out, run.num_tokens))
        passed, self._passed = self._passed, []
        return outputs, dict(zip(names, passed, strict=True))

    def _run_block(self, block: Block, kwargs: dict[str, Any]) -> dict[Name, Tensor]:
        """Runs prefixes; those above that close with them wait for their backward."""
        closing = [above for above in block.above if above.last == block.last]
        return self._run(block, closing, kwargs)[0]

    def _run_batch(self, batch: int, kwargs: dict[str, Any]) -> Any:
        """Runs what is left of a micro-batch and hands its outputs back in its layout."""
        run = self._plan.passes[batch]
        closing = [block for block in self._plan.blocks if block.last == batch]
        outputs, closed = self._run(run, closing, kwargs)
        run.end()
        names = list(outputs) or _recorded_outputs(run)
        values: dict[str, Any] = {}
        rows = self._local_rows[batch].to(kwargs["input_ids"].device)
        anchor = torch.zeros((), device=rows.device, requires_grad=True)
        for name in names:
            packed = WholeBackward.apply(anchor, self._lay(run, name, outputs, closed))
            back = HandBack.apply(packed, rows)
            output, place = name
            if output == "router_logits":  # slots end to end
                back = back.flatten(0, 1)
            if place is None:
                values[output] = back
            else:
                values.setdefault(output, []).append(back)
        for block in closing:
            block.outputs = None
        return self._output_type(
            **{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
        )

    def _lay(
        self,
        run: Pass,
        name: Name,
        outputs: dict[Name, Tensor],
        closed: dict[tuple[Block, Name], Tensor],
    ) -> Tensor:
        """An output of all rows of a pass (T, ...), in the order of its layout."""
        rows = []
        for (block, start, length), part in zip(run.parts_of, run.parts(name), strict=True):
            if block is None:
                rows.append(outputs[name][start : start + length])
            elif (block, name) in closed:
                rows.append(closed[block, name][start : start + length])
            else:
                rows.append(_read(part))
        if run.stands_in:  # part of the graph, for the hooks of other ranks
            rows.append(outputs[name][:0])
        return torch.cat(rows)


# ---- batches ------------------------------------------------------------------------------------


def _announced(micro_batches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(micro_batches, Mapping) or not isinstance(micro_batches, Iterable):
        raise ValueError(
            f"micro_batches must be a list of batches, got {type(micro_batches).__name__}"
        )
    batches = []
    for i, batch in enumerate(micro_batches):
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"micro-batch {i} must be a dict of the call's arguments, got "
                f"{type(batch).__name__}"
            )
        if not isinstance(batch.get("input_ids"), Tensor):
            raise ValueError(f"micro-batch {i} has no input_ids, only {sorted(batch)}")
        # Copies: what announces them may fill the same buffers again.
        read = {name: batch[name] for name in READ if batch.get(name) is not None}
        batches.append({n: x.clone() if isinstance(x, Tensor) else x for n, x in read.items()})
    if not batches:
        raise ValueError("micro_groups needs at least one micro-batch")
    return batches


def _positions(call: Mapping[str, Any]) -> Tensor:
    """(K, B, L) positions of a call; transformers numbers the columns where there are none."""
    rows, columns = call["input_ids"].shape
    positions = call.get("position_ids")
    if positions is None:
        positions = torch.arange(columns, device=call["input_ids"].device)[None]
    kinds: Tensor = positions if positions.dim() == 3 else positions[None]
    return kinds.expand(-1, rows, -1)


def _sequences_of(packing: Packing) -> list[np.ndarray]:
    """The flat slots of each sequence: one begins at every token that none lies before."""
    rows = packing.row_index.cpu().numpy().ravel()
    slots = np.flatnonzero(rows >= 0)
    depths = packing.layout.position_ids.cpu().numpy()[rows[slots]]
    return np.split(slots, np.flatnonzero(depths == 0)[1:])


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.to(b.device, b.dtype), b))


# ---- outputs ------------------------------------------------------------------------------------


def _outputs_of(out: Any, num_tokens: int) -> Iterable[tuple[Name, Tensor]]:
    """The tensors of a pass's output as (n, ...), by name and place in a tuple."""
    for name, value in out.items():
        several = isinstance(value, (tuple, list))
        for i, x in enumerate(value if several else [value]):
            if x is None:
                continue
            if isinstance(x, Tensor) and x.dim() == 3 and x.shape[:2] == (1, num_tokens):
                x = x[0]
            elif not (isinstance(x, Tensor) and x.dim() == 2 and len(x) == num_tokens):
                raise NotImplementedError(f"micro_groups can't hand back the output {name}")
            yield (name, i if several else None), x


def _recorded_outputs(run: Pass) -> list[Name]:
    """The outputs of the first block whose rows a pass reads."""
    for block, *_ in run.parts_of:
        if block is not None:
            return [name for name in block.recorded if isinstance(name[0], str)]
    return []


def _read(part: Part) -> Tensor:
    """Recorded rows of an output, whose gradient goes to their sum."""
    assert part.recorded is not None
    rows = part.recorded.read(part.start, part.length)
    return Join.apply(rows[:0].detach().requires_grad_(), 0, [part])
