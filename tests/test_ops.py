"""The operators under everything that PyTorch does to operators."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from prefix_attn import PrefixLayout, ops, prefix_attention
from prefix_attn.backends import cpu
from prefix_attn.kernels.options import Options

LAYOUTS = [
    PrefixLayout.from_lengths([5, 3], [[2, 4], [1, 0, 7]]),  # ragged, an empty suffix
    PrefixLayout.from_lengths([6], [[3, 3]]),  # G = 1
    PrefixLayout.from_lengths([0], [[4, 9]]),  # empty prefix
    PrefixLayout.from_lengths([1, 2, 3], [[1], [2], [3]]),  # prefix of one, one member each
    PrefixLayout.from_lengths([17], [[]]),  # no member
    PrefixLayout.from_tree([4, 2, 1, 3, 5], [-1, 0, 1, 0, -1]),  # a tree
    PrefixLayout.from_lengths([33], [[40, 2]]),  # beyond one tile of queries
]
EMPTY = PrefixLayout.from_lengths([], [])


@pytest.fixture
def forward_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the CPU backend runs its forward pass."""
    calls: list[int] = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args: calls.append(1) or forward(*args))
    return calls


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(
    layout: PrefixLayout, dtype: torch.dtype = torch.float32, grad: bool = True, seed: int = 0
) -> list[Tensor]:
    """q (T, 4, 16), k (T, 2, 16), v (T, 2, 24)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 16), (2, 16), (2, 24)]
    return [
        torch.randn(layout.num_tokens, *shape, generator=generator).to(dtype).requires_grad_(grad)
        for shape in shapes
    ]


def attention_and_lse(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout) -> Any:
    return prefix_attention(q, k, v, layout, return_lse=True, backend="cpu")


def gradients(function: Callable[..., Any], layout: PrefixLayout, seed: int = 0) -> list[Tensor]:
    """out, lse, dq, dk, dv of a loss that weighs every element of out and lse differently."""
    leaves = inputs(layout, seed=seed)
    out, lse = function(*leaves, layout)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    loss = loss + (lse * torch.linspace(-1, 2, lse.numel()).view_as(lse)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


class Block(nn.Module):
    """A layer as models have it: a fused projection, attention, a projection back, residual."""

    def __init__(self, layout: PrefixLayout | None = None, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(width, 4 * 16 + 2 * 2 * 16)
        self.back = nn.Linear(4 * 16, width)
        self.layout = layout

    def forward(self, x: Tensor, layout: PrefixLayout | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 16)).split([4, 2, 2], dim=1)
        out = prefix_attention(q, k, v, layout or self.layout, backend="cpu")
        return x + self.back(out.flatten(1))


def block_gradients(
    run: Callable[[Block, Tensor, PrefixLayout], Tensor], layout: PrefixLayout
) -> list[Tensor]:
    """Output and the gradients of the input and of all parameters."""
    block = Block()
    x = torch.randn(layout.num_tokens, 32, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    out = run(block, x, layout)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])]


def test_new_memory_is_poisoned() -> None:
    """What conftest.py does to every test, the operators' own allocations included."""
    like = torch.zeros(3)
    for x in (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty((3,)).half()):
        assert bool(x.isnan().all())


# ---- opcheck, gradcheck ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*LAYOUTS[:3], LAYOUTS[5], EMPTY], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_operators_pass_opcheck(layout: PrefixLayout, dtype: torch.dtype) -> None:
    q, k, v = inputs(layout, dtype, grad=False)
    forward = torch.ops.prefix_attn.forward.default
    backward = torch.ops.prefix_attn.backward.default
    rest = (layout.segments, 0.25, None, None, True, True, "cpu")
    for sinks, has_dlse in ((None, False), (torch.zeros(4), True)):
        torch.library.opcheck(forward, (q, k, v, sinks, *rest))
        out, lse = forward(q, k, v, sinks, *rest)
        dlse = torch.randn_like(lse) if has_dlse else None
        saved = (q, k, v, out, lse, dlse, sinks, *rest)
        torch.library.opcheck(backward, (torch.randn_like(out), *saved))


