"""The Gluon kernel without a GPU: its source run in Python, and its machine code."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import types
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="Triton has no Gluon")

import triton

from prefix_attn.backends.reference import forward as reference_attention
from prefix_attn.backends.schedule import QueryTiles
from prefix_attn.forest import Forest
from prefix_attn.kernels import gluon_forward, primitives
from prefix_attn.kernels.arguments import ForwardTables, QueryItem
from prefix_attn.kernels.config import Tile, select_config
from prefix_attn.kernels.options import Options
from prefix_attn.layout import PrefixLayout
from prefix_attn.testing import assert_within_budget, forests

ROOT = Path(__file__).parents[1]
PLAIN = Options(scale=0.125)
# Before a test replaces any of it.
SOURCE = dict(vars(gluon_forward))

pytestmark = pytest.mark.skipif(
    primitives.INTERPRETED or gluon_forward.tma_load is None,
    reason=gluon_forward.why_not(90, torch.bfloat16, 64, 64, PLAIN, None) or "served",
)


class Machine:
    """One block of threads: runs the parts of a kernel in random order, one at a time.

    A part runs until it waits for a barrier or does something that others see. A load lands some
    time after it was started; until then its target holds NaN. Products read their operands when
    they are started and when they are waited for, and both must be the same.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.loads: list[Callable[[], None]] = []
        self.parts: list[Part] = []

    def run(self, functions: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Runs functions with their arguments to the end, or raises what one of them raised."""
        self.parts = [Part(function, arguments) for function, arguments in functions]
        while any(not part.done for part in self.parts) or self.loads:
            ready = [part for part in self.parts if not part.done and part.condition()]
            assert ready or self.loads, "deadlock: every part waits and no load is under way"
            choice = self.random.choice([*ready, *self.loads])
            if isinstance(choice, Part):
                choice.resume()
            else:
                self.loads.remove(choice)
                choice()

    @staticmethod
    def current() -> Part:
        """The part that runs."""
        part = threading.current_thread()
        assert isinstance(part, Part)
        return part


class Part(threading.Thread):
    """A warp specialised part; `condition` says whether it can go on."""

    def __init__(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        super().__init__(daemon=True)
        self.function, self.arguments = function, arguments
        self.condition: Callable[[], bool] = lambda: True
        self.turn, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.done, self.error = False, None
        self.products: deque[Product] = deque()
        self.start()

    def run(self) -> None:
        self.turn.acquire()
        try:
            self.function(*self.arguments)
            assert not self.products, "a part ends while its products run"
        except BaseException as error:  # handed to the machine
            self.error = error
        self.done = True
        self.paused.release()

    def resume(self) -> None:
        """Lets the part run until it pauses."""
        self.turn.release()
        self.paused.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, condition: Callable[[], bool] = lambda: True) -> None:
        """Called by the part: lets others run until the condition holds."""
        self.condition = condition
        self.paused.release()
        self.turn.acquire()


class Barrier:
    """An mbarrier: flips its phase when all arrivals and all announced bytes are there."""

    def __init__(self) -> None:
        self.phase = self.count = self.missing = self.bytes = 0

    def arrive(self, count: int) -> None:
        self.missing -= count
        assert self.missing >= 0, "more arrivals than a barrier counts"
        self.flip()

    def land(self, size: int) -> None:
        self.bytes -= size
        self.flip()

    def flip(self) -> None:
        if self.missing == self.bytes == 0:
            self.phase, self.missing = self.phase ^ 1, self.count


class Barriers:
    """Barriers in shared memory."""

    def __init__(self, count: int) -> None:
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, i: int) -> Barrier:
        return self.barriers[i]


class Shared:
    """A buffer in shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, i: int) -> Shared:
        return Shared(self.data[i])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))


class Product:
    """A product that was started; it runs until it is waited for."""

    def __init__(self, a: Any, b: Shared, acc: Tensor) -> None:
        self.operands = [x for x in (a, b) if isinstance(x, Shared)]
        self.before = [x.data.clone() for x in self.operands]
        self.a, self.b, self.acc = a, b, acc
        self.result: Tensor | None = None
        assert not any(x.isnan().any() for x in self.before), "an operand has not been loaded"

    def finish(self) -> None:
        """Computes in float32, and checks that nothing changed since the start."""
        for operand, before in zip(self.operands, self.before, strict=True):
            assert operand.data.equal(before), "an operand changed while the product ran"
        a = self.a.data if isinstance(self.a, Shared) else self.a
        self.result = self.acc + a.float() @ self.b.data.float()


