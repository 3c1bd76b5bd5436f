"""Work lists on a device: one copy per layout, kept with it, safe under streams and CUDA graphs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from prefix_attn import PrefixLayout
from prefix_attn.backends import schedule, tables
from prefix_attn.backends.tables import ALIGNMENT, Tables, Wanted, tables_of
from prefix_attn.content import _content, content_of
from prefix_attn.forest import CACHED_LAYOUTS
from prefix_attn.kernels.config import INTERPRETER, Tile

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WANTED = Wanted(CPU, INTERPRETER, None, True, 2, 2, fused=False)
# Every list has entries: split tiles, listed, own and masked ones.
LENGTHS = ([50], [[30, 45, 60, 20]])


def built(wanted: Wanted = WANTED, *, with_backward: bool = True) -> tuple[PrefixLayout, Tables]:
    layout = PrefixLayout.from_lengths(*LENGTHS)
    return layout, tables_of(content_of(layout.segments), wanted, with_backward=with_backward)


def count_copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every copy to a device."""
    copies: list[int] = []
    upload = tables._Upload

    def counted(*arguments: Any) -> Any:
        copies.append(1)
        return upload(*arguments)

    monkeypatch.setattr(tables, "_Upload", counted)
    return copies


@pytest.mark.parametrize("window_size", [None, 24], ids=["all", "window"])
@pytest.mark.parametrize("fused", [False, True], ids=["deterministic", "any order"])
def test_tables_hold_the_schedules(window_size, fused):
    layout, made = built(WANTED._replace(window_size=window_size, fused=fused))
    forest = content_of(layout.segments).forest(window_size, True)
    queries = schedule.QueryTiles.from_forest(forest, 32, 16)
    keys = schedule.balanced_key_tiles(forest, 16, 32, heads=2, group=2, processors=4)
    for name in ("items", "columns", "masked"):
        assert np.array_equal(getattr(made.forward, name), getattr(queries, name))
    backward = made.backward
    order, _ = schedule.backward_order(keys, queries, 16 * 32, 32 * 16, 2)
    assert np.array_equal(backward.order, order[order[:, 0] < len(keys.items)] if fused else order)
    for name, expected in (("items", keys.items), ("rows", keys.queries), ("splits", keys.splits)):
        assert np.array_equal(getattr(backward.keys, name), expected), name
    assert backward.keys.num_slots == keys.num_slots > 0
    assert backward.values is None
    for name, expected in (
        # Where key tiles add up dQ, no query tile is launched.
        ("query_items", queries.items[: 0 if fused else None]),
        ("columns", queries.columns[: 0 if fused else None]),
        ("masked", queries.masked[: 0 if fused else None]),
    ):
        assert np.array_equal(getattr(backward, name), expected), name
    assert backward.rule is made.forward.rule
    assert made.forward.rule[0].equal(layout.subtree_end)


@pytest.mark.parametrize("fused", [False, True], ids=["deterministic", "any order"])
def test_tables_list_key_tiles_of_dv_apart(fused):
    config = replace(INTERPRETER, values=Tile(16, 16))
    layout, made = built(WANTED._replace(config=config, fused=fused))
    forest = content_of(layout.segments).forest(None, True)
    share = {"heads": 2, "group": 2, "processors": 4}
    keys = schedule.balanced_key_tiles(forest, 16, 32, **share)
    values = schedule.balanced_key_tiles(forest, 16, 16, **share)
    assert made.backward.values is not None
    for kept, expected in ((made.backward.keys, keys), (made.backward.values, values)):
        assert np.array_equal(kept.items, expected.items)
        assert np.array_equal(kept.splits, expected.splits)
        assert kept.num_slots == expected.num_slots > 0
    order, found = made.backward.order.numpy(), len(keys.items) + len(values.items)
    every = found + 2 * len(made.backward.query_items)
    assert len(np.unique(order, axis=0)) == len(order) == every
    assert sorted(order[order[:, 0] < found, 0]) == list(range(found))
    assert (every == found) == fused


def test_tables_of_both_passes_are_one_copy_in_aligned_places(monkeypatch):
    copies = count_copies(monkeypatch)
    _, made = built(WANTED._replace(kv_heads=4))
    lists = [made.forward.items, made.forward.columns, made.backward.order]
    lists.append(made.backward.keys.splits)
    assert len(copies) == 1
    assert len({x.untyped_storage().data_ptr() for x in lists}) == 1
    assert [x.storage_offset() % ALIGNMENT for x in lists] == [0, 0, 0, 0]