def test_operators_pass_opcheck_on_strided_inputs() -> None:
    """Views of one fused tensor: the fakes must give the strides of the real results."""
    layout = LAYOUTS[0]
    q, k, v = torch.randn(layout.num_tokens, 8, 16).split([4, 2, 2], dim=1)
    forward = torch.ops.prefix_attn.forward.default
    rest = (None, layout.segments, 0.25, None, None, True, True, "cpu")
    torch.library.opcheck(forward, (q, k, v, *rest))
    out, lse = forward(q, k, v, *rest)
    dout = torch.ones(()).expand_as(out)
    torch.library.opcheck(
        torch.ops.prefix_attn.backward.default, (dout, q, k, v, out, lse, None, *rest)
    )


def test_operators_have_no_default_arguments() -> None:
    """The dispatcher drops arguments that equal their default: rules of DTensor would miss them."""
    for op in (torch.ops.prefix_attn.forward.default, torch.ops.prefix_attn.backward.default):
        assert not [x.name for x in op._schema.arguments if x.has_default_value()]


def test_operators_take_the_fields_of_options() -> None:
    """In their order: both build `Options` from what stands between the tensors and the backend."""
    names = Options._fields
    for op in (torch.ops.prefix_attn.forward.default, torch.ops.prefix_attn.backward.default):
        arguments = [x.name for x in op._schema.arguments]
        assert arguments[arguments.index("segments") + 1 :] == [*names, "backend"]


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_operators_stay_out_of_cuda_graphs(name: str) -> None:
    """A replayed graph would keep the layout that it was captured with."""
    overload = getattr(torch.ops.prefix_attn, name).default
    assert {torch.Tag.cudagraph_unsafe, torch.Tag.pt2_compliant_tag} <= set(overload.tags)


def test_operator_refuses_layout_for_other_tokens() -> None:
    q, k, v = inputs(LAYOUTS[0], grad=False)
    rest = (0.25, None, None, True, True, "cpu")
    with pytest.raises(ValueError, match=r"the layout has 12 rows of q, got \(22, 4, 16\)"):
        torch.ops.prefix_attn.forward(q, k, v, None, LAYOUTS[1].segments, *rest)
    with pytest.raises(ValueError, match=r"the layout has 12 rows of k, got \(22, 2, 16\)"):
        torch.ops.prefix_attn.forward(q[:12], k, v, None, LAYOUTS[1].segments, *rest)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "layout",
    [
        PrefixLayout.from_lengths([2, 0], [[1, 2], [1]]),
        PrefixLayout.from_tree([1, 2, 1, 2], [-1, 0, 1, 0]),
        PrefixLayout.from_lengths([3], [[0]]),
    ],
    ids=["groups", "tree", "empty suffix"],
)
def test_gradcheck(layout: PrefixLayout, backend: str) -> None:
    """out and lse both, all of q, k, v; undefined gradients of either output too."""
    tokens, generator = layout.num_tokens, torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(tokens, heads, 16, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (2, 1, 1)
    )
    assert torch.autograd.gradcheck(
        lambda *qkv: prefix_attention(*qkv, layout, scale=0.3, return_lse=True, backend=backend),
        (q, k, v),
    )


# ---- autograd -------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_gradient_of_some_inputs_matches_all(wanted: tuple[int, ...]) -> None:
    layout = LAYOUTS[0]
    expected = gradients(attention_and_lse, layout)[2:]
    leaves = inputs(layout, grad=False)
    for i in wanted:
        leaves[i].requires_grad_()
    out, lse = attention_and_lse(*leaves, layout)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    loss = loss + (lse * torch.linspace(-1, 2, lse.numel()).view_as(lse)).sum()
    loss.backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if i in wanted:
            assert_equal([leaf.grad], [expected[i]])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_summed_output_has_the_gradients_of_ones(backend: str) -> None:
    """`.sum().backward()` hands over a gradient with stride 0."""
    layout = LAYOUTS[0]
    leaves = inputs(layout)
    out = prefix_attention(*leaves, layout, backend=backend)
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    assert_equal(list(torch.autograd.grad(out.sum(), leaves)), list(ones))


