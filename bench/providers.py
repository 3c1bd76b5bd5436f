"""The ways to compute attention over a group that are compared.

Each provider holds its inputs in the form in which its users have them, so that only attention is
timed, and brings outputs and gradients to the packed axis outside the timing.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from bench.cases import pairs
from prefix_attn import PrefixLayout, prefix_attention
from prefix_attn.backends import FORWARD_VARIABLE
from prefix_attn.cases import Case
from prefix_attn.kernels.options import Options
from prefix_attn.testing import Inputs, Results

OURS = "prefix_attn"
TENSORS = ("out", "dq", "dk", "dv")
FLASH_PACKAGES = {
    "repeated FlashAttention-3": "flash_attn_interface",
    "repeated FlashAttention-4": "flash_attn.cute",
}
# The backend of ours: a dry run of the GPU benchmark interprets the Triton kernels.
ours_backend = "auto"
# It calls FlexAttention uncompiled, too.
flex_compiler: Callable[..., Callable[..., Any]] = torch.compile


@dataclass(frozen=True, eq=False)
class Problem:
    """A case with its layout, and inputs on the packed axis: sinks for those who ask for them."""

    case: Case
    layout: PrefixLayout
    inputs: Inputs

    @classmethod
    def random(cls, case: Case, device: torch.device, seed: int) -> Problem:
        """Standard normal inputs, rounded to the dtype of the case."""
        layout = case.layout(device)
        heads, dims = (case.heads_q, case.heads_kv), (case.head_dim, case.head_dim)
        return cls(
            case,
            layout,
            Inputs.random(layout, heads, dims, case.torch_dtype, sinks=True, seed=seed),
        )


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, eq=False)
class Prepared:
    """A provider bound to its own leaves.

    Attributes:
        forward: computes the output from `leaves`.
        leaves: q, k, v as this provider takes them; without gradients where it has no backward.
        dout: gradient of the output, in the output's shape.
        pack_out: output to (T, Hq, D).
        pack_grad: gradient of a leaf to (T, H, D).
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    pack_out: Callable[[Tensor], Tensor] = _same
    pack_grad: Callable[[Tensor], Tensor] = _same

    @property
    def input_bytes(self) -> int:
        """Bytes of the leaves and of dout."""
        return sum(x.numel() * x.element_size() for x in (*self.leaves, self.dout))

    @property
    def passes(self) -> list[Callable[..., Any]]:
        """The forward pass, and the backward pass of what it returns, if there is one."""
        return [self.forward, self.backward] if self.leaves[0].requires_grad else [self.forward]

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the leaves."""
        return torch.autograd.grad(out, self.leaves, self.dout)

    def packed(self, out: Tensor, *grads: Tensor) -> Results:
        """Output and gradients on the packed axis, in the dtype of the case."""
        found = (self.pack_out(out.detach()), *map(self.pack_grad, grads))
        return {n: x.to(out.dtype) for n, x in zip(TENSORS, found, strict=False)}

    def results(self) -> Results:
        """Runs all passes."""
        out = self.forward()
        return self.packed(out, *(grad for step in self.passes[1:] for grad in step(out)))


@dataclass(frozen=True)
class Provider:
    """One way to compute the attention of a case.

    Attributes:
        name: as printed.
        available: why it can't run a case on a device, or None.
        prepare: binds it to inputs.
        forward_only: why it has no backward pass on a device, or None.
        is_baseline: whether it repeats the prefix; speed-ups are over the fastest that does.
        changes: options of `prefix_attention` that make it compute another function, where sinks
            True stands for those of the inputs; it has no speed-up over repeating.
    """

    name: str
    available: Callable[[Case, torch.device], str | None]
    prepare: Callable[[Problem], Prepared]
    forward_only: Callable[[torch.device], str | None] = lambda device: None
    is_baseline: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def pairs(self, case: Case) -> int:
        """Allowed (query, key) pairs of what it computes."""
        rule = {n: x for n, x in self.changes.items() if n in ("window_size", "prefix_causal")}
        return pairs(case, **rule)


def _leaves(problem: Problem, arrange: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous leaves of q, k and v in another arrangement."""

    def leaf(x: Tensor) -> Tensor:
        copy = arrange(x).detach().clone(memory_format=torch.contiguous_format)
        return copy.requires_grad_()

    inputs = problem.inputs
    return leaf(inputs.q), leaf(inputs.k), leaf(inputs.v)