@pytest.mark.parametrize(("queries", "lists"), [(Tile(32, 16, 5), 1), (Tile(32, 32), 2)], ids=str)
def test_tables_of_both_passes_have_one_list_of_query_tiles_of_one_size(
    monkeypatch, queries, lists
):
    made = []
    build = schedule.QueryTiles.from_forest
    monkeypatch.setattr(schedule.QueryTiles, "from_forest", lambda *a: made.append(1) or build(*a))
    built(WANTED._replace(config=replace(INTERPRETER, queries=queries), kv_heads=64))
    assert len(made) == lists


def test_tables_of_the_backward_pass_are_made_when_it_comes_after_all(monkeypatch):
    copies = count_copies(monkeypatch)
    _, made = built(WANTED._replace(kv_heads=8), with_backward=False)
    assert len(copies) == 1
    assert made.backward is made.backward
    assert len(copies) == 2


def test_tables_are_shared_by_layouts_of_one_content_and_kept_by_each(monkeypatch):
    layout, made = built()
    _, again = built()
    assert again is made
    # However many other layouts come: this one still has its own.
    for i in range(CACHED_LAYOUTS + 1):
        other = PrefixLayout.from_lengths([i], [[1]])
        content_of(other.segments)
    assert tables_of(content_of(layout.segments), WANTED, with_backward=True) is made


def test_tables_differ_where_what_they_depend_on_differs():
    layout, _ = built()
    others = [
        WANTED._replace(window_size=24),
        WANTED._replace(prefix_causal=False),
        WANTED._replace(kv_heads=1, group=4),
        WANTED._replace(fused=True),
        WANTED._replace(config=replace(INTERPRETER, forward=Tile(16, 16))),
    ]
    content = content_of(layout.segments)
    found = {id(tables_of(content, x, with_backward=False)) for x in (WANTED, *others)}
    assert len(found) == 1 + len(others)


def test_tables_follow_segments_that_are_changed_in_place():
    layout = PrefixLayout.from_lengths([4], [[2, 2]])
    before = content_of(layout.segments)
    assert content_of(layout.segments) is before
    layout.segments[0, 0] = 5
    assert content_of(layout.segments).num_tokens == before.num_tokens + 1


def test_tables_do_not_travel_with_a_layout():
    layout, _ = built()
    plain = PrefixLayout.from_lengths(*LENGTHS)
    assert len(pickle.dumps(layout)) == len(pickle.dumps(plain))
    assert vars(copy.deepcopy(layout).segments) == {}


def test_content_goes_with_its_layout():
    layout = PrefixLayout.from_lengths([41, 7], [[9], [3, 5]])
    seen = weakref.ref(content_of(layout.segments))
    _content.cache_clear()
    gc.collect()
    assert seen() is not None
    del layout
    gc.collect()
    assert seen() is None


@pytest.fixture
def capturing():
    """A CUDA graph is being captured, or so it seems."""
    with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
        yield


@pytest.mark.usefixtures("capturing")
def test_capture_of_a_layout_without_tables_is_refused():
    content = content_of(PrefixLayout.from_lengths(*LENGTHS).segments)
    with pytest.raises(RuntimeError, match="run the same call once with this layout before the"):
        tables_of(content, WANTED._replace(device=CUDA), with_backward=False)


def test_capture_of_a_backward_pass_without_tables_is_refused():
    _, made = built(WANTED._replace(kv_heads=16), with_backward=False)
    made._wanted = made._wanted._replace(device=CUDA)
    with (
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=True),
        pytest.raises(RuntimeError, match="its backward pass included"),
    ):
        _ = made.backward


@pytest.mark.usefixtures("capturing")
def test_what_a_capture_uses_is_kept_when_its_layout_goes():
    content = content_of(PrefixLayout.from_lengths([3, 3], [[2], [2]]).segments)
    seen = []
    for device in (CUDA, CPU):
        made = Tables(content, WANTED, with_backward=True)
        made._wanted = WANTED._replace(device=device)
        made.use()
        seen.append(weakref.ref(made))
        del made
    gc.collect()
    assert seen[0]() is not None
    assert seen[1]() is None
    tables._captured.clear()


class Stream:
    """Takes the place of a CUDA stream; notes what it waits for."""

    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.waited: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


def test_another_stream_waits_for_the_copy_and_holds_its_memory(monkeypatch):
    """Once: the streams of a training step are always the same."""
    _, made = built(WANTED._replace(kv_heads=32))
    held: list[Stream] = []
    (upload,) = made._uploads
    upload._buffer = SimpleNamespace(record_stream=held.append)
    upload._copied, upload._streams = "the copy", {1}
    made._wanted = made._wanted._replace(device=CUDA)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first, second = Stream(1), Stream(2)
    for stream in (first, second, second, first):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, x=stream: x)
        made.use()
    assert (first.waited, second.waited, held) == ([], ["the copy"], [second])