def test_loss_of_lse_alone_matches_reference() -> None:
    """The gradient of out is then undefined."""
    layout = LAYOUTS[0]
    grads = []
    for backend in ("cpu", "reference"):
        leaves = inputs(layout, torch.float64)
        _, lse = prefix_attention(*leaves, layout, return_lse=True, backend=backend)
        grads.append(torch.autograd.grad(lse.square().sum(), leaves, allow_unused=True))
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if e is None else e)


def test_no_grad_records_nothing() -> None:
    leaves = inputs(LAYOUTS[0])
    with torch.no_grad():
        assert prefix_attention(*leaves, LAYOUTS[0], backend="cpu").grad_fn is None
    assert not prefix_attention(*inputs(LAYOUTS[0], grad=False), LAYOUTS[0]).requires_grad


def test_backward_twice_accumulates() -> None:
    leaves = inputs(LAYOUTS[0])
    out = prefix_attention(*leaves, LAYOUTS[0], backend="cpu")
    out.sum().backward(retain_graph=True)
    once = [x.grad.clone() for x in leaves]
    out.sum().backward()
    assert_equal([x.grad for x in leaves], [2 * x for x in once])
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


@pytest.mark.parametrize("loss", [torch.sum, lambda x: x.square().sum()], ids=["linear", "square"])
def test_double_backward_raises(loss: Callable[[Tensor], Tensor]) -> None:
    """Also when the gradient of out is a constant: no second derivative is lost in silence."""
    leaves = inputs(LAYOUTS[0])
    out = prefix_attention(*leaves, LAYOUTS[0], backend="cpu")
    grads = torch.autograd.grad(loss(out), leaves, create_graph=True)
    penalty = sum(grad.square().sum() for grad in grads)
    with pytest.raises(RuntimeError, match="differentiated once"):
        (penalty + loss(out)).backward()


def test_double_backward_of_reference_passes_gradgradcheck() -> None:
    layout = PrefixLayout.from_lengths([2], [[1, 1]])
    q, k, v = (torch.randn(4, 1, 16, dtype=torch.float64).requires_grad_() for _ in range(3))
    assert torch.autograd.gradgradcheck(
        lambda *qkv: prefix_attention(*qkv, layout, scale=0.3, backend="reference"), (q, k, v)
    )


def test_layout_may_be_dropped_before_backward() -> None:
    expected = gradients(attention_and_lse, LAYOUTS[0])

    def with_own_layout(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout) -> Any:
        own = PrefixLayout.from_lengths([5, 3], [[2, 4], [1, 0, 7]])
        result = attention_and_lse(q, k, v, own)
        del own
        return result

    assert_equal(gradients(with_own_layout, LAYOUTS[0]), expected)


def test_changing_an_input_before_backward_raises() -> None:
    q, k, v = inputs(LAYOUTS[0])
    k2 = k * 1
    out = prefix_attention(q, k2, v, LAYOUTS[0], backend="cpu")
    k2.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    "remake", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_remade_layout_gives_the_same_gradients(
    layout: PrefixLayout, remake: Callable[[PrefixLayout], PrefixLayout]
) -> None:
    remade = remake(layout)
    assert repr(remade) == repr(layout)
    assert torch.equal(remade.materialize(), layout.materialize())
    assert_equal(gradients(attention_and_lse, remade), gradients(attention_and_lse, layout))


def test_threads_do_not_disturb_one_another() -> None:
    work = [(layout, seed) for seed in range(4) for layout in LAYOUTS]
    expected = [gradients(attention_and_lse, layout, seed) for layout, seed in work]
    with ThreadPoolExecutor(2) as pool:
        actual = pool.map(lambda job: gradients(attention_and_lse, *job), work)
        for a, e in zip(actual, expected, strict=True):
            assert_equal(a, e)


# ---- torch.func -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_func_grad_matches_autograd(backend: str) -> None:
    layout = LAYOUTS[0]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = prefix_attention(q, k, v, layout, return_lse=True, backend=backend)
        return out.square().sum() + lse.sin().sum()

    leaves = inputs(layout)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    actual = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs(layout, grad=False))
    assert_equal(list(actual), list(expected))


