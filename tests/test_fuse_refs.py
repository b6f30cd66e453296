"""What workers know together: written by one, read by all, whoever is killed."""

from __future__ import annotations

import os

import pytest

from cachefs_sidecar.fuse.refs import Refs

REF = "0123456789abcdef" * 2


def test_what_one_process_finds_out_all_know() -> None:
    refs = Refs(1000)
    assert refs.get(7) is None
    pid = os.fork()
    if pid == 0:
        refs.put(7, REF, 1 << 40)
        refs.put(999, REF[::-1], 0)
        os._exit(0)
    os.waitpid(pid, 0)
    assert refs.get(7) == (REF, 1 << 40)
    assert refs.get(999) == (REF[::-1], 0)
    assert refs.get(8) is None


def test_nodes_beyond_its_room_are_not_remembered() -> None:
    refs = Refs(10)
    for node in (10, 11, 1 << 62):
        refs.put(node, REF, 5)
        assert refs.get(node) is None
    none = Refs(0)
    none.put(0, REF, 5)
    assert none.get(0) is None


@pytest.mark.parametrize("written", range(1, 28))
def test_a_record_that_was_begun_says_nothing(written: int) -> None:
    whole = Refs(10)
    whole.put(5, REF, (1 << 64) - 1)
    begun = Refs(10)
    begun._memory[5 * 32 : 5 * 32 + written] = whole._memory[5 * 32 : 5 * 32 + written]
    assert begun.get(5) is None
    late = Refs(10)
    late._memory[5 * 32 + written : 6 * 32] = whole._memory[5 * 32 + written : 6 * 32]  # seen in another order
    assert late.get(5) is None


def test_room_for_a_catalog_and_for_what_refreshes_bring() -> None:
    assert Refs.of(1_000_000, 1 << 30).nodes > 1_200_000
    assert Refs.of(1_000_000, 32 * 1000).nodes == 1000
    assert Refs.of(1, 0).nodes == 0
