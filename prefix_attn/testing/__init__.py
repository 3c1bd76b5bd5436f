"""What tests of exactness share: the error budget, its yardstick, inputs, results and forests."""

from prefix_attn.testing.attention import (
    Inputs,
    Results,
    assert_all,
    attention_results,
    check_attention,
    compare_attention,
)
from prefix_attn.testing.budget import (
    Comparison,
    assert_model_within_budget,
    assert_within_budget,
    compare,
)
from prefix_attn.testing.forests import forests
from prefix_attn.testing.interpreter import fix_interpreter
from prefix_attn.testing.repeated import repeated_attention

__all__ = [
    "Comparison",
    "Inputs",
    "Results",
    "assert_all",
    "assert_model_within_budget",
    "assert_within_budget",
    "attention_results",
    "check_attention",
    "compare",
    "compare_attention",
    "fix_interpreter",
    "forests",
    "repeated_attention",
]