def test_functional_call_matches_module() -> None:
    layout = LAYOUTS[5]
    block = Block(layout)
    x = torch.randn(layout.num_tokens, 32)
    parameters = {name: p.detach() for name, p in block.named_parameters()}
    actual = torch.func.grad(lambda p: torch.func.functional_call(block, p, (x,)).square().sum())(
        parameters
    )
    block(x).square().sum().backward()
    assert_equal(list(actual.values()), [p.grad for p in block.parameters()])


# ---- checkpointing --------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_checkpoint_matches_plain(
    layout: PrefixLayout, use_reentrant: bool, forward_calls: list[int]
) -> None:
    expected = block_gradients(lambda block, x, layout: block(x, layout), layout)
    forward_calls.clear()

    def checkpointed(block: Block, x: Tensor, layout: PrefixLayout) -> Tensor:
        return checkpoint(block, x, layout, use_reentrant=use_reentrant)

    if use_reentrant:  # which has no torch.autograd.grad
        block = Block()
        x = torch.randn(layout.num_tokens, 32, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        out = checkpointed(block, x, layout)
        out.square().sum().backward()
        actual = [out.detach(), x.grad, *(p.grad for p in block.parameters())]
    else:
        actual = block_gradients(checkpointed, layout)
    assert_equal(actual, expected)
    assert len(forward_calls) == 2  # once more in backward


def test_selective_checkpoint_keeps_attention(forward_calls: list[int]) -> None:
    """A policy that saves the operator by name: everything else runs again, attention does not."""
    projections = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op is torch.ops.prefix_attn.forward.default:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(block: Block, x: Tensor, layout: PrefixLayout) -> Tensor:
        block.qkv.register_forward_hook(lambda *args: projections.append(1))
        return checkpoint(
            block,
            x,
            layout,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )

    layout = LAYOUTS[0]
    expected = block_gradients(lambda block, x, layout: block(x, layout), layout)
    forward_calls.clear()
    assert_equal(block_gradients(checkpointed, layout), expected)
    assert len(forward_calls) == 1
    assert len(projections) == 2


# ---- FLOPs ----------------------------------------------------------------------------------


def flops(run: Callable[[], Any]) -> dict[str, int]:
    """What PyTorch's counter counts, by operator."""
    with FlopCounterMode(display=False) as counter:
        run()
    return {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize(
    "options",
    [{}, {"prefix_causal": False}, {"window_size": 3}, {"window_size": 3, "prefix_causal": False}],
    ids=str,
)
@pytest.mark.parametrize(
    "layout", [*LAYOUTS, LAYOUTS[0].queries_for([1, 2, 6]), LAYOUTS[5].queries_for([0])], ids=repr
)
def test_counted_flops_are_those_of_allowed_pairs(
    layout: PrefixLayout, options: dict[str, Any]
) -> None:
    """Two products forward and five backward; D 16 and DV 24 tell the products apart."""
    pairs = int(layout.materialize(**options).sum())
    rest = (layout.segments, 0.25, None, options.get("window_size"))
    rest = (*rest, options.get("prefix_causal", True), True, "cpu")
    q, k, v = inputs(layout, grad=False)
    q = q[layout.query_rows]
    out, lse = torch.empty(len(q), 4, 24), torch.empty(4, len(q))
    # The formulas alone: no backend serves all of these here.
    registered = torch.utils.flop_counter.flop_registry
    ops = torch.ops.prefix_attn
    forward = registered[ops.forward](q, k, v, None, *rest, out_val=(out, lse))
    backward = registered[ops.backward](out, q, k, v, out, lse, None, None, *rest, out_val=())
    assert forward == 4 * pairs * (2 * 16 + 2 * 24)
    assert backward == 4 * pairs * (6 * 16 + 4 * 24)


def test_flop_counter_counts_both_operators() -> None:
    layout = PrefixLayout.from_lengths([64], [[16, 16]])
    pairs = int(layout.materialize().sum())
    forward, backward = 4 * pairs * 80, 4 * pairs * 192
    expected = {"prefix_attn.forward": forward, "prefix_attn.backward": backward}
    assert flops(lambda: gradients(attention_and_lse, layout)) == expected
    block = Block()

    def step() -> None:
        x = torch.zeros(layout.num_tokens, 32, requires_grad=True)
        checkpoint(block, x, layout, use_reentrant=False).sum().backward()

    assert flops(step)["prefix_attn.forward"] == 2 * 4 * pairs * 64  # run again in the backward


def test_flop_counter_counts_the_dense_products_of_the_reference() -> None:
    layout = LAYOUTS[0]
    q, k, v = inputs(layout, grad=False)
    counted = flops(lambda: prefix_attention(q, k, v, layout, backend="reference"))
    assert counted == {"aten.bmm": 4 * layout.num_tokens**2 * 80}


def test_flops_of_fake_tensors_are_those_of_all_pairs() -> None:
    """Where shapes alone are known, as to a partitioner, the count is an upper bound."""
    layout = LAYOUTS[0]
    q, k, v = inputs(layout, grad=False)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v, layout.segments)]
        *tensors, segments = fakes
        rest = (None, segments, 0.25, None, None, True, True, "cpu")
        counted = flops(lambda: torch.ops.prefix_attn.forward(*tensors, *rest))
    assert counted == {"prefix_attn.forward": 4 * layout.num_tokens**2 * 80}


