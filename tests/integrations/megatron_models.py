"""Tiny Megatron-core models on a CPU, and the batches and steps that tests compare.

Megatron-core asks for GPUs in a few places that have nothing to do with what it computes.
`serve_cpu` stands in for those. `each_sequence` stands in for attention over rows of several
sequences, which Megatron-core does not have without Transformer Engine.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial, partialmethod
from typing import Any

import torch
from torch.nn import functional as F

warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
torch.cuda.current_device = lambda: torch.device("cpu")

import megatron.core.fusions.fused_softmax as fused_softmax  # noqa: E402
import megatron.core.transformer.moe.moe_utils as moe_utils  # noqa: E402
import megatron.core.transformer.multi_latent_attention as latent  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_config import (  # noqa: E402
    MLATransformerConfig,
    TransformerConfig,
)

VOCAB = 64
EXACT = 1e3 * torch.finfo(torch.float64).eps
# Routers compute softmax in float32, and so do losses over a vocabulary.
ROUNDING = 1e2 * torch.finfo(torch.float32).eps

MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_aux_loss_coeff": 3.0,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_token_dispatcher_type": "alltoall",
    "add_bias_linear": False,
}


class NoStream:
    """A CUDA stream or event that does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: NoStream()


@contextlib.contextmanager
def parallel(tp: int = 1, pp: int = 1) -> Iterator[None]:
    """Model parallelism of the ranks of this run, on CPUs."""
    serve_cpu()
    parallel_state.initialize_model_parallel(tp, pp)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


@cache
def serve_cpu() -> None:
    """Replaces what asks for a GPU."""
    torch._dynamo.config.disable = True  # compiling each fused function takes seconds
    torch.cuda.Stream = torch.cuda.Event = NoStream
    torch.cuda.current_stream = lambda *_, **__: NoStream()
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.synchronize = lambda *_, **__: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.zeros = partial(zeros_on_cpu, torch.zeros)
    tensor_parallel.random.CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    tensor_parallel.random._get_all_rng_states = lambda: (torch.get_rng_state(), None, {})
    tensor_parallel.random._set_all_rng_states = lambda state, *_: torch.set_rng_state(state)
    fused_softmax.get_default_causal_mask = lambda n: torch.ones(n, n, dtype=torch.bool).triu(1)
    fused_softmax.get_sliding_window_causal_mask = sliding_window
    WrappedTorchNorm.__new__ = layer_norm
    moe_utils.te_general_gemm = None
    DotProductAttention.__init__ = partialmethod(init_of_latent, DotProductAttention.__init__)
    latent.HAVE_TE = False