def _always(case: Case, device: torch.device) -> str | None:
    return None


def _prepare_ours(problem: Problem, **options: Any) -> Prepared:
    q, k, v = leaves = _leaves(problem, _same)
    if options.get("sinks"):
        options["sinks"] = problem.inputs.sinks

    def forward() -> Tensor:
        return prefix_attention(q, k, v, problem.layout, backend=ours_backend, **options)

    return Prepared(forward, leaves, problem.inputs.dout)


def _repeat(x: Tensor, case: Case) -> Tensor:
    """(T, H, D) to one whole sequence per member, (G, H, P + S, D)."""
    prefix = x[: case.prefix].expand(case.group, *x[: case.prefix].shape)
    suffix = x[case.prefix :].unflatten(0, (case.group, case.suffix))
    return torch.cat([prefix, suffix], 1).transpose(1, 2)


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


def _repeated_dout(problem: Problem) -> Tensor:
    """Gradient of the output with the prefix rows divided among members, (G, H, P + S, D)."""
    case = problem.case
    dout = _repeat(problem.inputs.dout, case).contiguous()
    dout[:, :, : case.prefix] *= _shares(case.group).to(dout)[:, None, None, None]
    return dout


def _takes_head_groups(
    problem: Problem, context: Callable[[], AbstractContextManager[Any]]
) -> bool:
    """Whether SDPA's backend takes fewer KV heads than query heads; else they are repeated."""
    inputs = problem.inputs
    q, k, v = (_heads_first(x[:64]) for x in (inputs.q, inputs.k, inputs.v))
    try:
        with context():
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    except RuntimeError:
        return False
    return True


def _prepare_repeated(
    problem: Problem, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Prepared:
    case = problem.case
    q, k, v = leaves = _leaves(problem, partial(_repeat, case=case))
    ratio = case.heads_q // case.heads_kv
    gqa = ratio > 1 and _takes_head_groups(problem, context)

    def forward() -> Tensor:
        # On a CPU enable_gqa is up to 7 % faster than repeating the heads.
        repeats = 1 if gqa else ratio
        keys, values = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k, v))
        with context():
            return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=gqa)

    return Prepared(
        forward=forward,
        leaves=leaves,
        dout=_repeated_dout(problem),
        pack_out=lambda x: _unrepeat(x, case, summed=False),
        pack_grad=lambda x: _unrepeat(x, case, summed=True),
    )


def _prepare_flash_package(problem: Problem, module: str) -> Prepared:
    """Repeats the prefix through `flash_attn_func` of a package: (G, P + S, H, D) tensors."""
    case = problem.case
    attend = importlib.import_module(module).flash_attn_func

    def rows_second(x: Tensor) -> Tensor:
        return _repeat(x, case).transpose(1, 2)

    q, k, v = leaves = _leaves(problem, rows_second)

    def forward() -> Tensor:
        out = attend(q, k, v, causal=True)
        # Some versions return the log-sum-exp too.
        return out[0] if isinstance(out, tuple) else out

    return Prepared(
        forward=forward,
        leaves=leaves,
        dout=_repeated_dout(problem).transpose(1, 2).contiguous(),
        pack_out=lambda x: _unrepeat(x.transpose(1, 2), case, summed=False),
        pack_grad=lambda x: _unrepeat(x.transpose(1, 2), case, summed=True),
    )


def _has_module(case: Case, device: torch.device, module: str) -> str | None:
    if reason := _why_no_import(module):
        return reason
    return "needs float16 or bfloat16" if case.dtype == "float32" else None