# ---- torch.compile, torch.export ------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_public_function_compiles_fullgraph(backend: str) -> None:
    """At most three compilations over seven layouts, and the bits of eager mode."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(attention_and_lse, fullgraph=True, backend=counter)
    for layout in [*LAYOUTS, *reversed(LAYOUTS)]:
        assert_equal(gradients(compiled, layout), gradients(attention_and_lse, layout))
    assert 1 <= counter.frame_count <= 3


@pytest.mark.usefixtures("fresh_dynamo")
def test_model_compiles_fullgraph() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def two_layers(block: Block, x: Tensor, layout: PrefixLayout) -> Tensor:
        return block(block(x, layout).relu(), layout)

    compiled = torch.compile(two_layers, fullgraph=True, backend=counter)
    block = Block()
    for layout in LAYOUTS:
        x = torch.randn(layout.num_tokens, 32, generator=torch.Generator().manual_seed(1))
        results = []
        for function in (compiled, two_layers):
            leaf = x.clone().requires_grad_()
            out = function(block, leaf, layout)
            grads = torch.autograd.grad(out.square().sum(), [leaf, *block.parameters()])
            results.append([out.detach(), *grads])
        for a, e in zip(*results, strict=True):
            torch.testing.assert_close(a, e)
    assert 1 <= counter.frame_count <= 3


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_checkpoint_matches_plain() -> None:
    layout = LAYOUTS[0]

    def checkpointed(block: Block, x: Tensor, layout: PrefixLayout) -> Tensor:
        return checkpoint(block, x, layout, use_reentrant=False)

    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    expected = block_gradients(lambda block, x, layout: block(x, layout), layout)
    for a, e in zip(block_gradients(compiled, layout), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_module_exports(strict: bool) -> None:
    """The layout is part of the module; the operator is one node of the graph."""
    layout = LAYOUTS[0]
    block = Block(layout).eval()
    x = torch.randn(layout.num_tokens, 32)
    program = torch.export.export(block, (x,), strict=strict)
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    targets = [node.target for graph in graphs for node in graph.nodes]
    assert targets.count(torch.ops.prefix_attn.forward.default) == 1
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("function", [ops.PrefixAttention, ops.PrefixAttentionBackward])
def test_arguments_are_bound_as_python_binds_them(function):
    """In short where all are given in order, which is how the package calls; else as ever."""
    signature = inspect.signature(function.forward)
    usual = inspect.Signature(list(signature.parameters.values()))
    names = list(signature.parameters)
    values = list(range(len(names)))
    for args, kwargs in ((values, {}), (values[:-1], {names[-1]: values[-1]})):
        found, expected = signature.bind(*args, **kwargs), usual.bind(*args, **kwargs)
        found.apply_defaults()
        assert (found.args, found.kwargs) == (expected.args, expected.kwargs)
        assert found.arguments == expected.arguments
    with pytest.raises(TypeError, match="missing a required argument"):
        signature.bind(*values[:-1])
