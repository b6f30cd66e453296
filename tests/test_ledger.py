"""What a dataset is charged equals what its refs name, whatever is done in whichever order, and by whom at once."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cachefs import digest
from cachefs.config import CacheConfig
from cachefs.digest import content_key, version_ref
from cachefs.store import Part, Store, blockmap, folder, part, scrub, writer
from cachefs.store.ledger import Book, charge

MINE, OTHER = "d5" * 16, "07" * 16
BLOCK = 4096  # of the model: so that a large object is not large
LARGE = b"0123456789abcdef" * ((2 * BLOCK + 1024) // 16)
CONTENTS = [b"", b"a", b"b" * BLOCK, b"c" * (BLOCK + 1), LARGE]

some_content = st.sampled_from(CONTENTS)
# In several of the folders that a count goes through, and several in one of them.
REFS = [f"{number // 3:02x}{number:030x}" for number in range(12)]
some_ref = st.sampled_from(REFS)
some_refs = st.lists(some_ref, max_size=3, unique=True)
some_dataset = st.sampled_from([MINE, OTHER])


def config(*dirs: Path) -> CacheConfig:
    return CacheConfig.make(dirs, min_free=0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(config(tmp_path / "cache"))


def taken(store: Store, dataset: str) -> int:
    """By the files: distinct inodes of the dataset's refs, and what its incomplete objects have."""
    sizes: dict[object, int] = {}
    for root in store.config.dirs:
        for path in (root / "refs" / dataset).rglob("*"):
            if path.is_file():
                info = path.stat()
                sizes[info.st_dev, info.st_ino] = charge(info.st_size)
        for path in (root / "parts").glob("*.map"):
            held = blockmap.held_blocks(str(path), dataset)
            sizes[str(path)] = sum(map(charge, held))
    return sum(sizes.values())


