"""The definition of content keys, pinned: a change of any value here is a new format version."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs import digest


def test_key_version_1_is_pinned():
    assert digest.content_key(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert digest.BLOCK_SIZE == 8 << 20


def test_large_objects_are_keyed_by_their_blocks():
    data = bytes(digest.BLOCK_SIZE) + b"tail"
    blocks = [digest.digest(data[: digest.BLOCK_SIZE]), digest.digest(b"tail")]
    assert digest.content_key(data) == digest.key_of_blocks(blocks)
    assert digest.content_key(data) != digest.digest(b"".join(blocks)), "a small object must not pose as a large one"


@given(st.integers(0, 100 << 20))
def test_blocks_cover_an_object_exactly(size):
    ranges = [digest.block_range(i, size) for i in range(digest.block_count(size))]
    assert sum(stop - start for start, stop in ranges) == size
    assert all(a[1] == b[0] for a, b in pairwise(ranges))


@given(st.text(), st.text(), st.text())
def test_names_are_hex_whatever_the_origin_calls_them(path, version, other):
    ref = digest.version_ref(path, version)
    assert len(ref) == 32
    assert set(ref) <= set("0123456789abcdef")
    assert digest.snapshot_ref(path, version) != ref
    if other != version and "\0" not in path + version + other:
        assert digest.version_ref(path, other) != ref


@pytest.mark.parametrize("name", ["\udcff", "a\nb", "../x", "é", "e\u0301"])
def test_odd_names_have_refs_of_their_own(name):
    assert digest.version_ref(name, "1") != digest.version_ref(name + "x", "1")
