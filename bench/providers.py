"""The ways to compute attention over a group that are compared.

Each provider holds its inputs in the form in which its users have them, so that only attention is
timed, and brings outputs and gradients to the packed axis outside the timing.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from bench.cases import DTYPES, Case
from prefix_attn import PrefixLayout, prefix_attention

OURS = "prefix_attn"


@dataclass(frozen=True, eq=False)
class Inputs:
    """Packed inputs of a case: q and dout (T, Hq, D), k and v (T, Hkv, D)."""

    case: Case
    layout: PrefixLayout
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device, seed: int) -> Inputs:
        """Standard normal inputs, rounded to the dtype of the case."""
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype = DTYPES[case.dtype]

        def normal(heads: int) -> Tensor:
            shape = (case.tokens, heads, case.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        q, k, v, dout = map(normal, (case.heads_q, case.heads_kv, case.heads_kv, case.heads_q))
        return cls(case, case.layout(device), q, k, v, dout)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A provider bound to its own leaves.

    Attributes:
        forward: computes the output from `leaves`.
        leaves: q, k, v as this provider takes them.
        dout: gradient of the output, in the output's shape.
        pack_out: output to (T, Hq, D).
        pack_grad: gradient of a leaf to (T, H, D).
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    pack_out: Callable[[Tensor], Tensor]
    pack_grad: Callable[[Tensor], Tensor]

    @property
    def input_bytes(self) -> int:
        """Bytes of the leaves and of dout."""
        return sum(x.numel() * x.element_size() for x in (*self.leaves, self.dout))


@dataclass(frozen=True)
class Provider:
    """One way to compute the attention of a case.

    Attributes:
        name: as printed.
        available: why it can't run a case on a device, or None.
        prepare: binds it to inputs.
        forward_only: why it has no backward pass on a device, or None.
        is_baseline: whether it repeats the prefix; speed-ups are over the fastest that does.
    """

    name: str
    available: Callable[[Case, torch.device], str | None]
    prepare: Callable[[Inputs], Prepared]
    forward_only: Callable[[torch.device], str | None] = lambda device: None
    is_baseline: bool = False


def _leaves(inputs: Inputs, arrange: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous leaves of q, k and v in another arrangement."""

    def leaf(x: Tensor) -> Tensor:
        copy = arrange(x).detach().clone(memory_format=torch.contiguous_format)
        return copy.requires_grad_()

    return leaf(inputs.q), leaf(inputs.k), leaf(inputs.v)


def _always(case: Case, device: torch.device) -> str | None:
    return None


def _prepare_ours(inputs: Inputs) -> Prepared:
    q, k, v = leaves = _leaves(inputs, lambda x: x)
    return Prepared(
        forward=lambda: prefix_attention(q, k, v, inputs.layout),
        leaves=leaves,
        dout=inputs.dout,
        pack_out=lambda x: x,
        pack_grad=lambda x: x,
    )


def _repeat(x: Tensor, case: Case) -> Tensor:
    """(T, H, D) to one whole sequence per member, (G, H, P + S, D)."""
    prefix = x[: case.prefix].expand(case.group, *x[: case.prefix].shape)
    suffix = x[case.prefix :].unflatten(0, (case.group, case.suffix))
    return torch.cat([prefix, suffix], 1).transpose(1, 2).contiguous()


def _unrepeat(x: Tensor, case: Case, summed: bool) -> Tensor:
    """(G, H, P + S, D) to (T, H, D): prefix rows of the first member, or summed over members."""
    rows = x.transpose(1, 2)
    prefix = rows[:, : case.prefix]
    prefix = prefix.double().sum(0) if summed else prefix[0]
    return torch.cat([prefix.double(), rows[:, case.prefix :].flatten(0, 1).double()])


def _shares(group: int) -> Tensor:
    """Powers of two that sum to one, so that dividing dout among members rounds nothing."""
    bits = math.ceil(math.log2(group))
    large = 2**bits - group
    return torch.tensor([2.0 ** -(bits - 1)] * large + [2.0**-bits] * (group - large))


