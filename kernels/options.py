"""What a call asks for beyond its tensors. Free of Triton: every backend takes it."""

from typing import NamedTuple


class Options(NamedTuple):
    """What changes the result.

    Attributes:
        scale: factor of the scores.
        softcap: scores s become softcap * tanh(s / softcap), or None.
        window_size: positions that a query sees back from its own, its own included, or None.
        prefix_causal: False lets the rows of a segment that others continue see all of it.
        deterministic: False lets gradients be summed in an order that changes from run to run.
    """

    scale: float
    softcap: float | None = None
    window_size: int | None = None
    prefix_causal: bool = True
    deterministic: bool = True
