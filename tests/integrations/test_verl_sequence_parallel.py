"""verl's real FSDP engine over data x sequence on four gloo ranks, against the ordinary engine.

This file is also the script of the ranks, which run every check once. Each of the tests below
reports one of them.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
import types
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
import verl  # noqa: F401  # conftest.py leaves this file out where it is missing
from torch import Tensor

if __name__ == "__main__":  # verl brings a package `tests` of its own
    tests = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["tests"] = tests

from verl.utils.ulysses import set_ulysses_sequence_parallel_group

import prefix_attn
from prefix_attn.testing import assert_within_budget
from tests.integrations.test_verl import (
    forward_and_backward,
    in_float64,
    micro_batch,
    new_engine,
    save_model,
)

RANKS = 4
LONGEST = 240  # seconds
CASES = {
    "data 2, sequence 2": (2, False, False),
    "sequence 4, more ranks than KV heads": (4, False, False),
    "fused kernels": (2, True, False),
    "forward only": (2, False, True),
}


def batch_of(data_rank: int, fused: bool = False) -> Any:
    """A micro-batch for each rank of the data dimension, with tokens of its own."""
    batch = micro_batch(True, fused)
    ids = batch["input_ids"]
    values = 3 + (ids.values() + data_rank) % 90
    batch["input_ids"] = torch.nested.nested_tensor_from_jagged(values, ids.offsets())
    return batch


def averaged(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients as FSDP leaves them: the mean over all ranks."""
    for name, x in results.items():
        if name not in ("log_probs", "entropy"):
            dist.all_reduce(x)
            x /= RANKS
    return results


def run_case(path: str, sequence: int, fused: bool, forward_only: bool) -> None:
    data_rank = dist.get_rank() // sequence
    with pytest.MonkeyPatch.context() as patch:
        exact = averaged(in_float64(path, patch, batch_of(data_rank)))
    model_class = transformers.Qwen3ForCausalLM
    results = []
    for attention, ranks in (("sdpa", 1), ("prefix_attn", sequence)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_class, "forward", model_class.forward)  # verl's fused head
            engine = new_engine(path, attention, fused, ulysses_sequence_parallel_size=ranks)
            if fused:  # verl's head would get a sharded weight on a CPU, with any attention
                engine._build_fsdp_module = lambda module: module
                engine._autocast_dtype = torch.float32
            engine._build_model_optimizer()
            set_ulysses_sequence_parallel_group(engine.ulysses_parallel_group)
            batch = batch_of(data_rank, fused)
            if forward_only:
                engine.module.eval()
                with torch.no_grad():
                    _, output = engine.forward_step(batch, None, forward_only=True)
                found = {"log_probs": output["model_output"]["log_probs"].values()}
            else:
                found = forward_and_backward(engine, batch)
            results.append(averaged(found) if fused else found)
            set_ulysses_sequence_parallel_group(None)
    for name, x in results[1].items():
        assert_within_budget(name, x, exact[name], results[0][name])
    counts = prefix_attn.stats(engine.module)
    assert counts.packed_calls == counts.calls == 1
    assert counts.tokens_run < counts.tokens_in


def rank_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", WORLD_SIZE=str(RANKS), RANK=str(rank))
    options = {"world_size": RANKS, "rank": rank, "timeout": timedelta(seconds=30)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", **options)
    if rank == 0:
        # Without FSDP only the first rank of verl has weights, unless they are tied.
        save_model(f"{folder}/model", tie_word_embeddings=True)
    dist.barrier()
    results: dict[str, str | None] = {}
    for name, case in CASES.items():
        start = time.perf_counter()
        results[name] = None
        try:
            run_case(f"{folder}/model", *case)
        except Exception:
            results[name] = traceback.format_exc()
        if rank == 0:
            print(f"{time.perf_counter() - start:6.1f} s  {name}", flush=True)
        Path(folder, f"{rank}").write_bytes(pickle.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What went wrong in each case, rank by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    script = [sys.executable, __file__, str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    files = [folder / f"{rank}" for rank in range(RANKS)]
    assert all(file.exists() for file in files), done.stdout + done.stderr
    return [pickle.loads(file.read_bytes()) for file in files]


@pytest.mark.parametrize("name", CASES)
def test_engine_over_ranks_matches_ordinary_engine(
    name: str, results: list[dict[str, str | None]]
) -> None:
    for rank, found in enumerate(results):
        assert found.get(name, "it did not come so far") is None, f"rank {rank}: {found[name]}"


def main(folder: str) -> None:
    """Forks the ranks: one process imports everything, and has no threads yet."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank_process, args=(rank, folder)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    last = time.monotonic() + LONGEST
    for process in ranks:
        process.join(max(0.0, last - time.monotonic()))
        process.kill()


if __name__ == "__main__":
    main(sys.argv[1])
