"""Vision-language models: logits and all gradients, tower included, against ordinary batches."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import prefix_attn  # noqa: E402
from prefix_attn.integrations.transformers.pictures import PICTURE_MODELS  # noqa: E402
from tests.integrations.test_transformers_exact import EXACT  # noqa: E402
from tests.integrations.tiny_models import (  # noqa: E402
    KeepDouble,
    build,
    deviation,
    pad,
    rows_that_share,
    run,
    tiny_config,
)
from tests.integrations.tiny_pictures import MEMBERS, vision_model  # noqa: E402

ROUNDING = 1e-11
# Masks whose blocks can be told from other rules.
READS_BLOCKS = hasattr(transformers.masking_utils, "blockwise_overlay")


@pytest.fixture(autouse=True)
def sample_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers sample positions in float32, which must not differ in type from their weights."""
    sample = torch.nn.functional.grid_sample

    def grid_sample(x: Any, grid: Any, *args: Any, **kwargs: Any) -> Any:
        return sample(x, grid.to(x.dtype), *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grid_sample", grid_sample)


def exactly(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A run in float64 throughout."""
    with KeepDouble():
        return run(model, batch)


def compared(model: Any, batch: dict[str, Any], **options: Any) -> Any:
    """Checks the enabled model against itself, and returns what it counted."""
    want = exactly(model, batch)
    prefix_attn.enable(model, self_check=False, **{"min_ratio": 1.0, **options})
    found = exactly(model, batch)
    tower = [name for name in want if any(part in name for part in ("visual", "vision"))]
    assert tower, "no gradient of the tower"
    assert deviation(found, want) <= ROUNDING
    return prefix_attn.stats(model)


@pytest.mark.parametrize("differ", [False, True], ids=["equal", "different"])
@pytest.mark.parametrize("model_type", sorted(PICTURE_MODELS))
def test_logits_and_gradients_are_those_of_the_ordinary_batch(model_type, differ):
    """The second prompt holds two pictures; with `differ` one member has other ones."""
    side = "left" if differ else "right"
    model, batch = vision_model(model_type, side, differ=differ)
    counts = compared(model, batch)
    assert (counts.pictures_in, counts.pictures_run) == (3 * MEMBERS, 6 if differ else 3)
    assert not counts.pictures_repeated
    assert counts.packed_calls == 1, counts.passed_through
    assert counts.ratio > 1.2


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "gemma4"])
def test_videos_run_once_as_pictures_do(model_type):
    model, batch = vision_model(model_type, video=True)
    if not batch.keys() <= inspect.signature(model.forward).parameters.keys():
        pytest.skip("this version takes the frames of videos in another shape")
    counts = compared(model, batch)
    assert (counts.pictures_in, counts.pictures_run) == (3 * MEMBERS, 3)
    assert counts.ratio > 1.2


@pytest.mark.parametrize(
    "changes",
    [
        {"bidirectional": None},
        {"per_layer": 0},
        {"head_dim": 512},
    ],
    ids=["causal pictures", "no further inputs", "heads of 512"],
)
def test_variants_of_gemma4_are_exact(changes):
    """On a CPU its layers of full attention may have the heads that its checkpoints have."""
    model, batch = vision_model("gemma4", **changes)
    assert compared(model, batch).ratio > 1.2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl"])
def test_recomputed_layers_see_the_same_blocks_and_features(model_type, reentrant):
    model, batch = vision_model(model_type)
    prefix_attn.enable(model, self_check=False, min_ratio=1.0, share_pictures=False)
    want = run(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = run(model, batch)
    assert prefix_attn.stats(model).packed_calls == 2
    # The gradient of the tower is lost in reentrant checkpoints, as it is without enable.
    lost = {name for name in want if name not in found}
    assert not lost or reentrant
    assert deviation(found, {name: x for name, x in want.items() if name in found}) <= 1e-6


def test_the_self_check_passes_decoders_of_pictures():
    model, batch = vision_model("qwen3_vl")
    prefix_attn.enable(model)
    model(**batch, use_cache=False)
    assert prefix_attn.stats(model).packed_calls == 1


# ---- blocks that see all of themselves ----------------------------------------------------------


@pytest.mark.skipif(not READS_BLOCKS, reason="its masks can't be read in this version")
def test_a_picture_is_shared_whole_or_not_at_all():
    """Pictures that differ in their last row of pixels, and so in the embedding of one token."""
    model, batch = vision_model("gemma4")
    picture = batch["mm_token_type_ids"][0].nonzero().flatten().tolist()

    def other_in_its_last_token(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeddings = kwargs["inputs_embeds"].clone()
        embeddings[0, picture[-1]] += 1.0
        return args, {**kwargs, "inputs_embeds": embeddings}

    model.get_decoder().register_forward_pre_hook(other_in_its_last_token, with_kwargs=True)
    counts = compared(model, batch)
    mask = batch["attention_mask"]
    prompts = [picture[-1] + 5, int((batch["mm_token_type_ids"][-1] > 0).nonzero()[-1]) + 4]
    whole = int(mask.sum()) - (MEMBERS - 1) * sum(prompts)
    # One member of the first group shares what lies before the picture, and nothing of it.
    assert counts.tokens_run == whole + prompts[0] - picture[0]


@pytest.mark.skipif(not READS_BLOCKS, reason="its masks can't be read in this version")
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_window_shorter_than_a_picture(side):
    """The window ends what a token of the picture sees behind it, or the batch passes through."""
    model, batch = vision_model("gemma3", side, sliding_window=3)
    counts = compared(model, batch)
    reason = "a sliding window of 3 is shorter than a picture of 4 tokens, "
    if counts.passed_through:
        assert str(next(iter(counts.passed_through))).startswith(reason)
    else:
        assert counts.ratio > 1.2


@pytest.mark.skipif(not READS_BLOCKS, reason="its masks can't be read in this version")
def test_prompts_of_prefix_language_models_need_their_mask():
    """Without types of tokens a prompt of PaliGemma is not told from what was written."""
    model, batch = vision_model("paligemma")
    del batch["token_type_ids"]
    model.eval()
    counts = compared(model, batch)
    assert list(counts.passed_through) == [
        "no mask of an outer model says where the layers are causal"
    ]


@pytest.mark.skipif(not READS_BLOCKS, reason="its masks can't be read in this version")
def test_compiled_models_let_pictures_see_all_of_themselves():
    """The masks of an outer model are then made in compiled code, and read in eager code."""
    model, batch = vision_model("gemma3")
    model.float().eval()
    batch["pixel_values"] = batch["pixel_values"].float()
    keep = batch["attention_mask"].bool()
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(**batch, use_cache=False).logits[keep]
        prefix_attn.enable(model, self_check=False, min_ratio=1.0)
        compiled = torch.compile(model, backend="eager")
        found = compiled(**batch, use_cache=False).logits[keep]
    assert prefix_attn.stats(model).packed_calls == 1
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


# ---- what is told apart -------------------------------------------------------------------------


def test_pictures_with_another_grid_are_others():
    """The pixels of the second group's pictures are equal, the first is as high as it was wide."""
    model, batch = vision_model("qwen2_5_vl")
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        batch[name] = batch[name][MEMBERS:]
    batch["pixel_values"] = batch["pixel_values"][-MEMBERS * 48 :]
    batch["image_grid_thw"] = batch["image_grid_thw"][MEMBERS:]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 8], [1, 4, 4]] * MEMBERS
    batch["image_grid_thw"][0] = torch.tensor([1, 8, 4])
    counts = compared(model, batch)
    assert (counts.pictures_in, counts.pictures_run) == (2 * MEMBERS, 3)


