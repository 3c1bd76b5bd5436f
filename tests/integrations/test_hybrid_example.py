"""The example of a hybrid model trains, and shows the same losses with and without sharing."""

from __future__ import annotations

import runpy

import pytest

transformers = pytest.importorskip("transformers")

from prefix_attn.integrations.transformers.mixers.find import has_global_functions  # noqa: E402
from tests.docs_examples import ROOT  # noqa: E402


@pytest.mark.skipif(not has_global_functions(), reason="needs transformers 5.18")
def test_hybrid_example_trains_to_the_same_losses(capsys):
    names = runpy.run_path(str(ROOT / "examples" / "hybrid.py"), run_name="__main__")
    assert names["shared"] == pytest.approx(names["ordinary"], rel=1e-4)
    assert names["shared"][-1] < 0.9 * names["shared"][0]
    printed = capsys.readouterr().out
    assert printed.count("torch_chunk_gated_delta_rule along the tree") == 3
    assert f"{names['stats'].ratio:.2f}x fewer" in printed
    assert names["stats"].packed_calls == names["STEPS"]