class Descriptor:
    """A TMA descriptor of a matrix: rows and columns past its end read as zero."""

    def __init__(self, descriptor: Any) -> None:
        base, (rows, columns) = descriptor.base, descriptor.block_shape
        assert base.shape == tuple(descriptor.shape)
        self.rows, self.columns, self.dtype, self.layout = rows, columns, base.dtype, None
        self.base = base
        self.block_type = types.SimpleNamespace(nbytes=rows * columns * base.itemsize)

    def tile(self, row: int, column: int) -> Tensor:
        inside = self.base[row : row + self.rows, column : column + self.columns]
        tile = self.base.new_zeros(self.rows, self.columns)
        tile[: inside.shape[0], : inside.shape[1]] = inside
        return tile


class Pointer:
    """An address, or a tensor of them, in one tensor; accesses outside of it fail."""

    def __init__(self, storage: Tensor, offset: Any = 0) -> None:
        self.storage, self.offset = storage, offset
        self.dtype = types.SimpleNamespace(element_ty=storage.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.storage, self.offset + offset)

    def at(self, mask: Tensor | None) -> Tensor:
        offset = torch.as_tensor(self.offset)
        if mask is not None:
            offset = offset[mask.expand_as(offset)]
        assert offset.numel() == 0 or 0 <= offset.min() <= offset.max() < len(self.storage)
        return offset


def _load(pointer: Pointer, mask: Tensor | None = None, other: int | None = None) -> Tensor:
    if mask is None:
        return pointer.storage[pointer.at(None)].clone()
    out = torch.full(mask.shape, other, dtype=pointer.storage.dtype)
    out[mask] = pointer.storage[pointer.at(mask)]
    return out


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    offset = pointer.at(mask)
    assert pointer.storage[offset].isnan().all(), "written twice"
    assert value.dtype == pointer.storage.dtype
    pointer.storage[offset] = value[mask.expand_as(value)]


def _allocate(dtype: torch.dtype, shape: list[int], layout: None) -> Barriers | Shared:
    if dtype == torch.int64:
        return Barriers(shape[0])
    return Shared(torch.full(shape, torch.nan, dtype=dtype))


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


def _wait(barrier: Barrier, phase: int) -> None:
    Machine.current().pause(lambda: barrier.phase != phase)


def _expect(barrier: Barrier, size: int) -> None:
    barrier.bytes += size
    barrier.arrive(1)


def _arrive(barrier: Barrier, count: int) -> None:
    barrier.arrive(count)
    Machine.current().pause()


def _start_product(
    a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False
) -> Product:
    assert is_async
    product = Product(a, b, acc if use_acc else torch.zeros_like(acc))
    Machine.current().products.append(product)
    Machine.current().pause()
    return product


def _wait_product(outstanding: int, deps: list[Product]) -> Tensor:
    products = Machine.current().products
    while len(products) > outstanding:
        products.popleft().finish()
    (product,) = deps
    assert product.result is not None, "used before it was waited for"
    return product.result