class LedgerMachine(RuleBasedStateMachine):
    """named: ref of MINE -> (content, how often that content was dropped before). held: blocks of the part."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = [
            mock.patch.object(m, "BLOCK_SIZE", BLOCK) for m in (digest, blockmap, folder, part, scrub, writer)
        ]
        for each in self.patches:
            each.start()
        self.root = Path(tempfile.mkdtemp())
        self.config = config(self.root / "a", self.root / "b")
        self.store = Store.open(self.config)
        self.book: Book | None = None
        self.named: dict[str, tuple[bytes, int]] = {}
        self.dropped = dict.fromkeys(CONTENTS, 0)
        self.held: set[int] = set()

    def teardown(self) -> None:
        for each in self.patches:
            each.stop()
        shutil.rmtree(self.root)

    @rule(content=some_content, refs=st.lists(some_ref, max_size=3, unique=True), dataset=some_dataset)
    def put(self, content: bytes, refs: list[str], dataset: str) -> None:
        self.store.put(content, links=[(dataset, ref) for ref in refs])
        if dataset == MINE:
            self.named |= dict.fromkeys(refs, (content, self.dropped[content]))

    @rule(content=some_content, ref=some_ref)
    def link(self, content: bytes, ref: str) -> None:
        if self.store.link(content_key(content), [(MINE, ref)]):
            self.named[ref] = content, self.dropped[content]

    @rule(ref=some_ref, dataset=some_dataset)
    def unlink(self, ref: str, dataset: str) -> None:
        self.store.unlink_ref(dataset, ref)
        if dataset == MINE:
            self.named.pop(ref, None)

    @rule(content=some_content)
    def drop(self, content: bytes) -> None:
        self.store.drop(content_key(content))
        self.dropped[content] += 1

    @rule(block=st.integers(0, 2))
    def write(self, block: int) -> None:
        self._part().write(block, LARGE[block * BLOCK : (block + 1) * BLOCK])
        self.held.add(block)

    @precondition(lambda self: len(self.held) == 3)
    @rule(refs=some_refs, dataset=some_dataset)
    def finish(self, refs: list[str], dataset: str) -> None:
        self._part().finish([(dataset, ref) for ref in refs])
        self.held = set()
        if dataset == MINE:
            self.named |= dict.fromkeys(refs, (LARGE, self.dropped[LARGE]))

    @rule(opened=st.booleans())
    def discard(self, opened: bool) -> None:
        if opened:
            self._part().discard()
        else:
            self._part().close()
            self.store.discard_part(version_ref("large", "v"))
        self.held = set()

    @precondition(lambda self: self.book is None)
    @rule()
    def bound(self) -> None:
        self.book = self.store.open_book(MINE)

    @rule()
    def unbound(self) -> None:
        self.book = None
        self.store.ledger.close(MINE)

    @rule(orderly=st.booleans())
    def restart(self, orderly: bool) -> None:
        """A book that was left says what a count says."""
        live = self.store.directories.live
        left = self.book.dump(live) if self.book is not None else None
        self._part().close()
        self.store = Store.open(self.config)
        if left is not None:
            if orderly:
                assert self.store.ledger.open(MINE).load(left, self.store.directories.live)
            self.book = self.store.open_book(MINE)

    @invariant()
    def what_is_charged_is_what_is_named(self) -> None:
        if self.book is not None:
            expected = sum(charge(len(content)) for content, _ in self._distinct())
            expected += sum(charge(len(LARGE[b * BLOCK : (b + 1) * BLOCK])) for b in self.held)
            assert self.book.used == expected == taken(self.store, MINE)

    def _distinct(self) -> set[tuple[bytes, int]]:
        return set(self.named.values())

    def _part(self) -> Part:
        return self.store.part(version_ref("large", "v"), len(LARGE), MINE)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_dataset_in_use_is_counted_to_the_byte(store: Store) -> None:
    """Four threads store, link, replace and remove while it is counted, again and again."""
    contents = [bytes([n]) * (n * 1500) for n in range(1, 40)]
    over = threading.Event()

    def work(seed: int) -> None:
        number = seed
        while not over.is_set():
            number = (number * 1103515245 + 12345) % 2**31
            content, name = contents[number % len(contents)], f"{number % 64 * 4:02x}{number % 5:030x}"
            if number % 3:
                store.put(content, links=[(MINE, name), (OTHER, name)])
            else:
                store.unlink_ref(MINE, name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    books = []
    try:
        for _ in range(20):
            store.ledger.close(MINE)
            books.append(store.open_book(MINE))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert books[-1].used == taken(store, MINE) > 0


def test_what_changes_in_the_folder_that_is_being_read_is_put_right(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is made between the look at its folder and the end of it, one that goes, one that is replaced."""
    made, gone, replaced = ("50" + f"{n:030x}" for n in range(3))
    store.put(b"goes" * 5000, links=[(MINE, gone)])
    store.put(b"replaced" * 5000, links=[(MINE, replaced)])
    look = folder.Folder.ref_folder

    def and_meanwhile(self, dataset, number):
        found = list(look(self, dataset, number))
        stats = {entry.name: entry.stat() for entry in found}  # scandir keeps what it has seen
        if number == 0x50:
            store.put(b"new" * 5000, links=[(MINE, made)])
            store.put(b"another" * 5000, links=[(MINE, replaced)])
            store.unlink_ref(MINE, gone)
        assert len(stats) == len(found)
        return iter(found)

    monkeypatch.setattr(folder.Folder, "ref_folder", and_meanwhile)
    book = store.open_book(MINE)
    assert book.used == taken(store, MINE) == charge(15_000) + charge(35_000)


def test_what_a_book_left_counts_only_where_it_was_written(store: Store, tmp_path: Path) -> None:
    store.put(b"x" * 50_000, links=[(MINE, REFS[0])])
    left = store.open_book(MINE).dump(store.directories.live)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "cache", copy)
    other = Store.open(config(copy))
    assert not other.ledger.open(MINE).load(left, other.directories.live)
    assert other.open_book(MINE).used == charge(50_000)
    for damaged in (b"", left[:-1], left[:100], left[:50] + b"?" + left[51:], os.urandom(100)):
        assert not Book().load(damaged, store.directories.live)
    assert Book().load(left, store.directories.live)


def test_a_book_takes_eight_bytes_a_ref(store: Store) -> None:
    links = [(MINE, version_ref(str(number), "v")) for number in range(5000)]
    for number, link in enumerate(links):
        store.put(b"%d" % (number // 2), links=[link])
    left = store.open_book(MINE).dump(store.directories.live)
    assert len(left) < 8 * len(links) + 2000
    assert store.open_book(MINE).used == 2500 * 4096
