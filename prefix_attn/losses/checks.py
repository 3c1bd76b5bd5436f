"""Checks of the arguments that the losses share: numbers, integers, tensors."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable
from contextlib import suppress
from numbers import Real
from typing import Any, SupportsIndex, TypeGuard

import torch
from torch import Tensor

LARGEST = sys.float_info.max


def number(name: str, value: Any, least: float, most: float = LARGEST) -> float:
    """A real number, of Python or numpy, within two bounds; infinity only where `most` is that."""
    x = _real(name, value)
    if not least <= x <= most:
        bounds = f"{least:g} to {most:g}"
        if most >= LARGEST:
            bounds = f"at least {least:g}" + ("" if most == math.inf else " and finite")
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return x


def positive(name: str, value: Any, dtype: torch.dtype) -> float:
    """A number that values of `dtype` can be divided by: positive, finite, and in their range."""
    x = _real(name, value)
    if not 0 < x < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    least = torch.finfo(dtype).tiny ** 0.5
    if not least <= x <= 1 / least:
        raise ValueError(
            f"{name} must be {least:.0e} to {1 / least:.0e} for values of {dtype}, got {value}"
        )
    return x


def integer(name: str, value: Any) -> int:
    """An integer of Python, numpy or a tensor of one element."""
    if not isinstance(value, bool):
        with suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name} must be an integer, got {_described(value)}")


def integers(name: str, values: Any, count: int | None = None) -> list[int]:
    """Several integers; with `count` also one integer, which stands for that many."""
    if count is not None and is_integer(values):
        return [integer(name, values)] * count
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(
            f"{name} must be an integer or a sequence of integers, got {_described(values)}"
        )
    return [integer(f"{name}[{i}]", value) for i, value in enumerate(values)]


def is_integer(value: Any) -> TypeGuard[SupportsIndex]:
    """Whether it is one integer, and no sequence of them."""
    if isinstance(value, (list, tuple)):  # torch.compile of PyTorch 2.11 can't catch the error
        return False
    try:
        integer("", value)
    except TypeError:
        return False
    return True


def tensors_on_one_device(needed: dict[str, Any], optional: dict[str, Any] | None = None) -> None:
    """Refuses what is no tensor, and tensors on another device than the first needed one."""
    given = {name: x for name, x in (optional or {}).items() if x is not None}
    first = next(iter(needed))
    for name, x in (needed | given).items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.device != needed[first].device:
            raise ValueError(f"{first} is on {needed[first].device}, {name} on {x.device}")


def same_shape(first: Tensor, others: dict[str, Tensor | None]) -> None:
    """Refuses log-probabilities that are no (B, L), and what has another shape."""
    if first.dim() != 2 or not first.is_floating_point():
        raise ValueError(
            f"log_probs must be a floating-point tensor of shape (B, L), got {first.dtype} "
            f"{tuple(first.shape)}"
        )
    shape = tuple(first.shape)
    for name, x in others.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, as log_probs, got {tuple(x.shape)}")


def one_of(name: str, value: Any, names: tuple[str, ...]) -> None:
    """Refuses a name that is none of those given."""
    if value not in names:
        raise ValueError(f"{name} must be one of {list(names)}, got {value!r}")


def constants(tensors: dict[str, Tensor | None]) -> None:
    """Refuses what should be a constant but requires gradients."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(f"{name} must not require gradients; detach it")


def finite(name: str, x: Tensor) -> None:
    """Refuses NaN and infinity, with the place of the first."""
    wrong = (~x.isfinite()).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        raise ValueError(f"{name} must be finite, got {x[tuple(place)].item()} at {place}")


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {_described(value)}")
    return float(value)


def _described(value: Any) -> str:
    shown = "" if isinstance(value, Tensor) else f" {value!r}"
    return f"{type(value).__name__}{shown}"
