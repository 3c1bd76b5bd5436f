"""Which GPUs the Triton kernels serve, with stand-ins for the GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from bench.machine_code.compile import stand_in_driver
from prefix_attn.api import choose_backend
from prefix_attn.backends import triton as triton_backend
from prefix_attn.kernels.config import select_config
from prefix_attn.kernels.primitives import dot_precision

needs_no_interpreter = pytest.mark.skipif(
    triton_backend.INTERPRETED, reason="the interpreter runs anywhere"
)


@pytest.fixture
def use_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes PyTorch name a GPU that is not there."""

    def use(major: int, minor: int, amd: str | None = None) -> None:
        properties = SimpleNamespace(
            major=major, minor=minor, gcnArchName=amd, multi_processor_count=84, L2_cache_size=4
        )
        stand_ins: dict[str, Callable[..., Any]] = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_properties": lambda _: properties,
            "get_device_capability": lambda _: (major, minor),
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.version, "hip", None if amd is None else "7.0")
        for cached in (triton_backend._why_not_gpu, triton_backend._gpu_config):
            cached.cache_clear()

    yield use
    for cached in (triton_backend._why_not_gpu, triton_backend._gpu_config):
        cached.cache_clear()


REFUSED = [
    (7, 5, None, "needs compute capability 8.0 (A100, RTX 30) or newer, got 7.5"),
    (7, 0, None, "got 7.0"),
    (9, 0, "gfx90a:sramecc+:xnack-", "of AMD's GPUs needs gfx942 (MI300) or gfx950 (MI350)"),
    (11, 0, "gfx1100", "got gfx1100"),
]


@needs_no_interpreter
@pytest.mark.parametrize(("major", "minor", "amd", "words"), REFUSED)
def test_gpu_without_tiles_is_refused_by_name(use_gpu, major, minor, amd, words):
    use_gpu(major, minor, amd)
    for backend in ("triton", "auto"):
        with pytest.raises(NotImplementedError) as error:
            choose_backend(backend, "cuda", torch.bfloat16)
        assert words in str(error.value)
    x = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.bfloat16, shape=(5, 2, 64))
    with pytest.raises(NotImplementedError, match="can't serve cuda:1: "):
        triton_backend.config_for(x, x)


@needs_no_interpreter
@pytest.mark.parametrize("major_minor", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 1)])
def test_gpu_with_tiles_is_served(use_gpu, major_minor):
    use_gpu(*major_minor)
    assert choose_backend("auto", "cuda", torch.bfloat16) == "triton"
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(5, 2, 64))
    major, minor = major_minor
    config = triton_backend.config_for(x, x)
    expected = select_config(major * 10 + minor, 64, torch.bfloat16, 84)
    assert (config.forward, config.keys, config.l2_bytes) == (expected.forward, expected.keys, 4)
    assert triton_backend.config_for(x, x) is config


@needs_no_interpreter
@pytest.mark.parametrize(("minor", "amd"), [(4, "gfx942:sramecc+:xnack-"), (5, "gfx950:sramecc+")])
def test_amd_gpu_has_tiles_of_its_own(use_gpu, minor, amd):
    """They have compute capabilities as well, behind those of Hopper."""
    use_gpu(9, minor, amd)
    assert choose_backend("auto", "cuda", torch.bfloat16) == "triton"
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(5, 2, 128))
    assert triton_backend.arch_of(x.device) == amd[:6]
    config = triton_backend.config_for(x, x)
    assert config == replace(select_config(amd[:6], 128, torch.bfloat16, 84), l2_bytes=4)
    assert config.forward_warps == config.backward_warps == 4
    assert not config.forward_descriptors
    assert not config.backward_descriptors
    assert config.fused is None


@needs_no_interpreter
@pytest.mark.parametrize(
    ("arch", "precision"), [(90, "tf32"), ("gfx942", "tf32"), ("gfx950", "ieee")]
)
def test_products_are_tf32_where_the_gpu_has_it(monkeypatch, arch, precision):
    """Triton refuses to compile tf32 for what does not have it."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    driver = SimpleNamespace(active=stand_in_driver(arch))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    assert dot_precision(torch.float32) == precision
    assert dot_precision(torch.bfloat16) == "ieee"