def zeros_on_cpu(zeros: Callable[..., torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
    """The schedule of a pipeline counts tokens on a GPU."""
    if options.get("device") == "cuda":
        options["device"] = "cpu"
    return zeros(*args, **options)


def sliding_window(queries: int, keys: int, window: tuple[int, int]) -> torch.Tensor:
    """(Sq, Sk) bool, True where a key is hidden."""
    near = torch.ones(queries, keys, dtype=torch.bool)
    return ~near.tril(window[1]).triu(-window[0])


def layer_norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
    """PyTorch's, which Megatron-core takes without sequence parallelism alone."""
    norm = torch.nn.LayerNorm(hidden_size, eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def init_of_latent(
    self: DotProductAttention,
    original: Callable[..., None],
    *args: Any,
    k_channels: int | None = None,
    v_channels: int | None = None,
    **options: Any,
) -> None:
    """Takes heads whose values have another size, as latent attention asks for."""
    original(self, *args, **options)
    if v_channels is not None:
        self.hidden_size_per_partition = self.num_attention_heads_per_partition * v_channels


def config(**changes: Any) -> TransformerConfig:
    """Two layers, four heads on two key heads."""
    settings = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "params_dtype": torch.float64,
        "init_method_std": 0.2,
    }
    if changes.pop("mla", False):
        sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8, "add_bias_linear": False}
        sizes |= {"qk_head_dim": 8, "qk_pos_emb_head_dim": 8, "rope_type": "rope"}
        return MLATransformerConfig(**(settings | sizes | changes))
    return TransformerConfig(**(settings | {"num_query_groups": 2, "kv_channels": 8} | changes))


def build(settings: TransformerConfig, spec: Any = None, **arguments: Any) -> GPTModel:
    """A GPTModel in double precision, the same in every call."""
    torch.manual_seed(1)
    spec = spec or get_gpt_layer_local_spec(
        num_experts=settings.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=settings.qk_layernorm,
        multi_latent_attention=settings.multi_latent_attention,
    )
    defaults = {"position_embedding_type": "rope", "parallel_output": True}
    model = GPTModel(
        config=settings,
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        max_sequence_length=64,
        **(defaults | arguments),
    ).to(settings.params_dtype)
    for module in model.modules():
        if isinstance(module, DotProductAttention):
            module.forward = partial(each_sequence, module.forward, module)
    return model


def each_sequence(
    original: Callable[..., torch.Tensor],
    core: DotProductAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_seq_params: PackedSeqParams | None = None,
    **options: Any,
) -> torch.Tensor:
    """Attention of each sequence of a row by itself, zero at the padding behind it."""
    if packed_seq_params is None:
        return original(query, key, value, attention_mask, **options)
    lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
    padded = packed_seq_params.cu_seqlens_q_padded
    padded = packed_seq_params.cu_seqlens_q if padded is None else padded
    parts = []
    for begin, end, length in zip(padded[:-1].tolist(), padded[1:].tolist(), lengths, strict=True):
        own = slice(begin, begin + length)
        out = original(query[own, None], key[own, None], value[own, None], None)[:, 0]
        parts.append(F.pad(out, (0, 0, 0, end - begin - length)))
    return torch.cat(parts)


def rows_that_share() -> list[torch.Tensor]:
    """Two groups: prefixes of 11 and 6 tokens, suffixes of odd lengths."""
    torch.manual_seed(7)
    draw = partial(torch.randint, 1, VOCAB)
    groups = (draw((11,)), (5, 8, 3)), (draw((6,)), (2, 7))
    return [torch.cat([prefix, draw((n,))]) for prefix, ns in groups for n in ns]


def padded_batch(rows: list[torch.Tensor] | None = None, mask: str | None = "4d") -> dict[str, Any]:
    """(B, S) ids with padding on the right, and a mask: "4d", "keys", "2d" or None."""
    rows = rows_that_share() if rows is None else rows
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    length = ids.shape[1]
    valid = torch.arange(length) < lengths[:, None]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    masks = {
        "4d": later | ~valid[:, None, None] | ~valid[:, None, :, None],
        "keys": ~valid[:, None, None],
        "2d": valid,
        None: None,
    }
    positions = torch.arange(length).expand_as(ids)
    call = {"input_ids": ids, "position_ids": positions, "attention_mask": masks[mask]}
    return {"call": call, "read": valid}


def row_of_sequences(
    rows: list[torch.Tensor] | None = None,
    *,
    multiple: int = 1,
    named: bool = True,
    tail: int = 0,
    total: bool = False,
) -> dict[str, Any]:
    """One row of several sequences, each padded to a multiple of some length.

    Args:
        rows: the sequences.
        multiple: of which every padded length is one.
        named: whether padding counts as tokens of its sequence, as in verl; otherwise the bounds of
            sequences and of padded ones differ.
        tail: columns of padding that are a sequence of their own, as in slime.
        total: whether the row's length is given as that of the longest sequence.
    """
    rows = rows_that_share() if rows is None else rows
    padded = [F.pad(row, (0, -len(row) % multiple)) for row in rows]
    filler = [torch.zeros(tail, dtype=torch.long)] if tail else []
    ids = torch.cat([*padded, *filler])[None]
    lengths = [0, *map(len, [*rows, *filler])], [0, *map(len, [*padded, *filler])]
    inner, outer = torch.tensor(lengths).cumsum(1).int()
    longest = int(outer[-1]) if total else max(map(len, padded))
    read = torch.zeros(ids.shape, dtype=torch.bool)
    for begin, row in zip(outer.tolist(), rows, strict=False):
        read[0, begin : begin + len(row)] = True
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=outer if named else inner,
        cu_seqlens_kv=outer if named else inner,
        cu_seqlens_q_padded=outer,
        cu_seqlens_kv_padded=outer,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    call = {
        "input_ids": ids,
        "position_ids": None,
        "attention_mask": None,
        "packed_seq_params": params,
    }
    return {"call": call, "read": read}


def step(model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The logits that are read, and the gradients of a random sum of them."""
    model.zero_grad()
    out = model(**batch["call"])
    read = batch["read"]
    out = out.masked_fill(~read.view(*read.shape, *[1] * (out.dim() - 2)), 0)
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(out.shape, generator=generator, dtype=torch.float64)
    (out * weights).sum().backward()
    return {"out": out.detach()} | gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By name, zero where there is none."""
    named = dict(model.named_parameters())
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}


def deviation(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the norm of each tensor."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, right in expected.items():
        norm = float(right.norm())
        error = float((found[name] - right).norm())
        worst = max(worst, error / norm if norm else error)
    return worst
