"""Which names code uses and functions hold: what tells attention from a recurrence."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

# What attention layers call their cache.
CACHES = ("past_key_values", "past_key_value", "cache", "layer_past")

# Of these, and of what they inherit, no method is read.
BASES = (torch.nn.Module, PreTrainedModel)


@dataclass(frozen=True)
class CodeNames:
    """Names in the methods of a class, its constructor left out.

    Attributes:
        loaded: global names, each with the name of the Python module in which it is looked up.
        attributes: names of attributes and methods of anything.
    """

    loaded: dict[str, str]
    attributes: frozenset[str]

    def module_of(self, name: str) -> ModuleType | None:
        """The Python module in which the code looks up a global name; None if it does not."""
        return sys.modules.get(self.loaded[name]) if name in self.loaded else None


def code_names(module: torch.nn.Module) -> CodeNames:
    """Reads the methods that a module has, inherited ones included."""
    cls: Any = type(module)
    return _code_names(cls)


@cache
def _code_names(cls: Any) -> CodeNames:
    loaded: dict[str, str] = {}
    attributes: set[str] = set()
    inherited = {name for base in BASES for name in dir(base)} - {"forward"}
    for name in dir(cls):
        function = inspect.getattr_static(cls, name)
        function = inspect.unwrap(getattr(function, "__func__", function))
        if name in inherited or not inspect.isfunction(function):
            continue
        for code in _codes(function.__code__):
            for instruction in dis.get_instructions(code):
                if instruction.opname == "LOAD_GLOBAL":
                    loaded[instruction.argval] = function.__module__
                elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                    attributes.add(instruction.argval)
    return CodeNames(loaded, frozenset(attributes))


def closure_of(function: FunctionType) -> dict[str, Any]:
    """What a function holds of the one that made it, by name."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {variable: cell.cell_contents for variable, cell in cells}


def calls_attention(module: torch.nn.Module) -> bool:
    """Whether a module looks its attention up in transformers' attention interface."""
    return "ALL_ATTENTION_FUNCTIONS" in code_names(module).loaded


def keeps_keys(module: torch.nn.Module) -> bool:
    """Whether a module's forward takes a cache and updates it."""
    if isinstance(module, PreTrainedModel):
        return False
    takes_cache = set(CACHES) & inspect.signature(type(module).forward).parameters.keys()
    return bool(takes_cache) and "update" in code_names(module).attributes


def _codes(code: Any) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _codes(constant)
