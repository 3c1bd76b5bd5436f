"""Walks through a loop in the order of its instructions: a model of what waits for what.

A warp scheduler issues one instruction a clock, and each pipe takes instructions at its rate.
Products of matrices run behind one another while the warps go on, until these wait for all of them.
So the walk sees what lies in the shadow of a product and what does not, which the counts of
`bench.machine_code.sass` can't. It knows no caches and no memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from bench.machine_code import sass

# Clocks that are assumed: a barrier of a block, a fence, reading a product that has just ended.
BARRIER_CLOCKS, FENCE_CLOCKS, RESULT_CLOCKS = 30.0, 30.0, 40.0
# Iterations that are walked: the first one has no product before it.
ITERATIONS = 4


def clocks(loop: sass.Loop, capability: int, warps: int, dtype: str) -> float | None:
    """Clocks of one iteration of one block; None where products say no end: on Hopper alone."""
    if "HGMMA" not in loop.tensor:
        return None
    quarter, rates = warps / 4, sass.RATES
    steps = list(_steps(loop, capability, warps, dtype))
    now = products_end = first = 0.0
    free = dict.fromkeys(rates, 0.0)
    for iteration in range(ITERATIONS):
        if iteration == 1:
            first = now
        for pipe, wait, product in steps:
            if pipe in rates:
                start = max(now, free[pipe])
                free[pipe], now = start + quarter / rates[pipe], start + quarter
            else:
                now += quarter
            if product:
                products_end = max(products_end, now) + product
            if wait is None:
                now = max(now, products_end + RESULT_CLOCKS)
            else:
                now += wait
    return (now - first) / (ITERATIONS - 1)


def _steps(
    loop: sass.Loop, capability: int, warps: int, dtype: str
) -> Iterable[tuple[str, float | None, float]]:
    """Of each instruction: its pipe, clocks that it waits or None for all products, its product."""
    for x in loop.instructions:
        wait: float | None = {"BAR": BARRIER_CLOCKS, "MEMBAR": FENCE_CLOCKS}.get(x.name, 0.0)
        if x.name == "WARPGROUP" and "DEPBAR" in x.opcode and re.search(r"\b0x0\b", x.operands):
            wait = None
        tensor, shared = sass.product_clocks(x, capability, warps, dtype)
        yield x.pipe, wait, max(tensor, shared)
