"""Incomplete large objects: a block counts as present only when its bytes are known to be right."""

from __future__ import annotations

import errno
import gc
import os
import threading
from pathlib import Path

import pytest

from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE, block_range, content_key, digest, version_ref
from cachefs.errors import CacheError, CacheFull, DamagedBlob
from cachefs.store import Part, Reader, Store, blockmap, layout
from cachefs.store import part as part_module

DATASET = "d5" * 16
REF = version_ref("bucket/shard.tar", "v1")
SIZE = 3 * BLOCK_SIZE + 1000
CONTENT = os.urandom(1 << 20) * (SIZE >> 20) + b"tail" * ((SIZE & ((1 << 20) - 1)) // 4)
HEADER, RECORD = 64, 32

# Until a file is on the disk, ext4 counts the metadata that it may need: st_blocks changes by some 4 KiB.
SLACK = 65536


def block(number: int, content: bytes = CONTENT) -> bytes:
    start, stop = block_range(number, len(content))
    return content[start:stop]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(CacheConfig.make(tmp_path / "cache", min_free=0))


@pytest.fixture
def part(store: Store) -> Part:
    return store.part(REF, SIZE)


def map_of(store: Store) -> Path:
    return store.config.home / "parts" / f"{REF}.map"


def reopened(store: Store, part: Part, size: int = SIZE) -> Part:
    part.close()
    return Store.open(store.config).part(REF, size)


def reboot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "boot").write_text("another")
    monkeypatch.setattr(layout, "BOOT_ID", str(tmp_path / "boot"))


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


# --- blocks arrive ---


def test_blocks_arrive_in_any_order_and_become_a_blob(store: Store, part: Part) -> None:
    assert len(CONTENT) == SIZE
    for number in (2, 0, 3, 1):
        assert not part.complete
        assert not part.present(number)
        assert not part.checked(number)
        part.write(number, block(number))
        assert part.present(number)
        assert part.checked(number)
    assert part.complete
    assert part.missing == []
    key = part.finish([(DATASET, REF)])
    assert key == content_key(CONTENT)
    found = Reader(store.config.dirs).open(DATASET, REF)
    assert found is not None
    with open(found[0], "rb") as file:
        assert file.read() == CONTENT
    info = store.path(key).stat()
    assert info.st_mode & 0o777 == 0o444
    assert info.st_mtime_ns == store.seal
    assert Path(f"{store.path(key)}.blocks").read_bytes() == b"".join(digest(block(n)) for n in range(4))
    assert store.check(key)
    assert store.key_of(DATASET, REF) == key
    assert os.listdir(store.config.home / "parts") == []
    assert list(store.parts()) == []


def test_a_part_takes_only_the_room_of_its_blocks(store: Store, part: Part) -> None:
    empty = part.allocated
    assert empty < 100_000
    part.write(1, block(1))
    assert BLOCK_SIZE <= part.allocated - empty < BLOCK_SIZE + 100_000
    assert part.path.stat().st_size == SIZE
    assert abs(store.usage().bytes - part.allocated) < SLACK
    assert part.discard() >= BLOCK_SIZE
    assert store.usage() == (0, 0)
    assert os.listdir(store.config.home / "parts") == []


def test_run_is_the_largest_range_that_may_be_served(part: Part) -> None:
    assert part.run(0, SIZE) == (0, 0)
    part.write(1, block(1))
    part.write(2, block(2))
    assert part.run(BLOCK_SIZE + 5, BLOCK_SIZE + 6) == (BLOCK_SIZE, 3 * BLOCK_SIZE)
    assert part.run(2 * BLOCK_SIZE, SIZE) == (BLOCK_SIZE, 3 * BLOCK_SIZE)
    assert part.run(3 * BLOCK_SIZE, SIZE) == (3 * BLOCK_SIZE, 3 * BLOCK_SIZE)
    assert part.run(5, 2 * BLOCK_SIZE) == (5, 5)
    part.write(3, block(3))
    assert part.run(2 * BLOCK_SIZE, SIZE) == (BLOCK_SIZE, SIZE)
    part.write(0, block(0))
    assert part.run(SIZE - 1, SIZE) == (0, SIZE)
    for start, stop in ((SIZE, SIZE), (-1, 5), (5, 5)):
        assert part.run(start, stop) == (start, start)


def test_a_block_has_its_exact_length(part: Part) -> None:
    for number, data in ((0, b"short"), (3, block(0)), (4, b""), (-1, block(3)), (0, block(0) + b"x")):
        with pytest.raises(CacheError):
            part.write(number, data)
    assert part.missing == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [0, 1, BLOCK_SIZE])
def test_small_objects_may_be_parts_too(store: Store, size: int) -> None:
    content = os.urandom(size)
    part = store.part(REF, size)
    if size:
        part.write(0, content)
    assert part.complete
    key = part.finish([(DATASET, REF)])
    assert key == content_key(content)
    assert store.path(key).read_bytes() == content
    assert store.check(key)


