"""Which GPUs the Triton kernels serve, with stand-ins for the GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from prefix_attn.api import choose_backend
from prefix_attn.backends import triton as triton_backend
from prefix_attn.kernels.config import select_config

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
    (9, 0, "gfx90a:sramecc+:xnack-", "AMD GPUs have no tiles here, got gfx90a"),
    (11, 0, "gfx1100", "got gfx1100"),
    (9, 4, "gfx942:sramecc+:xnack-", "got gfx942"),
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