@cache
def _why_no_import(module: str) -> str | None:
    """Asked once: a package that was built for other versions fails late, and in any way."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module} can't be imported ({type(error).__name__}: {error})"
    return None


def _needs(
    case: Case, device: torch.device, kind: str = "cuda", half: bool | None = None
) -> str | None:
    """Why a case is not for a device of this kind, or not of 16 bits as it has to be."""
    if device.type != kind:
        return f"needs {kind}"
    if half is None or half == (case.dtype != "float32"):
        return None
    return "needs float16 or bfloat16" if half else "only for float32, which cuDNN and flash refuse"


def _has_prefix_grouper(case: Case, device: torch.device) -> str | None:
    if importlib.util.find_spec("prefix_grouper") is None:
        return "prefix-grouper is not installed"
    return None


def _lacks_prefix_grouper(case: Case, device: torch.device) -> str | None:
    return None if _has_prefix_grouper(case, device) else "prefix-grouper itself is installed"


def _heads_first(x: Tensor) -> Tensor:
    """(T, H, D) to (1, H, T, D)."""
    return x.transpose(0, 1)[None]


def _rows_first(x: Tensor) -> Tensor:
    """(1, H, T, D) to (T, H, D)."""
    return x[0].transpose(0, 1)


def _suffix_mask(problem: Problem) -> Any:
    """What a suffix sees of its whole sequence, as SDPA wants it."""
    case, q = problem.case, problem.inputs.q
    length = case.prefix + case.suffix
    if q.is_cuda:
        return causal_lower_right(case.suffix, length)
    keep = torch.ones(case.suffix, length, dtype=torch.bool).tril(case.prefix)
    return torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, -torch.inf)


def _prepare_two_calls(problem: Problem) -> Prepared:
    """Prefix Grouper's idea without its package: the prefix alone, then every suffix on a copy."""
    case = problem.case
    q, k, v = leaves = _leaves(problem, _same)
    mask, gqa = _suffix_mask(problem), case.heads_q != case.heads_kv

    def forward() -> Tensor:
        head, keys, values = (_heads_first(x[: case.prefix]) for x in (q, k, v))
        first = F.scaled_dot_product_attention(head, keys, values, is_causal=True, enable_gqa=gqa)
        suffixes = q[case.prefix :].unflatten(0, (case.group, case.suffix)).transpose(1, 2)
        keys, values = (_repeat(x, case) for x in (k, v))
        rest = F.scaled_dot_product_attention(
            suffixes, keys, values, attn_mask=mask, enable_gqa=gqa
        )
        return torch.cat([_rows_first(first), rest.transpose(1, 2).flatten(0, 1)])

    return Prepared(forward, leaves, problem.inputs.dout)


def _prepare_prefix_grouper(problem: Problem) -> Prepared:
    from prefix_grouper import PrefixGrouper

    case, device = problem.case, problem.layout.device
    q, k, v = leaves = _leaves(problem, _heads_first)
    grouper = PrefixGrouper([[case.prefix] + [case.suffix] * case.group], device=device)
    mask = _suffix_mask(problem)
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
        dout=problem.inputs.dout[None],
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
def compiled_flex() -> Callable[..., Any]:
    """FlexAttention, compiled once for all shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_compiler(flex_attention, dynamic=True)


def _prepare_flex(problem: Problem) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask

    case, device = problem.case, problem.layout.device
    q, k, v = leaves = _leaves(problem, _heads_first)
    if _flex_forward_only(device):
        for leaf in leaves:
            leaf.requires_grad_(False)
    # Uncompiled, this would hold the dense mask.
    create = flex_compiler(create_block_mask) if device.type == "cuda" else create_block_mask
    mask = create(
        problem.layout.mask_mod(), None, None, case.tokens, case.tokens, device=str(device)
    )
    flex, ratio = compiled_flex(), case.heads_q // case.heads_kv

    def forward() -> Tensor:
        if ratio > 1 and device.type == "cpu":
            # With enable_gqa and dynamic shapes the generated C++ of torch 2.13 doesn't compile.
            keys, values = (x.repeat_interleave(ratio, 1) for x in (k, v))
            return flex(q, keys, values, block_mask=mask)
        return flex(q, k, v, block_mask=mask, enable_gqa=ratio > 1)

    return Prepared(
        forward=forward,
        leaves=leaves,
        dout=_heads_first(problem.inputs.dout),
        pack_out=_rows_first,
        pack_grad=_rows_first,
    )


def repeated_with(backend: SDPBackend) -> Callable[[Problem], Prepared]:
    """Repeats the prefix through one backend of SDPA, which refuses what it can't do."""
    return partial(_prepare_repeated, context=partial(sdpa_kernel, backend))