@pytest.mark.parametrize("value", [0.0, float("nan")], ids=["sign of zero", "nan"])
def test_pictures_are_compared_bit_for_bit(value):
    model, batch = vision_model("gemma3")
    pixels = batch["pixel_values"]
    pixels[:MEMBERS, 0, 0, 0] = value
    prefix_attn.enable(model, self_check=False)
    with torch.no_grad():
        model(**batch, use_cache=False)
        counts = prefix_attn.stats(model)
        assert counts.pictures_run == 3  # NaN is the like of itself
        pixels[0, 0, 0, 0] = -pixels[0, 0, 0, 0]
        model(**batch, use_cache=False)
    assert counts.pictures_run == 3 + 4


def test_colliding_checksums_of_pictures_are_noticed(monkeypatch):
    from prefix_attn.integrations.transformers import pictures

    monkeypatch.setattr(pictures, "checksums", lambda bits: torch.zeros(len(bits)).long())
    model, batch = vision_model("llava")
    counts = compared(model, batch)
    assert list(counts.pictures_repeated) == ["pictures differ where their checksums agree"]


def test_equal_embeddings_with_other_features_are_not_shared():
    """Qwen3-VL adds features of a picture in some layers: they are part of what must be equal."""
    model, batch = vision_model("qwen3_vl")
    decoder, keep = model.get_decoder(), batch["attention_mask"].bool()
    embeddings = decoder.get_input_embeddings()(batch["input_ids"]).detach()
    places = batch["mm_token_type_ids"].bool()
    number = int(places.sum())
    features = [torch.randn(number, 64, dtype=torch.float64) for _ in range(2)]
    call = {
        "inputs_embeds": embeddings,
        "attention_mask": batch["attention_mask"],
        "visual_pos_masks": places,
        "use_cache": False,
    }

    def run_with(features: list[torch.Tensor]) -> torch.Tensor:
        return decoder(**call, deepstack_visual_embeds=features).last_hidden_state[keep]

    with torch.no_grad():
        want = run_with(features)
        prefix_attn.enable(model, self_check=False, min_ratio=1.0)
        found = run_with(features)
        counts = prefix_attn.stats(model)
        apart = counts.tokens_run
        run_with([torch.ones(number, 64, dtype=torch.float64)] * 2)
    assert (found - want).abs().max() <= ROUNDING * want.abs().max()
    assert apart > counts.tokens_run - apart
    leaf = features[0].clone().requires_grad_()
    run_with([leaf, features[1]])
    reason = "the gradient of deepstack_visual_embeds itself is wanted"
    assert list(counts.passed_through) == [reason]