def _gluon(machine: Machine, program: int) -> types.SimpleNamespace:
    """What the kernel uses of `gl`, on tensors."""

    def no_layout(*arguments: Any) -> None:
        return None

    return types.SimpleNamespace(
        load=_load,
        store=_store,
        allocate_shared_memory=_allocate,
        warp_specialize=lambda functions, warps, registers: machine.run(functions),
        program_id=lambda axis: torch.tensor(program),
        arange=lambda begin, end, layout: torch.arange(begin, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        where=lambda condition, x, y: torch.where(condition, x, y),
        maximum=lambda x, y: torch.maximum(x, torch.as_tensor(y)),
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        exp2=torch.exp2,
        log2=torch.log2,
        convert_layout=lambda x, layout: x,
        static_range=range,
        float32=torch.float32,
        int64=torch.int64,
        NVMMADistributedLayout=no_layout,
        DotOperandLayout=no_layout,
        BlockedLayout=no_layout,
        SliceLayout=no_layout,
    )


class Emulated:
    """Stands for the kernel: runs its source in Python, program after program."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            for name in ("num_warps", "maxnreg", "enable_fp_fusion"):
                del arguments[name]
            for name, value in arguments.items():
                if name.endswith("_desc"):
                    arguments[name] = Descriptor(value)
                elif name.endswith("_ptr"):
                    arguments[name] = Pointer(value.view(-1))
            for program in range(grid[0]):
                self.functions(program)["gluon_forward_kernel"](**arguments)

        return launch

    def functions(self, program: int) -> dict[str, Any]:
        """The functions of the kernel's file, with stand-ins for what they call."""
        machine = Machine(self.seed + program)

        def start_load(
            descriptor: Descriptor, corner: list[Any], barrier: Barrier, target: Shared
        ) -> None:
            target.data.fill_(torch.nan)
            tile = descriptor.tile(*map(int, corner))

            def land() -> None:
                target.data.copy_(tile)
                barrier.land(descriptor.block_type.nbytes)

            machine.loads.append(land)
            Machine.current().pause()

        names: dict[str, Any] = {
            "gl": _gluon(machine, program),
            "tma_load": start_load,
            "warpgroup_mma": _start_product,
            "warpgroup_mma_wait": _wait_product,
            "fence_async_shared": lambda: None,
            "mbarrier": types.SimpleNamespace(
                init=_init, wait=_wait, expect=_expect, arrive=_arrive, MBarrierLayout=lambda: None
            ),
            "range": range,
            "QueryItem": QueryItem,
        }
        for name, value in SOURCE.items():
            if isinstance(value, triton.JITFunction):
                names[name] = types.FunctionType(value.fn.__code__, names, name)
            elif isinstance(value, type(gluon_forward.LN2)):
                names[name] = value.value
        return names


def _tables(layout: PrefixLayout, tile: Tile) -> ForwardTables:
    forest = Forest.from_segments(layout.segments.numpy())
    work = QueryTiles.from_forest(forest, tile.block_m, tile.block_n)
    tables = (forest.row_subtree_ends[None], work.items, work.columns, work.masked)
    return ForwardTables(*(torch.from_numpy(table).int().contiguous() for table in tables))


def _check(
    layout: PrefixLayout,
    tile: Tile,
    *,
    seed: int = 0,
    heads: int = 2,
    head_dims: tuple[int, int] = (64, 64),
    scale: float = 0.125,
    dtype: torch.dtype = torch.bfloat16,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compares the launcher on the emulated kernel with the dense reference in float64."""
    torch.manual_seed(seed)
    (head_dim, head_dim_v), num_keys = head_dims, layout.num_tokens
    keep = layout.materialize()
    # K and V of one projection: heads side by side, rows further apart.
    joint = torch.randn(num_keys, heads // 2, head_dim + head_dim_v).to(dtype)
    k, v = joint.flatten(1).split([heads // 2 * head_dim, heads // 2 * head_dim_v], dim=1)
    k, v = k.unflatten(1, (-1, head_dim)), v.unflatten(1, (-1, head_dim_v))
    q = torch.randn(keep.shape[0], heads, head_dim).to(dtype)
    monkeypatch.setattr(gluon_forward, "gluon_forward_kernel", Emulated(seed))
    monkeypatch.setattr(gluon_forward, "select_tile", lambda d, dv: tile)
    config = replace(select_config(90, head_dim, dtype, 132), forward=tile)
    options = Options(scale=scale)
    out, lse = gluon_forward.launch_gluon_forward(
        q, k, v, None, _tables(layout, tile), options, config
    )
    exact = reference_attention(q.double(), k.double(), v.double(), layout, scale=scale)
    pytorch = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=keep, scale=scale, enable_gqa=True
    )[0].transpose(0, 1)
    growth = (num_keys + head_dim) ** 0.5
    assert_within_budget("out", out, exact[0], pytorch, growth=growth)
    float32 = reference_attention(q.float(), k.float(), v.float(), layout, scale=scale)
    assert_within_budget("lse", lse, exact[1], float32[1], growth=growth)


@st.composite
def layouts(draw: st.DrawFn) -> PrefixLayout:
    """Random forests with at least one query; some segments may have none."""
    lengths, parents = draw(forests(max_length=19))
    lengths[0] = max(1, lengths[0])
    layout = PrefixLayout.from_tree(lengths, parents)
    chosen = draw(st.none() | st.sets(st.integers(0, len(lengths) - 1)))
    return layout if chosen is None else layout.queries_for(sorted({0, *chosen}))


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), stages=st.integers(2, 4), seed=st.integers(0, 2**16))
def test_gluon_source_matches_reference_on_any_tree(layout, stages, seed):
    """Small tiles: many rounds of the stages, tiles without listed, own or masked keys."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _check(layout, Tile(8, 4, stages), seed=seed, monkeypatch=monkeypatch)


@pytest.mark.parametrize("head_dims", [(64, 64), (128, 64), (64, 128), (128, 128)])
def test_gluon_source_matches_reference_in_its_own_tiles(head_dims, monkeypatch):
    # Two full tiles of prefix and a ragged one; suffixes shorter and longer than a tile.
    layout = PrefixLayout.from_lengths([300, 5], [[150, 20], [9]])
    tile = gluon_forward.select_tile(*head_dims)
    _check(layout, tile, head_dims=head_dims, dtype=torch.float16, monkeypatch=monkeypatch)


def test_gluon_source_takes_a_negative_scale(monkeypatch):
    layout = PrefixLayout.from_lengths([13], [[7, 5]])
    _check(layout, Tile(8, 4, 2), scale=-0.2, heads=4, monkeypatch=monkeypatch)


def test_gluon_source_takes_a_first_tile_without_mask(monkeypatch):
    """The masked rule covers the first tile even where the work list has no masked ones."""
    layout = PrefixLayout.from_tree([16, 8], [-1, 0]).queries_for([1])
    tile = Tile(8, 4, 2)
    tables = _tables(layout, tile)
    (item,) = tables.items.tolist()
    assert item[8] == 2
    # Every row sees the first 16 keys: without the others, only full tiles are left.
    tables.items[0, 8] = 0
    monkeypatch.setattr(gluon_forward, "gluon_forward_kernel", Emulated(0))
    monkeypatch.setattr(gluon_forward, "select_tile", lambda d, dv: tile)
    config = replace(select_config(90, 64, torch.bfloat16, 132), forward=tile)
    q, k, v = (torch.randn(n, 2, 64).bfloat16() for n in (8, 24, 24))
    out, lse = gluon_forward.launch_gluon_forward(q, k, v, None, tables, PLAIN, config)
    scores = torch.einsum("mhd,nhd->hmn", q.double(), k[:16].double()) * PLAIN.scale
    exact = torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v[:16].double())
    pytorch = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k[:16], v[:16])), scale=PLAIN.scale
    )[0].transpose(0, 1)
    assert_within_budget("out", out, exact, pytorch)
    assert_within_budget("lse", lse, scores.logsumexp(-1), scores.float().logsumexp(-1))


