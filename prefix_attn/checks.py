"""Checks of integers, flags and lists that callers pass; errors name the entry that is wrong."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

INT64_MAX = 2**63 - 1


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, also of NumPy, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def positive_int(name: str, value: Any, allowed: str = "a positive integer") -> int:
    """An integer from 1 on, or an error that names the argument and its value."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return int(value)


def window(value: Any) -> int | None:
    """The `window_size` of a call."""
    if value is None:
        return None
    return positive_int("window_size", value, "a positive integer or None")


def flag(name: str, value: Any, allowed: str = "True or False") -> bool:
    """A bool, also of NumPy, or an error that names the argument and its value."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return bool(value)


def is_list(value: Any) -> bool:
    """Whether a value is a list, a tuple, a range or an array, and no text."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def shown(value: Any) -> str:
    """The value as a message shows it: some of it, where it is long."""
    return reprlib.repr(value)


def _on_host(values: Any) -> Any:
    """Tensors as arrays of NumPy, which knows neither bfloat16 nor float8; others as they are."""
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()


def bool_array(name: str, values: Any) -> np.ndarray:
    """Checks bools and returns them as such."""
    values = _on_host(values)
    if not is_list(values):
        raise ValueError(f"{name} must be a flat list of bools, got {shown(values)}")
    for i, value in enumerate(values):
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} must hold bools, got {value!r} at {name}[{i}]")
    return np.array(values, dtype=bool)


def int_array(name: str, values: Any, least: int = 0) -> np.ndarray:
    """Checks integers against `least` and returns them as int64."""
    values = _on_host(values)
    try:
        raw = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} must be a flat list of integers, got {shown(values)}") from error
    if raw.ndim != 1:
        raise ValueError(f"{name} must be a flat list of integers, got {shown(values)}")
    if raw.size == 0:
        return np.empty(0, dtype=np.int64)
    if raw.dtype.kind in "iu" and raw.min() >= least and raw.max() <= INT64_MAX:
        return raw.astype(np.int64, copy=False)
    for i, item in enumerate(values):
        value = item.item() if isinstance(item, (np.generic, Tensor)) else item
        if type(value) is not int:
            raise ValueError(f"{name} must hold integers, got {value!r} at {name}[{i}]")
        if value < least:
            raise ValueError(f"{name}[{i}] must be at least {least}, got {value}")
        if value > INT64_MAX:
            raise ValueError(f"{name}[{i}] must be at most {INT64_MAX}, got {value}")
    raise ValueError(f"{name} must hold integers, got {raw.dtype}")
