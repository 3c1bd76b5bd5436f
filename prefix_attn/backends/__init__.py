"""Backends of one shape: `forward`, `backward`, and `why_not`, the reason against a call, or None.

They are imported when they are named, since one needs Triton and the package does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

# The largest D and DV of each.
MAX_HEAD_DIMS = {"triton": 256, "cpu": 512, "reference": 512}
NAMES = tuple(MAX_HEAD_DIMS)
# Environment variable that chooses Triton's forward kernel: triton, or gluon where that can serve.
FORWARD_VARIABLE = "PREFIX_ATTN_FORWARD"


def load(name: str) -> ModuleType:
    """The module of a backend.

    Raises:
        ImportError: if it needs what is not installed.
    """
    if name == "triton":
        from prefix_attn.backends import triton as module
    elif name == "cpu":
        from prefix_attn.backends import cpu as module  # type: ignore[no-redef]
    else:
        from prefix_attn.backends import reference as module  # type: ignore[no-redef]
    return module


def why_not(
    name: str,
    device_type: str,
    dtype: torch.dtype,
    options: Sequence[str] = (),
    head_dims: Sequence[int] = (),
) -> str | None:
    """The reason why a backend can't serve a call, or None; arguments of `api.choose_backend`."""
    try:
        backend = load(name)
    except ImportError as error:
        return f"{name.capitalize()} can't be imported ({error})"
    largest = max(head_dims, default=0)
    if largest > MAX_HEAD_DIMS[name]:
        return f"head dimensions are at most {MAX_HEAD_DIMS[name]} here, got {largest}"
    reason: str | None = backend.why_not(device_type, dtype, options)
    return reason