def test_gluon_launcher_takes_no_queries(monkeypatch):
    monkeypatch.setattr(gluon_forward, "gluon_forward_kernel", None)
    layout = PrefixLayout.from_lengths([], [])
    tile = gluon_forward.select_tile(64, 64)
    config = replace(select_config(90, 64, torch.bfloat16, 132), forward=tile)
    empty = torch.empty(0, 2, 64, dtype=torch.bfloat16)
    out, lse = gluon_forward.launch_gluon_forward(
        empty, empty, empty, None, _tables(layout, tile), PLAIN, config
    )
    assert (out.shape, lse.shape) == ((0, 2, 64), (2, 0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": 100}, r"got 10\.0"),
        ({"arch": "gfx942"}, "got gfx942"),
        ({"dtype": torch.float32}, "got torch.float32"),
        ({"head_dim_v": 80}, "DV 80"),
        ({"options": PLAIN._replace(window_size=4)}, "no window_size"),
        ({"options": PLAIN._replace(softcap=30.0)}, "no softcap"),
        ({"options": PLAIN._replace(prefix_causal=False)}, "no prefix_causal=False"),
        ({"sinks": torch.zeros(2)}, "no sinks"),
    ],
)
def test_gluon_says_why_not(change, words):
    call = {
        "arch": 90, "dtype": torch.bfloat16, "head_dim": 128, "head_dim_v": 128,
        "options": PLAIN, "sinks": None,
    }  # fmt: skip
    assert gluon_forward.why_not(**call) is None
    assert re.search(words, gluon_forward.why_not(**{**call, **change}))


def test_gluon_refuses_an_unknown_triton(monkeypatch):
    monkeypatch.setattr(gluon_forward, "tma_load", None)
    reason = gluon_forward.why_not(90, torch.bfloat16, 64, 64, PLAIN, None)
    assert "3.9" in reason
    assert triton.__version__ in reason


def test_gluon_copies_only_what_tma_cannot_read():
    x = torch.zeros(6, 2, 64, dtype=torch.bfloat16)
    near = torch.zeros(6, 5, 64, dtype=torch.bfloat16)[:, 1:3]
    for view in (x, near):
        assert gluon_forward._descriptor(view, 4).base.data_ptr() == view.data_ptr()
    apart = torch.zeros(2, 6, 64, dtype=torch.bfloat16).transpose(0, 1)
    odd = torch.zeros(6, 129, dtype=torch.bfloat16)[:, 1:].unflatten(1, (2, 64))
    repeated = x[:1].expand(6, 2, 64)
    for view in (apart, odd, repeated):
        descriptor = gluon_forward._descriptor(view, 4)
        assert descriptor.base.data_ptr() != view.data_ptr()
        assert tuple(descriptor.strides) == (128, 1)


