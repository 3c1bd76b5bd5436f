"""A plugin for verl: shared prefixes in the FSDP engines, switched on by a key of verl's config.

    actor_rollout_ref.model.override_config.attn_implementation=prefix_attn

verl imports this module in every process (entry point group "verl.plugins", or
`model.external_lib=prefix_attn.integrations.verl`). It waits until verl's FSDP engine is imported,
then makes that engine call `prefix_attn.enable` on the models it builds with this attention.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ENGINE = "verl.workers.engine.fsdp.transformer_impl"
NAME = "prefix_attn"


def serve_engine(module: ModuleType) -> None:
    """Makes verl's FSDP engine enable shared prefixes in models that ask for them.

    If this version of verl does not build models as 0.9.1 does, it only warns: transformers then
    refuses `attn_implementation=prefix_attn` as unknown, and other runs go on.

    Args:
        module: `verl.workers.engine.fsdp.transformer_impl`. Serving it again changes nothing.
    """
    engine = getattr(module, "FSDPEngine", None)
    build = getattr(engine, "_build_module", None)
    if build is None or list(inspect.signature(build).parameters) != ["self"]:
        warnings.warn(
            f"prefix_attn does not know this version of verl: {ENGINE}.FSDPEngine should define "
            f"_build_module(self), as verl 0.9.1 does. attn_implementation={NAME} is not available",
            stacklevel=2,
        )
        return
    if hasattr(build, "__wrapped__"):
        return

    @functools.wraps(build)
    def build_module(self: Any) -> Any:
        if self.model_config.hf_config._attn_implementation != NAME:
            return build(self)
        size = self.ulysses_sequence_parallel_size
        if size > 1:
            raise NotImplementedError(
                f"attn_implementation={NAME} needs whole sequences, but "
                f"ulysses_sequence_parallel_size is {size}, which slices them: set it to 1"
            )
        from prefix_attn.integrations.transformers import enable  # registers the attention

        return enable(build(self))

    engine._build_module = build_module  # type: ignore[union-attr]


class EngineFinder(MetaPathFinder):
    """Serves the engine as soon as it is imported, so that importing verl stays as quick."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds the engine with the other finders; its module is served once it has run."""
        if name != ENGINE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_serve(module: ModuleType) -> None:
                run(module)
                serve_engine(module)

            spec.loader.exec_module = run_and_serve  # type: ignore[method-assign]
        return spec


if ENGINE in sys.modules:
    serve_engine(sys.modules[ENGINE])
else:
    sys.meta_path.insert(0, EngineFinder())