@pytest.mark.parametrize("differ", [False, True], ids=["equal", "different"])
def test_inputs_of_each_layer_are_packed_with_their_tokens(differ):
    """Gemma 3n; with `differ` the embeddings of a place are equal, and its further inputs not."""
    model = build(tiny_config("gemma3n_text", **EXACT["gemma3n_text"]))
    decoder, batch = model.model, pad(rows_that_share())
    keep = batch["attention_mask"].bool()

    def run_decoder() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        further = decoder.get_per_layer_inputs(batch["input_ids"])
        if differ:
            scale = torch.ones(*batch["input_ids"].shape, 1, 1, dtype=torch.float64)
            scale[0, 2] = 2.0
            further = further * scale
        hidden = decoder(
            inputs_embeds=decoder.embed_tokens(batch["input_ids"]),
            per_layer_inputs=further,
            attention_mask=batch["attention_mask"],
            use_cache=False,
        ).last_hidden_state[keep]
        torch.tanh(hidden).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"logits": hidden.detach(), **grads}

    with KeepDouble():
        want = run_decoder()
        prefix_attn.enable(model, min_ratio=1.0)
        assert deviation(run_decoder(), want) <= ROUNDING
    layout, _ = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    # A row of another kind shares two tokens instead of 13.
    assert prefix_attn.stats(model).tokens_run == layout.num_tokens + (11 if differ else 0)


# ---- when every copy runs -----------------------------------------------------------------------


def drop_after_projection(model: Any) -> None:
    tower = model.model.vision_tower
    tower.register_module("drop", torch.nn.Dropout(0.1))


def drop_attention(model: Any) -> None:
    next(m for m in model.model.vision_tower.modules() if hasattr(m, "dropout")).dropout = 0.1


def drop_paths(model: Any) -> None:
    model.model.vision_tower.drop_path_rate = 0.1


def normalise_batches(model: Any) -> None:
    model.model.vision_tower.register_module("norm", torch.nn.BatchNorm2d(3))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop_after_projection, r"vision_tower\.drop \(Dropout\) drops in training: drop"),
        (drop_attention, r"vision_tower\..* drops in training: dropout"),
        (drop_paths, r"vision_tower \(.*\) drops in training: drop_path_rate"),
        (normalise_batches, r"vision_tower\.norm normalises over the pictures of a batch"),
    ],
    ids=["dropout", "attention", "stochastic depth", "batch norm"],
)
def test_a_tower_that_draws_noise_in_training_runs_every_copy(change, reason):
    model, batch = vision_model("llava")
    change(model)
    prefix_attn.enable(model, self_check=False)
    counts = prefix_attn.stats(model)
    model(**batch, use_cache=False)
    assert (counts.pictures_in, counts.pictures_run) == (9, 9)
    assert [bool(re.search(reason, x)) for x in counts.pictures_repeated] == [True]
    model.eval()
    model(**batch, use_cache=False)
    assert (counts.pictures_in, counts.pictures_run) == (18, 12)