def compile_kernel(dtype: str, head_dim: int, head_dim_v: int) -> dict[str, Any]:
    """Compiles for sm_90 in this process, which a failing compiler may abort."""
    import contextlib
    import io

    from triton import knobs
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    tile = gluon_forward.select_tile(head_dim, head_dim_v)
    constants = {
        "GROUP": 4, "D": head_dim, "DV": head_dim_v, "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n, "STAGES": tile.num_stages, "NEGATIVE_SCALE": False,
        "CONSUMER_REGISTERS": gluon_forward.CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": gluon_forward.PRODUCER_REGISTERS,
    }  # fmt: skip
    blocks = {
        "q_desc": (tile.block_m // 2, head_dim),
        "k_desc": (tile.block_n, head_dim),
        "v_desc": (tile.block_n, head_dim_v),
    }

    def kind(name: str) -> str:
        if name in blocks:
            rows, columns = blocks[name]
            x = torch.empty(rows, 2, columns, dtype=getattr(torch, dtype))
            descriptor = gluon_forward._descriptor(x, rows)
            return native_specialize_impl(BaseBackend, descriptor, False, True, True)[0]
        element = {"out_ptr": {"bfloat16": "bf16", "float16": "fp16"}[dtype], "lse_ptr": "fp32"}
        if name.endswith("_ptr"):
            return "*" + element.get(name, "i32")
        return "constexpr" if name in constants else "fp32" if name == "scale" else "i32"

    kernel = gluon_forward.gluon_forward_kernel
    types_ = {name: kind(name) for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, text) in enumerate(types_.items())
        if text.startswith("*") or name.startswith("stride")
    }
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        knobs.cache.dir = folder
        compiled = triton.compile(
            GluonASTSource(kernel, types_, constexprs=constants, attrs=aligned),
            target=GPUTarget("cuda", 90, 32),
            options={
                "num_warps": 4, "maxnreg": gluon_forward.REGISTERS, "enable_fp_fusion": True,
            },
        )  # fmt: skip
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\S+\s+)?(\S.*?)\s*;", sass, re.MULTILINE)
    return {
        "log": log.getvalue(),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "lines": lines,
    }


@pytest.fixture(scope="module", params=[("bfloat16", 128, 128), ("float16", 64, 64)])
def machine_code(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Compiled in a process of its own."""
    from bench.machine_code.compile import missing_tools

    if reason := missing_tools():
        pytest.skip(reason)
    command = [sys.executable, __file__, json.dumps(request.param)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_gluon_machine_code_fits_and_does_not_spill(machine_code):
    log = machine_code["log"]
    assert "0 bytes spill stores, 0 bytes spill loads" in log
    assert "serialized" not in log
    assert machine_code["shared"] <= 227 << 10
    registers = int(re.search(r"Used (\d+) registers", log).group(1))
    # A block starts with `registers` for each thread, and its parts share them out.
    assert machine_code["warps"] == 12
    assert registers * 32 * 12 <= 65536
    parts = 2 * gluon_forward.CONSUMER_REGISTERS + gluon_forward.PRODUCER_REGISTERS
    assert parts * 4 <= registers * 12


def test_gluon_machine_code_overlaps_softmax_with_products(machine_code):
    """Loads by TMA, and in each loop a wait that leaves the product P V running."""
    opcodes = Counter(line.split()[0].split(".")[0] for line in machine_code["lines"])
    assert opcodes["UTMALDG"] >= 4
    assert opcodes["HGMMA"]
    assert not opcodes["HMMA"]
    assert not opcodes["LDL"] + opcodes["STL"]
    # Two warp groups, each with a masked and a full loop: behind the wait for S come the 64
    # exponentials of a thread, and then the wait for P V.
    overlapped = []
    for line in machine_code["lines"]:
        if line.startswith("WARPGROUP.DEPBAR"):
            if "gsb0, 0x1" in line:
                overlapped.append(0)
            waits_for_one = "gsb0, 0x1" in line
        elif overlapped and waits_for_one and line.startswith("MUFU.EX2"):
            overlapped[-1] += 1
    assert len(overlapped) == 4
    assert min(overlapped) >= 64, overlapped


if __name__ == "__main__":
    print(json.dumps(compile_kernel(*json.loads(sys.argv[1]))))
