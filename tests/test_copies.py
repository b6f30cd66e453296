"""Which copies give way, to what: by the fetcher's own code, for objects that are on paper only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cachefs import datasets
from cachefs.digest import BLOCK_SIZE, version_ref
from cachefs.errors import CacheFull
from cachefs.fetcher import clearing as clearing_module
from cachefs.fetcher.prefetch.course import Course
from tests.foreseeing import SIZE, Node

NAMES = [f"bucket/{n}" for n in range(100)]
ROOM = 8

# The first ten count on this node.
OWNED = set(NAMES[:10])


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """Room for eight objects."""
    made = Node(tmp_path, ROOM * SIZE, lambda path: path in OWNED)
    yield made
    await made.close()


async def planned(node: Node, order: list[int]) -> Course:
    """A consumer that is believed reads these."""
    course = node.consumers.announce(NAMES)
    node.consumers.plan(course, order)
    await node.consumers.look_through()
    node.room.plans = node.consumers.foresight
    return course


async def keep(node: Node, *numbers: int) -> list[bool]:
    return [await node.keep(NAMES[n]) for n in numbers]


def held(node: Node) -> set[int]:
    return {n for n, name in enumerate(NAMES) if node.has(name)}


async def test_without_plans_what_came_first_stays(node: Node):
    assert await keep(node, *range(20, 30)) == [True] * 8 + [False] * 2
    assert held(node) == set(range(20, 28))
    assert await keep(node, 0) == [True]  # counted on: copies give way, as many as make room for some more
    assert held(node) == {0, *range(24, 28)}


async def test_a_copy_takes_the_place_of_the_one_that_is_read_last(node: Node):
    await keep(node, *range(20, 28))
    # In the order of the plan: 20 to 27, each behind one that has no room.
    await planned(node, [20, 31, 21, 32, 22, 33, 23, 24, 25, 26, 27, 34])
    assert await keep(node, 31) == [True]
    assert held(node) == {31, *range(20, 27)}
    assert await keep(node, 34) == [False], "it is read later than all that are here"
    assert await keep(node, 33, 32) == [True, True]
    assert held(node) == {31, 32, 33, *range(20, 25)}


async def test_one_that_no_plan_names_goes_before_any_other_and_comes_in_place_of_none(node: Node):
    await keep(node, *range(20, 28))
    await planned(node, [*range(20, 25), 26, 27, 30])
    assert await keep(node, 40) == [False]
    assert await keep(node, 30) == [True]
    assert held(node) == {*range(20, 25), 26, 27, 30}


async def test_what_counts_on_this_node_gives_way_to_no_copy(node: Node):
    await keep(node, *range(8))
    await planned(node, [30, 31])
    assert await keep(node, 30) == [False]
    assert held(node) == set(range(8))


async def test_what_is_counted_on_takes_the_place_of_those_that_are_read_last(
    node: Node, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(clearing_module, "COPIES_AT_LEAST", SIZE)
    await keep(node, *range(20, 28))
    await planned(node, [27, 20, 26, 21, 25, 22])
    for number, goes in enumerate([23, 24, 22, 25, 21, 26, 20, 27]):
        before = held(node)
        assert await keep(node, number) == [True]
        assert held(node) == before - {goes} | {number}
    assert await keep(node, 8) == [False]


async def test_a_plan_that_ends_leaves_first_come_first_kept(node: Node):
    await keep(node, *range(20, 28))
    course = await planned(node, [30, 31, 32])
    assert await keep(node, 30) == [True]
    node.consumers.courses.remove(course)
    course.close()
    before = held(node)
    assert await keep(node, 31, 32) == [False, False]
    assert held(node) == before


async def test_a_plan_that_is_over_leaves_first_come_first_kept(node: Node):
    await keep(node, *range(20, 28))
    course = await planned(node, [30, 31, 32])
    node.consumers.at(course, 3, 1.0)
    assert await keep(node, 30, 31, 32) == [False] * 3


async def test_a_large_copy_has_all_its_room_or_nothing_goes(node: Node):
    await keep(node, *range(20, 28))
    await planned(node, [20, 21, 22, 23, 24, 25, 30, 26, 27])
    assert not await node.keep(NAMES[30], 3 * SIZE)  # two are read later
    assert held(node) == set(range(20, 28))
    assert await node.keep(NAMES[30], 2 * SIZE)
    assert held(node) == {*range(20, 26), 30}


async def test_blocks_of_large_objects_take_the_place_of_nothing(node: Node):
    """Of an object in many blocks some could have room, and others not."""
    await keep(node, *range(20, 28))
    await planned(node, [30])
    with pytest.raises(CacheFull):
        await node.clearing.reserve(SIZE, "d5" * 16, None, copy=True)
    assert held(node) == set(range(20, 28))


async def test_a_copy_of_a_large_object_is_not_let_go_for_a_small_one(tmp_path: Path):
    node = Node(tmp_path, 2 * BLOCK_SIZE, lambda path: path in OWNED)
    assert await node.keep(NAMES[20], 2 * BLOCK_SIZE)
    await planned(node, [30])
    assert not await node.keep(NAMES[30])
    assert held(node) == {20}
    assert await node.keep(NAMES[1])  # but for what counts on this node
    assert held(node) == {1}
    await node.close()


async def test_copies_that_are_gone_already_do_not_keep_one_from_its_room(node: Node):
    await keep(node, *range(20, 28))
    await planned(node, [30])
    for n in (20, 21, 22):
        node.evict(NAMES[n])
    node.room.capacity.used = ROOM * SIZE  # something else has their room
    assert await keep(node, 30) == [True]
    assert held(node) == {30, *range(24, 28)}


async def test_pinned_datasets_and_what_has_come_to_count_here_stay(node: Node, monkeypatch: pytest.MonkeyPatch):
    await keep(node, *range(20, 28))
    await planned(node, [30, 31])
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "pinned", lambda home: frozenset({"d5" * 16}))
        assert await keep(node, 30) == [False]
        assert held(node) == set(range(20, 28))
    OWNED.update(NAMES[20:28])
    try:
        assert await keep(node, 31) == [False]
        assert held(node) == set(range(20, 28))
    finally:
        OWNED.difference_update(NAMES[20:28])


async def test_where_one_directory_of_several_is_full_copies_in_the_others_stay(node: Node, tmp_path: Path):
    await keep(node, *range(20, 28))
    await planned(node, [30])
    here, there = tmp_path / "here", tmp_path / "there"
    lies = {version_ref(NAMES[n], "v"): here if n == 25 else there for n in range(20, 28)}
    node.room.config = SimpleNamespace(home=here, dirs=(here, there))
    node.room.reader = SimpleNamespace(file=lambda dataset, ref: str(lies[ref] / ref) if ref in lies else None)
    here.mkdir()
    assert await keep(node, 30) == [True]
    assert held(node) == {30, *range(20, 28)} - {25}


async def test_where_there_is_room_or_no_cluster_nobody_looks_anything_up(node: Node):
    class Untouched:
        def __getattr__(self, name: str) -> None:
            raise AssertionError(name)

    node.room.plans = Untouched()
    assert await keep(node, *range(20, 28)) == [True] * 8
    node.room.origin = node.room.source
    OWNED.update(NAMES)  # as it is without a cluster
    try:
        assert await keep(node, 50) == [False]
    finally:
        OWNED.difference_update(NAMES[10:])