def test_a_gradient_of_pixels_runs_every_copy():
    model, batch = vision_model("llava")
    batch["pixel_values"].requires_grad_()
    run(model, batch)
    want = batch["pixel_values"].grad.clone()
    batch["pixel_values"].grad = None
    prefix_attn.enable(model, self_check=False, min_ratio=1.0)
    run(model, batch)
    torch.testing.assert_close(batch["pixel_values"].grad, want, rtol=1e-9, atol=1e-9)
    counts = prefix_attn.stats(model)
    assert list(counts.pictures_repeated) == ["the gradient of pixel_values is wanted"]


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_keywords_of_the_loss_and_the_decoder_are_none_of_the_tower(model_type):
    """Some models hand all their keywords to the tower."""
    model, batch = vision_model(model_type)
    batch["num_items_in_batch"] = torch.tensor(7)
    batch["experts"] = batch["input_ids"][..., None] % 3
    counts = compared(model, batch, token_keywords=["experts"])
    assert (counts.pictures_in, counts.pictures_run) == (9, 3), counts.pictures_repeated
    assert counts.ratio > 1.2


def test_an_unknown_tensor_runs_every_copy():
    model, batch = vision_model("llava")
    prefix_attn.enable(model, self_check=False)
    model.model.get_image_features(batch["pixel_values"], weights=torch.ones(9))
    assert list(prefix_attn.stats(model).pictures_repeated) == ["the keyword weights"]


def test_a_traced_tower_runs_every_picture():
    """Which pictures of the traced call were equal must not be part of the trace."""
    model, batch = vision_model("llava")
    features = model.model.get_image_features
    pixels = batch["pixel_values"]
    other = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(7)).to(pixels)

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.model

        def forward(self, pixels):
            return torch.cat(self.model.get_image_features(pixels).pooler_output)

    with KeepDouble():
        want = torch.cat(features(other).pooler_output)
        prefix_attn.enable(model, self_check=False)
        traced = torch.jit.trace(Tower(), (pixels,), check_trace=False)
        torch.testing.assert_close(traced(other), want, rtol=1e-9, atol=1e-9)


def test_pictures_of_other_models_run_every_copy():
    model, batch = vision_model("llava")
    model.model.config.model_type = "another"
    counts = compared(model, batch)
    assert list(counts.pictures_repeated) == ["pictures of 'another' are not known"]


def test_hidden_states_of_a_tower_run_every_copy():
    model, batch = vision_model("llava")
    prefix_attn.enable(model, self_check=False)
    out = model.model.get_image_features(batch["pixel_values"], output_hidden_states=True)
    assert len(out.hidden_states[0]) == len(batch["pixel_values"])
    reason = "output_hidden_states of the tower"
    assert list(prefix_attn.stats(model).pictures_repeated) == [reason]


# ---- switching on and off -----------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llava", "gemma3", "qwen3_vl"])
def test_generation_reads_the_same_pictures(model_type):
    """It looks at the signature of the tower's methods for what to hand them."""
    model, batch = vision_model(model_type, "left", differ=True)
    model.float().eval()
    batch["pixel_values"] = batch["pixel_values"].float()
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    want = model.generate(**batch, **options)
    own = inspect.signature(model.model.get_image_features).parameters
    prefix_attn.enable(model, self_check=False)
    signature = inspect.signature(model.model.get_image_features)
    assert list(pickle.loads(pickle.dumps(signature)).parameters) == list(own)
    assert torch.equal(model.generate(**batch, **options), want)
    assert torch.equal(copy.deepcopy(model).generate(**batch, **options), want)
    counts = prefix_attn.stats(model)
    assert (counts.packed_calls, counts.pictures_repeated) == (0, {})
    assert counts.pictures_run < counts.pictures_in


def test_sharing_of_pictures_is_switched_alone():
    model, batch = vision_model("gemma3")
    counts = compared(model, batch, share_pictures=False)
    assert (counts.pictures_in, counts.packed_calls) == (0, 1)
    prefix_attn.enable(model)
    with torch.no_grad():
        model(**batch, use_cache=False)
    assert counts.pictures_run == 3
    prefix_attn.enable(model, share_pictures=False)
    assert "get_image_features" not in vars(model.model)


def test_disable_restores_the_methods_of_the_tower():
    model, _ = vision_model("qwen3_vl")
    own = model.model.get_video_features
    model.model.get_video_features = own
    prefix_attn.enable(model)
    assert model.model.get_video_features is not own
    prefix_attn.disable(model)
    assert model.model.get_video_features is own
    assert "get_image_features" not in vars(model.model)
    assert "_prefix_attn_pictures" not in vars(model.model)