def _prepare_repeated(
    inputs: Inputs, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Prepared:
    case = inputs.case
    q, k, v = leaves = _leaves(inputs, partial(_repeat, case=case))
    dout = _repeat(inputs.dout, case)
    dout[:, :, : case.prefix] *= _shares(case.group).to(dout)[:, None, None, None]
    gqa = case.heads_q != case.heads_kv

    def forward() -> Tensor:
        # On a CPU enable_gqa is up to 7 % faster than repeating the heads.
        with context():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

    return Prepared(
        forward=forward,
        leaves=leaves,
        dout=dout,
        pack_out=lambda x: _unrepeat(x, case, summed=False),
        pack_grad=lambda x: _unrepeat(x, case, summed=True),
    )


def _on_cpu(case: Case, device: torch.device) -> str | None:
    return None if device.type == "cpu" else "CUDA has one provider per SDPA backend"


def _on_cuda_half(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs CUDA"
    return "needs float16 or bfloat16" if case.dtype == "float32" else None


def _on_cuda_single(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs CUDA"
    return None if case.dtype == "float32" else "only for float32, which cuDNN and flash refuse"


def _has_prefix_grouper(case: Case, device: torch.device) -> str | None:
    if importlib.util.find_spec("prefix_grouper") is None:
        return "prefix-grouper is not installed"
    return None


def _heads_first(x: Tensor) -> Tensor:
    """(T, H, D) to (1, H, T, D)."""
    return x.transpose(0, 1)[None]


def _rows_first(x: Tensor) -> Tensor:
    """(1, H, T, D) to (T, H, D)."""
    return x[0].transpose(0, 1)


def _prepare_prefix_grouper(inputs: Inputs) -> Prepared:
    from prefix_grouper import PrefixGrouper

    case, device = inputs.case, inputs.q.device
    q, k, v = leaves = _leaves(inputs, _heads_first)
    grouper = PrefixGrouper([[case.prefix] + [case.suffix] * case.group], device=device)
    mask: Any
    if device.type == "cuda":
        mask = causal_lower_right(case.suffix, case.sequence)
    else:
        keep = torch.ones(case.suffix, case.sequence, dtype=torch.bool).tril(case.prefix)
        mask = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, -torch.inf)
    gqa = case.heads_q != case.heads_kv

    def attn(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        # Members are equally long: there is no padding to mask.
        whole = q.shape[2] == k.shape[2]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if whole else mask, is_causal=whole, enable_gqa=gqa
        )
        return out.transpose(1, 2)

    return Prepared(
        forward=lambda: grouper.forward(attn, q, k, v),
        leaves=leaves,
        dout=inputs.dout[None],
        pack_out=lambda x: x[0],
        pack_grad=_rows_first,
    )


def _can_compile(case: Case, device: torch.device) -> str | None:
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "torch.compile needs a C++ compiler"
    return None


def _flex_forward_only(device: torch.device) -> str | None:
    return "FlexAttention has no backward pass on the CPU" if device.type == "cpu" else None


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _prepare_flex(inputs: Inputs) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask

    case, device = inputs.case, inputs.q.device
    q, k, v = leaves = _leaves(inputs, _heads_first)
    if _flex_forward_only(device):
        for leaf in leaves:
            leaf.requires_grad_(False)
    mask = create_block_mask(
        inputs.layout.mask_mod(), None, None, case.tokens, case.tokens, device=str(device)
    )
    flex, ratio = _compiled_flex(), case.heads_q // case.heads_kv

    def forward() -> Tensor:
        if ratio > 1 and device.type == "cpu":
            # With enable_gqa and dynamic shapes the generated C++ of torch 2.13 doesn't compile.
            keys, values = (x.repeat_interleave(ratio, 1) for x in (k, v))
            return flex(q, keys, values, block_mask=mask)
        return flex(q, k, v, block_mask=mask, enable_gqa=ratio > 1)

    return Prepared(
        forward=forward,
        leaves=leaves,
        dout=_heads_first(inputs.dout),
        pack_out=_rows_first,
        pack_grad=_rows_first,
    )


def _forced(backend: SDPBackend) -> Callable[[Inputs], Prepared]:
    return partial(_prepare_repeated, context=partial(sdpa_kernel, backend))


PROVIDERS = (
    Provider("repeated SDPA", _on_cpu, _prepare_repeated, is_baseline=True),
    Provider(
        "repeated SDPA cuDNN",
        _on_cuda_half,
        _forced(SDPBackend.CUDNN_ATTENTION),
        is_baseline=True,
    ),
    Provider(
        "repeated SDPA flash",
        _on_cuda_half,
        _forced(SDPBackend.FLASH_ATTENTION),
        is_baseline=True,
    ),
    Provider("repeated SDPA float32", _on_cuda_single, _prepare_repeated, is_baseline=True),
    Provider("prefix-grouper", _has_prefix_grouper, _prepare_prefix_grouper),
    Provider("FlexAttention", _can_compile, _prepare_flex, forward_only=_flex_forward_only),
    Provider(OURS, _always, _prepare_ours),
)
