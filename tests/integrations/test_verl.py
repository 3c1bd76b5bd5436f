"""verl's real FSDP engine on the CPU: shared prefixes against the ordinary run.

Needs verl 0.9.1 with transformers before 5.11; `make test-verl` has an environment for it.
"""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict
import transformers
import transformers.models.qwen3.modeling_qwen3
import verl
from torch import Tensor, nn
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform

import prefix_attn
import prefix_attn.integrations.transformers
from prefix_attn.integrations.verl import ENGINE, EngineFinder, serve_engine
from prefix_attn.testing import assert_model_within_budget, assert_within_budget

# Ranks are forked from a process that has imported this file. What verl imports with its first
# model, such as the configurations of all models, is imported here, or each rank would do it.
list(transformers.AutoModelForCausalLM._model_mapping)


class PlatformCPU(PlatformCUDA):
    """verl knows accelerators only: this one is the CPU."""

    device_name = "cpu"
    device_module = types.SimpleNamespace(
        **{name: getattr(torch.cpu, name) for name in torch.cpu.__all__},
        mem_get_info=lambda: (0, 0),
        memory_allocated=lambda: 0,
        memory_reserved=lambda: 0,
    )

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def communication_backend_name(self) -> str:
        return "gloo"


set_platform(PlatformCPU())  # before the engine is imported, which asks for it once

from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.workers.config import (  # noqa: E402
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
)
from verl.workers.engine.fsdp.transformer_impl import (  # noqa: E402
    FSDPEngineWithLMHead,
    FSDPEngineWithValueHead,
)

GROUPS = ((11, (5, 8, 3)), (6, (6, 2)), (9, (4,)))  # prompt and responses; one without siblings
OUTPUTS = {"log_probs", "entropy", "values"}
TOKENS, SHARED_TOKENS = 82, 54  # with every prompt repeated, and once


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meet = tmp_path_factory.mktemp("group") / "meet"
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save_model(path: str, **changes: Any) -> None:
    """A tiny model, as verl loads it."""
    config = transformers.Qwen3Config(
        **changes,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)