def test_content_that_is_there_already_is_only_linked(store: Store, part: Part) -> None:
    key = store.put(CONTENT, links=[(DATASET, version_ref("other", "v"))])
    for number in range(4):
        part.write(number, block(number))
    assert part.finish([(DATASET, REF)]) == key
    assert store.usage().blobs == 1
    assert store.usage().bytes < 1.1 * SIZE
    assert store.path(key).stat().st_nlink == 3


def test_readers_keep_the_part_they_opened(store: Store, part: Part) -> None:
    with open(part.path, "rb") as file:
        for number in range(4):
            part.write(number, block(number))
        part.finish([(DATASET, REF)])
        assert file.read() == CONTENT


# --- restarts ---


def test_blocks_survive_a_restart_of_the_fetcher(store: Store, part: Part) -> None:
    part.write(0, block(0))
    part.write(2, block(2))
    again = reopened(store, part)
    assert again.missing == [1, 3]
    assert again.run(0, SIZE) == (0, BLOCK_SIZE), "written in this boot: trusted"
    again.write(1, block(1))
    again.write(3, block(3))
    assert again.finish([(DATASET, REF)]) == content_key(CONTENT)


def test_after_a_reboot_blocks_are_compared_before_they_are_served(
    store: Store, part: Part, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in (0, 1, 2):
        part.write(number, block(number))
    flip(part.path, BLOCK_SIZE + 17)
    reboot(monkeypatch, tmp_path)
    again = reopened(store, part)
    assert [again.present(n) for n in range(4)] == [True, True, True, False]
    assert again.run(0, SIZE) == (0, 0)
    assert again.checked(0)
    assert again.run(0, SIZE) == (0, BLOCK_SIZE)
    assert not again.checked(1)
    assert not again.present(1)
    assert again.checked(2)
    third = reopened(store, again)
    assert third.missing == [1, 3]
    assert third.run(2 * BLOCK_SIZE, SIZE) == (2 * BLOCK_SIZE, 3 * BLOCK_SIZE), "compared in this boot: trusted"


def test_finish_compares_blocks_of_an_earlier_boot(
    store: Store, part: Part, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in range(4):
        part.write(number, block(number))
    flip(part.path, SIZE - 1)
    reboot(monkeypatch, tmp_path)
    again = reopened(store, part)
    assert again.complete
    with pytest.raises(DamagedBlob, match="block 3"):
        again.finish([(DATASET, REF)])
    assert again.missing == [3]
    again.write(3, block(3))
    assert again.finish([(DATASET, REF)]) == content_key(CONTENT)


def test_an_incomplete_object_cannot_be_finished(store: Store, part: Part) -> None:
    part.write(0, block(0))
    with pytest.raises(DamagedBlob, match="block 1"):
        part.finish([(DATASET, REF)])
    assert part.present(0)
    assert Reader(store.config.dirs).open(DATASET, REF) is None


def test_a_complaint_makes_a_block_be_compared_again(part: Part) -> None:
    part.write(0, block(0))
    part.write(1, block(1))
    flip(part.path, 5)
    part.folder.set_seal(str(part.path))  # as a bad sector: nothing wrote to the file
    assert part.checked(0)
    assert not part.checked(0, again=True)
    assert part.checked(1, again=True)
    assert part.missing == [0, 2, 3]


def test_what_somebody_else_wrote_is_noticed(part: Part) -> None:
    for number in range(3):
        part.write(number, block(number))
    flip(part.path, BLOCK_SIZE + 5)
    assert not part.checked(1)
    assert part.missing == [1, 3]
    flip(part.path, 5)
    part.write(1, block(1))  # a block of ours must not hide what was done to another one
    assert not part.checked(0)
    flip(part.path, 2 * BLOCK_SIZE)
    part.write(0, block(0))
    part.write(3, block(3))
    with pytest.raises(DamagedBlob, match="block 2"):
        part.finish([(DATASET, REF)])
    part.write(2, block(2))
    assert part.finish([(DATASET, REF)]) == content_key(CONTENT)


def test_a_part_whose_file_somebody_removed_is_lost(part: Part) -> None:
    part.write(0, block(0))
    assert not part.lost
    part.path.unlink()
    assert part.lost


# --- what the disk may hold after a crash ---


@pytest.mark.parametrize("offset", range(RECORD))
def test_a_torn_record_is_no_block(store: Store, part: Part, offset: int) -> None:
    part.write(0, block(0))
    part.write(1, block(1))
    flip(map_of(store), HEADER + RECORD + offset)
    assert reopened(store, part).missing == [1, 2, 3]


def test_records_do_not_move(store: Store, part: Part) -> None:
    part.write(0, block(0))
    raw = map_of(store).read_bytes()
    map_of(store).write_bytes(raw[:HEADER] + raw[HEADER:] + raw[HEADER:])
    assert reopened(store, part).missing == [1, 2, 3]


@pytest.mark.parametrize("length", [0, 10, HEADER, HEADER + 5, HEADER + RECORD, HEADER + RECORD + 31])
def test_a_map_that_was_cut(store: Store, part: Part, length: int) -> None:
    part.write(0, block(0))
    part.write(1, block(1))
    os.truncate(map_of(store), length)
    again = reopened(store, part)
    assert again.missing == ([1, 2, 3] if length >= HEADER + RECORD else [0, 1, 2, 3])
    again.write(1, block(1))
    assert reopened(store, again).present(1)


@pytest.mark.parametrize("offset", range(0, HEADER, 7))
def test_a_damaged_header_starts_over(store: Store, part: Part, offset: int) -> None:
    part.write(0, block(0))
    flip(map_of(store), offset)
    again = reopened(store, part)
    assert again.missing == [0, 1, 2, 3]
    assert again.allocated < BLOCK_SIZE


def test_another_size_or_format_starts_over(store: Store, part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    part.write(0, block(0))
    with monkeypatch.context() as patch:
        patch.setattr(blockmap, "FORMAT", 2)
        part = reopened(store, part)
        assert part.missing == [0, 1, 2, 3]
    part = reopened(store, part, SIZE - 1)
    part.write(0, block(0))
    assert reopened(store, part).missing == [0, 1, 2, 3]


@pytest.mark.parametrize("lost", ["map", "bytes"])
def test_half_of_a_part_is_nothing(store: Store, part: Part, lost: str) -> None:
    part.write(0, block(0))
    (map_of(store) if lost == "map" else part.path).unlink()
    assert list(store.parts()) == [REF]
    assert reopened(store, part).missing == [0, 1, 2, 3]
    assert store.discard_part(REF) > 0
    assert store.discard_part(REF) == 0
    assert os.listdir(store.config.home / "parts") == []


def test_a_part_killed_while_it_finished_is_opened_again(store: Store, part: Part) -> None:
    part.write(0, block(0))
    part.path.chmod(0o444)
    again = reopened(store, part)
    assert again.present(0)
    assert again.path.stat().st_mode & 0o777 == 0o600


# --- failures ---


def test_a_write_that_fails_leaves_the_block_absent(store: Store, part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    other = bytes(BLOCK_SIZE)
    part.write(0, other)

    def half(fd: int, data: bytes, offset: int = 0) -> None:
        os.pwrite(fd, data[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(part_module, "write_all", half)
        with pytest.raises(CacheFull):
            part.write(0, block(0))
    assert not part.present(0)
    assert not part.checked(0)
    again = reopened(store, part)
    assert again.missing == [0, 1, 2, 3]
    again.write(0, block(0))
    assert again.checked(0, again=True)


def test_a_part_needs_room_above_the_floor(tmp_path: Path) -> None:
    part = Store.open(CacheConfig.make(tmp_path / "cache", min_free="99%")).part(REF, SIZE)
    with pytest.raises(CacheFull, match="floor"):
        part.write(0, block(0))
    assert part.missing == [0, 1, 2, 3]


def test_a_closed_part_refuses(store: Store, part: Part) -> None:
    part.discard()
    with pytest.raises(CacheError, match="completed or discarded"):
        part.write(0, block(0))
    with pytest.raises(CacheError):
        part.finish()
    fresh = store.part(REF, SIZE)
    assert fresh is not part
    fresh.write(0, block(0))


def test_a_part_leaks_no_descriptor(store: Store) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        store.part(REF, SIZE).write(0, block(0))
    store.part(REF, SIZE).discard()
    with pytest.raises(CacheError):
        store.part(REF, 1 << 62).write(0, b"")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# --- threads ---


def test_threads_share_a_part(store: Store) -> None:
    parts: list[Part] = []
    barrier = threading.Barrier(4)

    def fill(number: int) -> None:
        barrier.wait()
        mine = store.part(REF, SIZE)
        parts.append(mine)
        for offset in range(4):
            mine.write((number + offset) % 4, block((number + offset) % 4))

    threads = [threading.Thread(target=fill, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(map(id, parts))) == 1
    assert parts[0].finish([(DATASET, REF)]) == content_key(CONTENT)


def test_parts_stay_in_their_directory(tmp_path: Path) -> None:
    config = CacheConfig.make([tmp_path / "one", tmp_path / "two"], min_free=0)
    store = Store.open(config)
    homes = set()
    for number in range(12):
        part = store.part(version_ref(str(number), "v"), 1000)
        part.write(0, bytes(999) + bytes([number]))
        key = part.finish([(DATASET, version_ref(str(number), "v"))])
        assert store.path(key).is_relative_to(part.folder.places.root)
        homes.add(part.folder.places.root)
    assert len(homes) == 2
    assert store.usage().blobs == 12
