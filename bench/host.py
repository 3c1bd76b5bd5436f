"""Times what a layer call costs on the host: `python -m bench.host`, no GPU needed.

Python, PyTorch's dispatcher and autograd, and Triton's launcher run as they do on a GPU, on tensors
of the CPU; the launch itself does nothing, and switching to the tensors' GPU is left out. Calls are
those of later layers: the first call with a layout also builds work lists and fixes arguments.
Times are those of the thread, so that other programs on the machine disturb them little.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from statistics import median
from typing import Any
from unittest import mock

import torch

from bench import tables
from bench.machine_code.compile import missing_tools, stand_in_driver
from prefix_attn import PrefixLayout, prefix_attention

# Groups and their members; tokens are few, since they cost the host nothing.
CASES = ((1, 4), (64, 16))
CAPABILITY, PROCESSORS = 90, 132
HEADS, KV_HEADS, HEAD_DIM = 4, 1, 128
ROUNDS, CALLS = 5, 100


@contextmanager
def no_launches(config: Any = None) -> Iterator[None]:
    """Lets the Triton backend take tensors of the CPU and launch nothing.

    Args:
        config: tiles of the kernels, which are compiled once; those of an H100 by default.
    """
    import triton
    from triton.compiler.compiler import CompiledKernel

    from prefix_attn.backends import triton as triton_backend
    from prefix_attn.kernels.config import select_config

    # As the configuration of a GPU is kept.
    kept = lru_cache(
        lambda dtype, d, dv: select_config(CAPABILITY, d, dtype, PROCESSORS, head_dim_v=dv)
    )

    def config_for(q: torch.Tensor, v: torch.Tensor) -> Any:
        return kept(q.dtype, q.shape[2], v.shape[2]) if config is None else config

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(triton.knobs.cache, "dir", folder))
        for owner, name, stand_in in (
            (triton_backend, "config_for", config_for),
            (triton_backend, "why_not", lambda *_: None),
            (CompiledKernel, "run", property(lambda _: lambda *_: None)),
            (CompiledKernel, "launch_metadata", lambda *_: None),
            (CompiledKernel, "_init_handles", lambda _: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        triton.runtime.driver.set_active(stand_in_driver(CAPABILITY))
        # Asked for its driver next, Triton looks for one again.
        stack.callback(triton.runtime.driver.set_active, None)
        yield


def layer_calls(
    groups: int, members: int, head_dim: int = HEAD_DIM
) -> dict[str, Callable[[], object]]:
    """What a layer does, by name, for groups of a prefix of eight and members of four tokens."""
    layout = PrefixLayout.from_lengths([8] * groups, [[4] * members] * groups)
    q, k, v = (
        torch.zeros(layout.num_tokens, heads, head_dim, dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    dout = torch.zeros_like(q)

    def forward() -> torch.Tensor:
        return prefix_attention(q, k, v, layout, backend="triton")

    def without_grad() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), dout)

    return {"forward, no_grad": without_grad, "forward": forward, "forward and backward": both}


def microseconds(call: Callable[[], object]) -> tuple[float, float]:
    """Least and median time of a call."""
    samples = []
    for _ in range(10):
        call()
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        samples.append((time.thread_time() - start) / CALLS * 1e6)
    return min(samples), median(samples)


def python_calls(call: Callable[[], object]) -> int:
    """Python functions that a call enters: the same in every run."""
    entered = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    call()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def main() -> int:
    """Prints one line per case; 2 if nothing can be compiled."""
    if reason := missing_tools():
        print(f"python -m bench.host: {reason}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    lines: list[tuple[str, ...]] = [("groups x members", "layer call", "us", "median", "functions")]
    with no_launches():
        for groups, members in CASES:
            for name, call in layer_calls(groups, members).items():
                least, middle = microseconds(call)
                figures = (f"{least:.0f}", f"{middle:.0f}", str(python_calls(call)))
                lines.append((f"{groups} x {members}", name, *figures))
    print(tables.text(lines, "llrrr"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
