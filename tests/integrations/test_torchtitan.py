"""torchtitan's Qwen3 with our inner attention: logits and gradients of its own."""

from __future__ import annotations

import pytest
import torch
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.muse_glimmer import _debugmodel as _debugmodel_of_muse
from torchtitan.models.qwen3 import _debugmodel

from prefix_attn import PrefixLayout
from prefix_attn.integrations.torchtitan import (
    PrefixAttention,
    layout_of_positions,
    serve_masks,
)

EXACT = 1e3 * torch.finfo(torch.float64).eps
ROUNDING = 1e2 * torch.finfo(torch.float32).eps  # torchtitan rotates in single precision


def build(inner):
    config = _debugmodel("flex")
    config.layers = config.layers[:2]
    for layer in config.layers:
        layer.attention.inner_attention = inner
    model = config.build().double()
    torch.manual_seed(1)
    model.init_states()
    return model


def rows_that_share():
    torch.manual_seed(0)
    prefix = torch.randint(2048, (13,))
    return [torch.cat([prefix, torch.randint(2048, (n,))]) for n in (5, 8, 3)]


def test_packed_row_matches_each_sequence_alone():
    ours = serve_masks(build(PrefixAttention.Config()))
    plain = build(ScaledDotProductAttention.Config())
    plain.load_state_dict(ours.state_dict())
    rows = rows_that_share()
    layout, ids = PrefixLayout.from_sequences(rows)
    positions = layout.position_ids[None]
    masks = ours.get_attention_masks(positions)  # as the trainer asks for them
    assert masks.num_tokens == 13 + 5 + 8 + 3
    out = ours(ids[None], positions=positions, attention_masks=masks)[0]
    total = 0.0
    for i, row in enumerate(rows):
        right = plain(row[None], positions=torch.arange(len(row))[None])[0]
        found = out[layout.sequence_rows(i)]
        assert (found - right).norm() < EXACT * right.norm()
        total = total + right.square().sum()
    total.backward()
    sum(out[layout.sequence_rows(i)].square().sum() for i in range(len(rows))).backward()
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (q.grad - p.grad).norm() < ROUNDING * p.grad.norm(), name


@pytest.mark.parametrize("seed", range(20))
def test_positions_say_the_layout(seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 9, (1,), generator=generator).item()
    lengths = torch.randint(1, 6, (counts,), generator=generator).tolist()
    parents, path = [], []
    for i in range(counts):
        del path[torch.randint(len(path) + 1, (1,), generator=generator).item() :]
        parents.append(path[-1] if path else -1)
        path.append(i)
    layout = PrefixLayout.from_tree(lengths, parents)
    found = layout_of_positions(layout.position_ids[None])
    assert found.materialize().equal(layout.materialize())
    assert found.position_ids.equal(layout.position_ids)


def test_what_is_no_packed_row_is_refused():
    with pytest.raises(ValueError, match=r"position 3 of row 1 continues a path of 1 rows"):
        layout_of_positions(torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match=r"positions must have shape \(1, T\), got \(2, 3\)"):
        layout_of_positions(torch.zeros(2, 3))
    attention = PrefixAttention.Config().build()
    q = torch.randn(1, 4, 2, 8)
    layout = PrefixLayout.from_lengths([2], [[1, 1]])
    with pytest.raises(TypeError, match="takes a PrefixLayout as attention_masks, got NoneType"):
        attention(q, q, q)
    with pytest.raises(ValueError, match=r"q must have shape \(1, T, Hq, D\), got \(3, 4, 2, 8\)"):
        attention(q.expand(3, -1, -1, -1), q, q, attention_masks=layout)
    with pytest.raises(NotImplementedError, match="does not know softcap"):
        attention(q, q, q, attention_masks=layout, softcap=3.0)
    with pytest.raises(NotImplementedError, match="does not know sinks"):
        attention(q, q, q, attention_masks=layout, sinks=torch.zeros(2))
    with pytest.raises(NotImplementedError, match="is causal, got is_causal=False"):
        attention(q, q, q, attention_masks=layout, is_causal=False)
    options = {"is_causal": True, "block_mask": None, "return_lse": False}
    assert attention(q, q, q, attention_masks=layout, **options).shape == q.shape


def test_windows_of_layers_are_not_lost():
    """torchtitan puts the windows of Muse Glimmer into its masks, which a layout stands in for."""
    config = _debugmodel_of_muse("flex")
    config.layers = config.layers[:1]
    attention = config.layers[0].attention
    attention.inner_attention = PrefixAttention.Config()
    message = r"attention has a window of 128, its PrefixAttention None: .*\(window_size=128\)"
    with torch.device("meta"), pytest.raises(NotImplementedError, match=message):
        serve_masks(config.build())
    attention.inner_attention = PrefixAttention.Config(window_size=128)
    with torch.device("meta"):
        model = serve_masks(config.build())
    assert model.get_attention_masks(torch.arange(3)[None]).num_tokens == 3