_half = partial(_needs, half=True)
BASELINES: dict[str, tuple[Callable[..., str | None], Callable[[Problem], Prepared]]] = {
    "repeated SDPA": (partial(_needs, kind="cpu"), _prepare_repeated),
    "repeated SDPA cuDNN": (_half, repeated_with(SDPBackend.CUDNN_ATTENTION)),
    "repeated SDPA flash": (_half, repeated_with(SDPBackend.FLASH_ATTENTION)),
    "repeated SDPA float32": (partial(_needs, half=False), _prepare_repeated),
    **{
        name: (partial(_has_module, module=x), partial(_prepare_flash_package, module=x))
        for name, x in FLASH_PACKAGES.items()
    },
}
PROVIDERS = (
    *(Provider(name, *how, is_baseline=True) for name, how in BASELINES.items()),
    Provider("prefix-grouper", _has_prefix_grouper, _prepare_prefix_grouper),
    Provider("two calls", _lacks_prefix_grouper, _prepare_two_calls),
    Provider("FlexAttention", _can_compile, _prepare_flex, forward_only=_flex_forward_only),
    Provider(OURS, _always, _prepare_ours),
)


def no_gluon(
    dtype: torch.dtype, head_dim: int, head_dim_v: int, scale: float, device: torch.device
) -> str | None:
    """Why the optional Hopper forward can't serve a call without further options, or None."""
    try:
        from prefix_attn.backends.triton import arch_of
        from prefix_attn.kernels import gluon_forward
    except ImportError as error:
        return f"this Triton has no such Gluon ({error})"
    arch = arch_of(device) if device.type == "cuda" else 0
    return gluon_forward.why_not(arch, dtype, head_dim, head_dim_v, Options(scale), None)


def _no_gluon(case: Case, device: torch.device) -> str | None:
    return no_gluon(case.torch_dtype, case.head_dim, case.head_dim, 1.0, device)


@contextmanager
def gluon() -> Iterator[None]:
    """Calls of ours take the optional Hopper forward."""
    before = os.environ.get(FORWARD_VARIABLE, "triton")
    os.environ[FORWARD_VARIABLE] = "gluon"
    try:
        yield
    finally:
        os.environ[FORWARD_VARIABLE] = before


def _prepare_gluon(problem: Problem) -> Prepared:
    prepared = _prepare_ours(problem)

    def forward() -> Tensor:
        with gluon():
            return prepared.forward()

    return replace(prepared, forward=forward)


# Names of the modes that compute the same as ours in another way.
FUSED, GLUON = f"{OURS} deterministic=False", f"{OURS} gluon"


def modes(window_size: int) -> tuple[Provider, ...]:
    """Ways to call ours: first those that compute the same, then those that don't."""
    changes: tuple[tuple[str, dict[str, Any]], ...] = (
        (f"window {window_size}", {"window_size": window_size}),
        ("softcap 30", {"softcap": 30.0}),
        ("sinks", {"sinks": True}),
        ("prefix_causal=False", {"prefix_causal": False}),
    )
    return (
        Provider(FUSED, _always, partial(_prepare_ours, deterministic=False)),
        Provider(GLUON, _no_gluon, _prepare_gluon),
        *(
            Provider(f"{OURS} {name}", _always, partial(_prepare_ours, **options), changes=options)
            for name, options in changes
        ),
    )


MODES = modes(1024)