def save_adapter(path: str, model_path: str) -> None:
    """A LoRA adapter as a run leaves it: neither of its matrices is zero."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    peft.get_peft_model(model, config).save_pretrained(path)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("model"))
    save_model(path)
    save_adapter(f"{path}/adapter", path)
    return path


def load_without_flash_attention(patch: pytest.MonkeyPatch) -> None:
    """verl loads critics with flash attention 2, whatever its config says."""
    classes = transformers.AutoModelForTokenClassification
    load = classes.from_pretrained

    def from_pretrained(*args: Any, **options: Any) -> nn.Module:
        assert options["attn_implementation"] == "flash_attention_2"
        return load(*args, **{**options, "attn_implementation": "sdpa"})

    patch.setattr(classes, "from_pretrained", from_pretrained)


def new_engine(
    model_path: str,
    attention: str,
    fused: bool = False,
    strategy: str = "fsdp2",
    kind: str = "actor",
    **options: Any,
) -> FSDPEngineWithLMHead:
    """An engine as verl's workers make it, up to its model.

    Args:
        model_path: what `save_model` wrote.
        attention: `attn_implementation` of verl's config.
        fused: whether log-probs come from verl's fused head.
        strategy: fsdp or fsdp2.
        kind: actor, LoRA or critic.
        options: of verl's engine.
    """
    torch.manual_seed(0)
    kinds: dict[str, dict[str, Any]] = {
        "actor": {},
        "LoRA": {"lora_rank": 4, "lora_adapter_path": f"{model_path}/adapter"},
        "critic": {"model_type": "value_model"},
    }
    config = HFModelConfig(
        path=model_path,
        load_tokenizer=False,
        override_config={"attn_implementation": attention},
        use_fused_kernels=fused,
        fused_kernel_options={"impl_backend": "torch"} if fused else {},
        enable_gradient_checkpointing=True,
        **kinds[kind],
    )
    engine_config = FSDPEngineConfig(
        strategy=strategy,
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        use_torch_compile=False,
        **options,
    )
    engine = FSDPEngineWithValueHead if kind == "critic" else FSDPEngineWithLMHead
    return engine(config, engine_config, FSDPOptimizerConfig(), CheckpointConfig())


def micro_batch(remove_padding: bool, fused: bool = False) -> Any:
    """The samples of GROUPS in a row, as verl's workers receive them."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for prompt_length, response_lengths in GROUPS:
        prompt = torch.randint(3, 97, (prompt_length,), generator=generator)
        prompt[0] = 20 + prompt_length
        for length in response_lengths:
            response = torch.randint(3, 97, (length,), generator=generator)
            response[0] = 3 + len(samples)  # so that responses share nothing by chance
            samples.append((prompt, response))

    def nested(tensors: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    return tensordict_utils.get_tensordict(
        {
            "input_ids": nested([torch.cat(sample) for sample in samples]),
            "position_ids": nested([torch.arange(len(p) + len(r)) for p, r in samples]),
            "loss_mask": nested(
                [torch.cat([torch.zeros(len(p)), torch.ones(len(r))]) for p, r in samples]
            ),
        },
        non_tensor_dict={
            "use_remove_padding": remove_padding,
            "temperature": 0.7,
            "calculate_entropy": True,
            "use_fused_kernels": fused,
            "pad_token_id": 0,
        },
    )


def weighted_loss(model_output: dict, data: Any, dp_group: Any) -> tuple[Tensor, dict]:
    """Weighs the log-prob and the entropy, or the value, of every response token differently."""
    mask = torch.roll(data["loss_mask"].values(), -1)
    weights = torch.linspace(-1, 1, len(mask))
    if "values" in model_output:
        values = model_output["values"].values()
        # Of one sign: the gradient of the head's bias is one sum, which must not cancel.
        return (mask * ((2 + weights) * values + 0.1 * values.square())).sum(), {}
    log_probs, entropy = (model_output[name].values() for name in ("log_probs", "entropy"))
    return (mask * (weights * log_probs + 0.1 * entropy)).sum(), {}


def forward_and_backward(engine: FSDPEngineWithLMHead, batch: Any) -> dict[str, Tensor]:
    """What the model puts out, and the gradients of all parameters that are trained."""
    engine.module.train()
    loss, output = engine.forward_step(batch, weighted_loss, forward_only=False)
    loss.backward()
    results = {name: x.values() for name, x in output["model_output"].items()}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            results[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return results


def in_float64(
    model_path: str,
    monkeypatch: pytest.MonkeyPatch,
    batch: Any,
    run: Any = forward_and_backward,
    kind: str = "actor",
) -> dict[str, Tensor]:
    """The ordinary run with nothing rounded to float32."""

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        mean_of_squares = x.square().mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(mean_of_squares + self.variance_epsilon)

    engine = new_engine(model_path, "sdpa", kind=kind)
    engine._build_optimizer = engine._build_lr_scheduler = lambda *args: None
    engine._build_fsdp_module = lambda module: module.double()  # FSDP would cast to float32
    engine._autocast_dtype = torch.float32  # none
    engine._build_model_optimizer()
    with monkeypatch.context() as patch:
        patch.setattr(transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm, "forward", norm)
        return run(engine, batch)


def assert_run_within_budget(
    found: dict[str, Tensor], exact: dict[str, Tensor], ordinary: dict[str, Tensor]
) -> None:
    """Holds each output, and all gradients together, against float64."""
    outputs = OUTPUTS & exact.keys()
    for name in outputs:
        assert_within_budget(name, found[name], exact[name], ordinary[name])
    gradients = [{x: r[x] for x in r.keys() - OUTPUTS} for r in (found, exact, ordinary)]
    if any(gradients):
        tokens = max(exact[name].numel() for name in outputs)
        assert_model_within_budget("gradients", *gradients, tokens=tokens)


@pytest.mark.parametrize("remove_padding", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["actor", "LoRA", "critic"])
def test_forward_step_matches_ordinary_run(
    kind: str, remove_padding: bool, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_without_flash_attention(monkeypatch)
    exact = in_float64(model_path, monkeypatch, micro_batch(remove_padding), kind=kind)
    results = []
    for attention in ("sdpa", "prefix_attn"):
        engine = new_engine(model_path, attention, kind=kind)
        engine._build_model_optimizer()
        results.append(forward_and_backward(engine, micro_batch(remove_padding)))
    ordinary, shared = results
    assert shared.keys() == exact.keys() >= {"values" if kind == "critic" else "log_probs"}
    assert_run_within_budget(shared, exact, ordinary)
    trained = [name for name, x in exact.items() if "layers" in name and x.any()]
    assert len(trained) == sum("layers" in name for name in exact) > 0
    counts = prefix_attn.stats(engine.module)
    assert (counts.calls, counts.packed_calls) == (1, 1)
    assert (counts.tokens_in, counts.tokens_run) == (TOKENS, SHARED_TOKENS)


def test_fused_kernels_match_ordinary_run(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's fused head replaces the forward of the model's class, and runs the decoder itself."""
    exact = in_float64(model_path, monkeypatch, micro_batch(True))
    model_class = transformers.Qwen3ForCausalLM
    monkeypatch.setattr(model_class, "forward", model_class.forward)  # put back after the test
    results = []
    for attention in ("sdpa", "prefix_attn"):
        engine = new_engine(model_path, attention, fused=True)
        # On one CPU rank the head would get a sharded weight, with any attention.
        engine._build_fsdp_module = lambda module: module
        engine._autocast_dtype = torch.float32
        engine._build_model_optimizer()
        results.append(forward_and_backward(engine, micro_batch(True, fused=True)))
    assert_run_within_budget(results[1], exact, results[0])
    assert prefix_attn.stats(engine.module).tokens_run == SHARED_TOKENS


def test_forward_step_with_static_padding_matches_ordinary_run(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pad_to_length` appends one more sequence to the row."""
    exact = in_float64(model_path, monkeypatch, micro_batch(True))
    results = []
    for attention in ("sdpa", "prefix_attn"):
        engine = new_engine(model_path, attention, pad_to_length=True, pad_to_length_bucket=64)
        engine._build_model_optimizer()
        results.append(forward_and_backward(engine, micro_batch(True)))
    assert_run_within_budget(results[1], exact, results[0])
    counts = prefix_attn.stats(engine.module)
    assert (counts.tokens_in, counts.tokens_run) == (128, SHARED_TOKENS + 128 - TOKENS)


def test_forward_only_matches_ordinary_run(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What computes the old and the reference log-probs."""
    exact = in_float64(model_path, monkeypatch, micro_batch(True))
    results = []
    for attention in ("sdpa", "prefix_attn"):
        engine = new_engine(model_path, attention)
        engine._build_model_optimizer()
        engine.module.eval()
        with torch.no_grad():
            _, output = engine.forward_step(micro_batch(True), None, forward_only=True)
        results.append(output["model_output"]["log_probs"].values())
    assert_within_budget("log_probs", results[1], exact["log_probs"], results[0])
    assert prefix_attn.stats(engine.module).packed_calls == 1


def test_other_attention_is_left_alone(model_path: str) -> None:
    engine = new_engine(model_path, "sdpa")
    engine._build_model_optimizer()
    assert engine.module.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="not enabled"):
        prefix_attn.stats(engine.module)


def test_pictures_in_slices_are_refused_by_name(model_path: str) -> None:
    engine = new_engine(model_path, "prefix_attn")
    engine.ulysses_sequence_parallel_size = 2  # on one rank verl would not get here
    engine.model_config.hf_config.vision_config = {}
    with pytest.raises(NotImplementedError, match=r"pictures .* ulysses_sequence_parallel_size is"):
        engine._build_model_optimizer()


def test_unknown_verl_is_named() -> None:
    class FSDPEngine:
        def _build_module(self, config: Any) -> None:
            raise NotImplementedError

    for engine in (types.SimpleNamespace(), types.SimpleNamespace(FSDPEngine=FSDPEngine)):
        with pytest.warns(UserWarning, match="does not know this version of verl"):
            serve_engine(engine)


def test_engine_is_served_once() -> None:
    build: Callable = FSDPEngineWithLMHead._build_module
    serve_engine(sys.modules[ENGINE])
    assert FSDPEngineWithLMHead._build_module is build
    assert not any(isinstance(finder, EngineFinder) for finder in sys.meta_path)


def test_importing_verl_loads_the_plugin_and_no_engine() -> None:
    assert verl.__version__ == "0.9.1"
    (point,) = [p for p in entry_points(group="verl.plugins") if p.name == "prefix_attn"]
    assert point.value == "prefix_attn.integrations.verl"
    code = (
        "import sys, verl\n"
        "print('prefix_attn.integrations.verl' in sys.modules,"
        f" {ENGINE!r} in sys.modules,"
        " 'prefix_attn.integrations.transformers' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "True False False", done.stdout + done.stderr
