"""TRL's GRPOTrainer on a tiny vision-language model: enabled against the ordinary run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers.models.qwen2 import modeling_qwen2
from trl.trainer import grpo_trainer

import prefix_attn
from tests.integrations.test_trl import (
    GENERATIONS,
    WORDS,
    KeepGroupsGRPO,
    exact_norm,
    plain_head,
    rollouts,
    sentence,
)
from tests.integrations.tiny_models import deviation

IMAGE = "<image>"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def processor() -> Any:
    """Of pictures of 28 x 28 pixels, four tokens each."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS, IMAGE])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
    )
    size = {"height": 28, "width": 28}
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size=size, do_convert_rgb=True
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def model() -> Any:
    text = transformers.Qwen2Config(
        vocab_size=98,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    tower = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    torch.manual_seed(0)
    made = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=text, vision_config=tower, image_token_id=97, vision_feature_layer=-1
        )
    )
    return made.double()


def prompts() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(8):
        pixels = torch.randint(0, 256, (28, 28, 3), generator=generator, dtype=torch.uint8)
        text = sentence(generator, 10, 20)
        rows.append(
            {
                "prompt": [{"role": "user", "content": text}],
                "image": PIL.Image.fromarray(pixels.numpy()),
            }
        )
    return Dataset.from_list(rows)


def reward(completions: list[Any], **columns: Any) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [
        sum(int(word[1:]) for word in text.split() if word[1:].isdigit()) / 100 for text in texts
    ]


class KeepStep(transformers.TrainerCallback):
    """Copies the gradients before the optimizer's step."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None:
                self.grads[name] = parameter.grad.clone()


def train(
    processor: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *, enabled: bool
) -> tuple[dict[str, Tensor], Any]:
    """Gradients of one step in float64, and the trainer."""
    kept = KeepStep()
    with monkeypatch.context() as patch:
        patch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", exact_norm)
        patch.setattr(grpo_trainer, "add_fused_lm_head", plain_head)
        patch.setattr(transformers.LlavaForConditionalGeneration, "generate", rollouts())
        trainer = KeepGroupsGRPO(
            model=model(),
            args=trl.GRPOConfig(
                output_dir=str(folder),
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                num_generations=GENERATIONS,
                max_completion_length=10,
                max_steps=1,
                learning_rate=0.1,
                optim="sgd",
                max_grad_norm=0.0,
                seed=7,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                gradient_checkpointing=False,
            ),
            train_dataset=prompts(),
            processing_class=processor,
            callbacks=[kept],
            reward_funcs=reward,
        )
        if enabled:
            prefix_attn.enable(trainer.model)
        torch.manual_seed(0)
        trainer.train()
    return kept.grads, trainer


def test_grpo_with_pictures_matches_the_ordinary_run(processor, tmp_path, monkeypatch):
    want, _ = train(processor, tmp_path, monkeypatch, enabled=False)
    found, trainer = train(processor, tmp_path, monkeypatch, enabled=True)
    counts = prefix_attn.stats(trainer.model)
    assert (counts.packed_calls, counts.calls) == (2, 2), counts.passed_through
    assert (counts.pictures_in, counts.pictures_run) == (16, 4)
    assert counts.ratio > 1.5
    assert any("vision_tower" in name for name in want)
    ones = {"logits": torch.ones(1)}  # which it compares apart
    assert deviation({**found, **ones}, {**want, **ones}) <= 1e-11