def test_the_tower_runs_once_below_adapters():
    peft = pytest.importorskip("peft")
    model, batch = vision_model("llava")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_alpha=8)
    model = peft.get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(9))
    counts = compared(model, batch)
    assert (counts.pictures_in, counts.pictures_run) == (9, 3)
    assert counts.ratio > 1.2


def test_a_copy_runs_its_own_tower():
    model, batch = vision_model("llava")
    prefix_attn.enable(model, self_check=False)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        want = model(**batch, use_cache=False).logits
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(**batch, use_cache=False).logits, want)
    assert prefix_attn.stats(twin).pictures_run == prefix_attn.stats(model).pictures_run == 3


# ---- keywords that a caller names ---------------------------------------------------------------


def replaying(model: Any) -> None:
    """Lets the experts of each token be those that the keyword `routed_experts` names."""
    for i, layer in enumerate(model.model.layers):
        gate = layer.mlp.gate

        def remember(module: Any, args: Any, kwargs: Any, i: int = i, gate: Any = gate) -> None:
            gate.chosen = kwargs["routed_experts"][:, :, i].flatten(0, 1)

        def replay(hidden: torch.Tensor, gate: Any = gate) -> tuple[torch.Tensor, ...]:
            logits = hidden.flatten(0, -2) @ gate.weight.t()
            scores = torch.softmax(logits, -1).gather(1, gate.chosen)
            return logits, scores, gate.chosen

        layer.register_forward_pre_hook(remember, with_kwargs=True)
        gate.forward = replay


def test_routed_experts_are_replayed_and_part_of_what_is_shared():
    model = build(tiny_config("qwen3_moe"))
    replaying(model)
    batch = pad(rows_that_share())
    shape = batch["input_ids"].shape
    generator = torch.Generator().manual_seed(6)
    drawn = torch.rand(*shape[1:], 2, 4, generator=generator).argsort(-1)
    batch["routed_experts"] = drawn[..., :2].expand(shape[0], -1, -1, -1).clone()
    want = exactly(model, batch)
    prefix_attn.enable(model, min_ratio=1.0)
    assert deviation(exactly(model, batch), want) <= ROUNDING
    counts = prefix_attn.stats(model)
    assert list(counts.passed_through) == ["the keyword routed_experts"]

    prefix_attn.enable(model, min_ratio=1.0, token_keywords=["routed_experts"])
    assert deviation(exactly(model, batch), want) <= ROUNDING
    layout, _ = prefix_attn.PrefixLayout.from_sequences(rows_that_share())
    assert counts.tokens_run == layout.num_tokens
    # Row 0 alone took the other experts at its third token: it shares two tokens instead of 13.
    batch["routed_experts"][0, 2] = drawn[2, :, 2:]
    prefix_attn.disable(model)
    want = exactly(model, batch)
    prefix_attn.enable(model, min_ratio=1.0, token_keywords=["routed_experts"])
    assert deviation(exactly(model, batch), want) <= ROUNDING
    assert prefix_attn.stats(model).tokens_run == layout.num_tokens + 11


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("routed_experts", "token_keywords must be a list of names, got 'routed_experts'"),
        (["labels"], "token_keywords must name further keywords of the decoder, got 'labels'"),
        ([3], "token_keywords must name further keywords of the decoder, got 3"),
    ],
)
def test_other_names_of_token_keywords_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        prefix_attn.enable(build(tiny_config("qwen3_moe")), token_keywords=names)


def test_token_keywords_of_another_shape_are_refused():
    model = build(tiny_config("qwen3_moe"))
    prefix_attn.enable(model, token_keywords=["routed_experts"])
    batch = pad(rows_that_share())
    rows, columns = batch["input_ids"].shape
    message = rf"routed_experts is a token keyword and must have shape \({rows}, {columns}, ...\)"
    with pytest.raises(ValueError, match=message):
        model(**batch, routed_experts=torch.zeros(rows, 2), use_cache=False)


def test_micro_groups_refuse_token_keywords():
    model = build(tiny_config("qwen3_moe"))
    prefix_attn.enable(model, token_keywords=["routed_experts"])
    batch = pad(rows_that_share())
    experts = torch.zeros(*batch["input_ids"].shape, 2, 2, dtype=torch.long)
    message = "micro_groups can't serve the token keyword routed_experts"
    with (
        pytest.raises(NotImplementedError, match=message),
        prefix_attn.micro_groups(model, [batch]),
    ):
        model(**batch, routed_experts=experts, use_cache=False)
