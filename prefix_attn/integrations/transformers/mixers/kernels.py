"""Kernels of other packages that stand behind the functions of recurrent mixers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prefix_attn.integrations.transformers.code_names import closure_of

# One run over `parts` from `states`: (function, parts, states, options) -> (out, final states)
RunStep = Callable[..., tuple[Tensor, Tensor]]

LENGTH, CUT = 150, 77  # tokens of the sequence that is cut, and where: in no multiple of a chunk
COARSEST = 2.0**-10  # precision of TF32, in which kernels multiply float32

_checked: set[tuple[Any, ...]] = set()


def implementation_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """What transformers chose for one of its functions when it was imported: a kernel, or torch."""
    if not inspect.isfunction(function):
        return function
    chosen = closure_of(function).get("implementation", function)
    assert callable(chosen)
    return chosen


def is_kernel(function: Callable[..., Any]) -> bool:
    """Whether something else than transformers' own torch code runs."""
    module = getattr(implementation_of(function), "__module__", None) or ""
    return module.split(".")[0] != "transformers"


def takes_bounds(function: Callable[..., Any]) -> bool:
    """Whether a kernel takes one row and the bounds of its sequences, instead of padding."""
    if not is_kernel(function):
        return False
    try:
        return "cu_seqlens" in inspect.signature(implementation_of(function)).parameters
    except ValueError:  # a function without a signature, of an extension in C
        return False


@torch.no_grad()
def check_kernel(
    function: Callable[..., Any],
    step: RunStep,
    inputs: Sequence[Tensor],
    options: dict[str, Any],
    draw: Callable[[int, tuple[int, ...], torch.Generator], Tensor],
) -> None:
    """Cuts one sequence in two, once for each kernel and dtype: the state must carry everything.

    The second half alone has a loss. So what the first half gets of its gradient went through the
    state, forward and backward.

    Args:
        function: the kernel; transformers' own code is not checked.
        step: runs it.
        inputs: (1, T, ...), those of the call: random ones of their kind take their place.
        options: further arguments of `step`.
        draw: `(i, shape, generator)` -> random values for input i.

    Raises:
        NotImplementedError: if values or gradients are lost at the cut.
    """
    if not is_kernel(function):
        return
    first = inputs[0]
    key = (implementation_of(function), first.dtype, first.device)
    if key in _checked:
        return
    generator = torch.Generator().manual_seed(0)
    whole = [
        draw(i, (1, LENGTH, *x.shape[2:]), generator).to(x.device, x.dtype)
        for i, x in enumerate(inputs)
    ]
    options = {n: x.detach() if isinstance(x, Tensor) else x for n, x in options.items()}
    with torch.enable_grad():
        leaves = [x.requires_grad_() for x in whole]
        expected, _ = step(function, leaves, None, options)
        expected = expected[:, CUT:]
        weight = torch.randn(expected.shape, generator=generator).to(expected)
        wanted = torch.autograd.grad((expected * weight).sum(), leaves, allow_unused=True)
        _, state = step(function, [x[:, :CUT] for x in leaves], None, options)
        out, _ = step(function, [x[:, CUT:] for x in leaves], state, options)
        got: Sequence[Tensor | None] = [None] * len(leaves)
        if out.requires_grad:
            got = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    eps = max(torch.finfo(first.dtype).eps, COARSEST)
    what = None
    if _distance(out, expected) > eps**0.5:
        what = "its values depend on more than its initial state"
    for have, want in zip(got, wanted, strict=True):
        if want is not None and (have is None or _distance(have, want) > eps**0.5):
            what = what or "it returns no gradient of its initial state, or a wrong one"
    if what is not None:
        name = getattr(implementation_of(function), "__qualname__", type(function).__name__)
        raise NotImplementedError(
            f"the kernel {name} can't follow a prefix tree: {what}. Load the model without this "
            "kernel, or call prefix_attn.disable(model)"
        )
    _checked.add(key)


def _distance(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
