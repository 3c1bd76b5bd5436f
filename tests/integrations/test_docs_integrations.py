"""The examples of the documentation that need transformers or TRL run as they stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

import prefix_attn
from tests.docs_examples import names_of_nan, pages_to_run, run_examples
from tests.integrations.tiny_models import SMALL

GRPO = "docs/pages/grpo.md"
# Pages whose text says that the model is enabled already.
ENABLED = {"docs/pages/troubleshooting.md"}


def run(page: str) -> dict[str, Any]:
    """Runs a page; a model that it does not make is a tiny one."""
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL))
    if page in ENABLED:
        prefix_attn.enable(model)
    names = {"__name__": "example", "model": model, "prefix_attn": prefix_attn}
    return run_examples(page, names, integrations=True)


@pytest.fixture(scope="module")
def one_rank():
    """What torchrun would have started."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", [p for p in pages_to_run(integrations=True) if p != GRPO])
def test_python_examples_run(page, one_rank):
    assert names_of_nan(run(page)) == []


def test_grpo_example_packs_what_it_says():
    counts = prefix_attn.stats(run(GRPO)["model"])
    assert (counts.tokens_in, counts.tokens_run) == (432, 132)
