"""Bytes that ranks send where they share a packed row: `python -m bench.sequence_parallel`.

Prints the model for long prompts, a table of Markdown. `--count N` runs one layer of a small case
on N gloo ranks in both ways, and prints the bytes that were sent next to those of the model.
`--saved` runs a small Qwen3 on one to eight gloo ranks, and prints a table of what each of them
saves for the backward pass; it needs transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
import socket
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bench.cases import DTYPES
from bench.tables import markdown as table
from prefix_attn import PrefixLayout
from prefix_attn.cases import Case
from prefix_attn.dealing import keys_move_less, moved_rows
from prefix_attn.integrations import distributed
from prefix_attn.shards import WAYS, RowShard

CASES = (
    Case(65536, 2048, 16, 32, 8, 128, "bfloat16"),
    Case(65536, 2048, 16, 64, 8, 128, "bfloat16"),
    Case(131072, 1024, 8, 32, 8, 128, "bfloat16"),
    Case(16384, 8192, 16, 32, 8, 128, "bfloat16"),
    Case(4096, 8192, 16, 32, 4, 128, "bfloat16"),
)
RANKS = (2, 4, 8)
COUNTED = Case(2048, 256, 8, 8, 2, 64, "float32")
SAVED = Case(2048, 128, 8, 8, 2, 32, "float32")
LAYERS = 4
OWN_ROWS = "own rows"  # of `shard_rows`, beside the two kinds of inputs of `enable`
KINDS = (*product(("slices", "whole", OWN_ROWS), WAYS),)


def layout_of(case: Case) -> PrefixLayout:
    return PrefixLayout.from_lengths([case.prefix], [[case.suffix] * case.group])


def _width(case: Case) -> int:
    """Bytes of a number."""
    return DTYPES[case.dtype].itemsize


def bytes_of_heads(case: Case, ranks: int) -> float:
    """That a rank sends in the forward pass of one layer: q, k and v there, the output back."""
    rows = -(-layout_of(case).num_tokens // ranks)
    heads = 2 * case.heads_q + 2 * max(case.heads_kv, ranks)
    return (ranks - 1) / ranks * rows * heads * case.head_dim * _width(case)


def bytes_of_keys(case: Case, ranks: int) -> float:
    """The same for keys and values of shared rows, the mean over the ranks."""
    rows = moved_rows(layout_of(case).forest, ranks)
    return rows / ranks * 2 * case.heads_kv * case.head_dim * _width(case)


def bytes_of_hand_back(case: Case, ranks: int) -> float:
    """In "whole" mode, once per call: the hidden states of own rows to every other rank."""
    rows = -(-layout_of(case).num_tokens // ranks)
    return (ranks - 1) * rows * case.heads_q * case.head_dim * _width(case)


def markdown() -> str:
    """The table of the model, for the page on sequence parallelism."""
    header = ("P, S, G, heads, D", "ranks", "heads, MB", "keys, MB", "auto", "hand-back, MB")
    rows = []
    for case, ranks in product(CASES, RANKS):
        keys = keys_move_less(layout_of(case).forest, ranks, case.heads_q, case.heads_kv)
        numbers = [
            f"{function(case, ranks) / 1e6:.0f}"
            for function in (bytes_of_heads, bytes_of_keys, bytes_of_hand_back)
        ]
        heads = f"{case.heads_q}/{case.heads_kv}, {case.head_dim}"
        name = f"{case.prefix}, {case.suffix}, {case.group}, {heads}"
        rows.append((name, str(ranks), *numbers[:2], "keys" if keys else "heads", numbers[2]))
    return table(header, rows, "lrrrlr")


class Counted:
    """Counts, while it is entered, the all-to-alls of this process and the bytes that it sends.

    Attributes:
        calls: by kind, "heads" in attention and "rows" of rows that travel.
        sent: bytes by kind; what stays on the rank is left out.
    """

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.sent: dict[str, int] = {}
        self._trade: Callable[..., Any] = distributed.all_to_all_single_autograd
        self._exchange: Callable[..., Any] = dist.all_to_all_single

    def __enter__(self) -> Counted:
        distributed.all_to_all_single_autograd = self._counted_trade  # type: ignore[assignment]
        dist.all_to_all_single = self._counted_exchange  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        distributed.all_to_all_single_autograd = self._trade
        dist.all_to_all_single = self._exchange

    def _counted_trade(self, x: Tensor, out: Any, into: Any, group: Any) -> Any:
        self._add("heads", x.nbytes - x.nbytes // group.size())
        return self._trade(x, out, into, group)

    def _counted_exchange(
        self, out: Tensor, x: Tensor, received: list[int], sent: list[int], group: Any
    ) -> Any:
        rows = sum(sent) - sent[group.rank()]
        self._add("rows", rows * x[0].nbytes if len(x) else 0)
        return self._exchange(out, x, received, sent, group=group)

    def _add(self, kind: str, size: int) -> None:
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.sent[kind] = self.sent.get(kind, 0) + size


def count(rank: int, ranks: int, port: int) -> None:
    """Runs one layer in both ways, as one of the ranks; the first prints what all of them sent."""
    torch.set_num_threads(1)
    at = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=at, rank=rank, world_size=ranks)
    group, case = dist.group.WORLD, COUNTED
    assert group is not None
    model = {"heads": bytes_of_heads(case, ranks), "keys": bytes_of_keys(case, ranks)}
    for way in WAYS:
        shard = RowShard.of(layout_of(case), group, way)
        heads = (case.heads_q, case.heads_kv, case.heads_kv)
        q, k, v = (torch.randn(shard.num_rows, h, case.head_dim) for h in heads)
        with Counted() as counted:
            distributed.sharded_attention(q, k, v, shard)
        total = torch.tensor(sum(counted.sent.values()))
        dist.all_reduce(total)
        if rank == 0:
            found = float(total) / ranks
            print(f"{way:5}  sent {found / 1e6:.3f} MB, model {model[way] / 1e6:.3f} MB")
    dist.destroy_process_group()


def saved_bytes(model: torch.nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that a forward pass saves for its backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = getattr(x, "elem", x).untyped_storage()  # of what a collective returns
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = run()  # while it lives no place in memory is used again
    del out
    return sum(size for place, size in saved.items() if place not in own)


def save(rank: int, ranks: int, port: int, results: Any) -> None:
    """Runs the model in each kind as one of the ranks; the first tells the most that one saves."""
    import prefix_attn

    torch.set_num_threads(1)
    at = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=at, rank=rank, world_size=ranks)
    group, case, layout = dist.group.WORLD, SAVED, layout_of(SAVED)
    assert group is not None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (layout.num_tokens,), generator=generator)
    batch = torch.stack([ids[layout.sequence_rows(i)] for i in range(case.group)])
    columns = batch.chunk(ranks, dim=1)[rank]
    found = {}
    for inputs, way in KINDS if ranks > 1 else KINDS[:1]:
        model = _small_model(case)
        call: dict[str, Any] = {"input_ids": columns if inputs == "slices" else batch}
        if inputs == OWN_ROWS:
            shard = RowShard.of(layout, group, way)
            model.set_attn_implementation("prefix_attn")
            call = {"input_ids": ids[shard.rows][None], "position_ids": shard.position_ids[None]}
            call["prefix_layout"] = shard
        elif ranks > 1:
            prefix_attn.enable(
                model,
                sequence_parallel_group=group,
                sequence_parallel_inputs=inputs,
                sequence_parallel_way=way,
            )
        else:
            prefix_attn.enable(model)
        run = partial(model.model, **call, use_cache=False)
        most = torch.tensor(saved_bytes(model, run))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        found[inputs, way] = int(most)
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def _small_model(case: Case) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=case.heads_q * case.head_dim,
        intermediate_size=3 * case.heads_q * case.head_dim,
        num_hidden_layers=LAYERS,
        num_attention_heads=case.heads_q,
        num_key_value_heads=case.heads_kv,
        head_dim=case.head_dim,
    )
    return Qwen3ForCausalLM(config).train()


def saved_markdown() -> str:
    """The table of what ranks save, measured."""
    import prefix_attn.integrations.distributed
    import prefix_attn.integrations.transformers  # noqa: F401  # before the ranks are forked

    rows = []
    for ranks in (1, *RANKS):
        results = mp.get_context("fork").SimpleQueue()
        arguments = (ranks, _free_port(), results)
        mp.start_processes(save, arguments, nprocs=ranks, start_method="fork")
        found = results.get()
        figures = [f"{found[kind] / 2**20:.1f}" if kind in found else "-" for kind in KINDS]
        rows.append((str(ranks), *figures))
    header = ("ranks", *(f"{inputs}, {way}" for inputs, way in KINDS))
    return table(header, rows, "r" * len(header))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def main(arguments: list[str] | None = None) -> None:
    """Prints the model, or counts."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sequence_parallel", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--count", type=int, choices=RANKS, help="run a small case on so many gloo ranks"
    )
    parser.add_argument(
        "--saved", action="store_true", help="run a small model, and print what its ranks save"
    )
    args = parser.parse_args(arguments)
    if args.saved and importlib.util.find_spec("transformers") is None:
        parser.error("--saved needs transformers: pip install 'prefix-attn[hf]'")
    if args.count is not None:
        mp.spawn(count, (args.count, _free_port()), nprocs=args.count)
    else:
        print(saved_markdown() if args.saved else markdown())


if __name__ == "__main__":
    main()
