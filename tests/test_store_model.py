"""Store and Reader against a model of two dictionaries, through whatever order of calls hypothesis thinks of."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from cachefs import digest
from cachefs.config import CacheConfig
from cachefs.digest import block_range, content_key, version_ref
from cachefs.errors import DamagedBlob
from cachefs.store import Part, Reader, Store, blockmap, folder, layout, part, scrub, writer

DATASETS = ["d5" * 16, "07" * 16]
Link = tuple[str, str]

# Blocks of 4 KiB here, so that a large object is not large, and a step takes a millisecond.
BLOCK = 4096

# A few contents, so that rules meet: empty, small, exactly a block, several blocks.
LARGE = b"0123456789abcdef" * ((2 * BLOCK + 1024) // 16)
CONTENTS = [b"", b"a", b"b" * BLOCK, b"c" * (BLOCK + 1), LARGE]

some_content = st.sampled_from(CONTENTS)
some_key = some_content.map(content_key)
some_link = st.tuples(st.sampled_from(DATASETS), st.integers(0, 5).map(lambda n: version_ref(f"bucket/{n}", "v")))
some_links = st.lists(some_link, max_size=3, unique=True)


class StoreMachine(RuleBasedStateMachine):
    """blobs: key -> content as it lies on disk. refs: link -> key. lost: refs whose blob was dropped or replaced."""

    parts: Bundle[Part] = Bundle("parts")

    def __init__(self) -> None:
        super().__init__()
        self.patches = [
            mock.patch.object(m, "BLOCK_SIZE", BLOCK) for m in (digest, blockmap, folder, part, scrub, writer)
        ]
        for each in self.patches:
            each.start()
        self.root = Path(tempfile.mkdtemp())
        self.boots = 0
        self.boot_id = layout.BOOT_ID
        self.blobs: dict[bytes, bytes] = {}
        self.sealed: dict[bytes, bool] = {}
        self.refs: dict[Link, bytes] = {}
        self.lost: set[Link] = set()

    @initialize(directories=st.integers(1, 3))
    def begin(self, directories: int) -> None:
        self.config = CacheConfig.make([self.root / str(n) for n in range(directories)], min_free=0)
        self.store = Store.open(self.config)

    def teardown(self) -> None:
        for each in self.patches:
            each.stop()
        layout.BOOT_ID = self.boot_id
        shutil.rmtree(self.root)

    # --- what the model does ---

    def _name(self, link: Link, key: bytes) -> None:
        before = self.refs.get(link)
        self.lost.discard(link)
        self.refs[link] = key
        if before is not None and before != key:
            self._drop_unheld(before)

    def _drop_unheld(self, key: bytes) -> None:
        if key in self.blobs and key not in self.refs.values():
            del self.blobs[key], self.sealed[key]

    def _lose(self, key: bytes) -> None:
        """The blob goes; its refs stay, and name nothing."""
        self.blobs.pop(key, None)
        self.sealed.pop(key, None)
        gone = {link for link, named in self.refs.items() if named == key}
        self.lost |= gone
        for link in gone:
            del self.refs[link]

    def _put(self, data: bytes, wanted: list[Link]) -> None:
        key = content_key(data)
        if key in self.blobs and self.blobs[key] != data:
            self._lose(key)
        self.blobs[key] = data
        self.sealed[key] = True
        for each in wanted:
            self._name(each, key)

    # --- rules ---

    @rule(data=some_content, wanted=some_links)
    def put(self, data: bytes, wanted: list[Link]) -> None:
        assert self.store.put(data, links=wanted) == content_key(data)
        self._put(data, wanted)

    @rule(key=some_key, wanted=some_links)
    def link(self, key: bytes, wanted: list[Link]) -> None:
        assert self.store.link(key, wanted) == (key in self.blobs)
        if key in self.blobs:
            for each in wanted:
                self._name(each, key)

    @rule(link=some_link)
    def unlink_ref(self, link: Link) -> None:
        freed = self.store.unlink_ref(*link)
        key = self.refs.pop(link, None)
        if key is not None:
            held = key in self.refs.values()
            assert held or freed > 0 or len(self.blobs[key]) < 4096  # which may lie in the inode
            assert not held or freed == 0
            self._drop_unheld(key)
        self.lost.discard(link)

    @rule(key=some_key)
    def drop(self, key: bytes) -> None:
        freed = self.store.drop(key)
        # The .blocks file goes in any case, the content not while refs hold it.
        assert freed <= BLOCK or key not in self.refs.values()
        self._lose(key)

    @rule(key=some_key)
    def check(self, key: bytes) -> None:
        intact = key in self.blobs and content_key(self.blobs[key]) == key
        assert self.store.check(key) == intact
        if key in self.blobs:
            self.sealed[key] = intact

    @rule(key=some_key, silently=st.booleans(), at=st.integers(0))
    def corrupt(self, key: bytes, silently: bool, at: int) -> None:
        """One bit, by a write; or with the mtime kept, as a disk does it, found by `check` alone."""
        if not self.blobs.get(key):
            return
        path = self.store.path(key)
        data = bytearray(self.blobs[key])
        data[at % len(data)] ^= 1
        mtime = path.stat().st_mtime_ns
        os.chmod(path, 0o644)
        with open(path, "r+b") as file:
            file.write(data)
        if silently:
            os.utime(path, ns=(0, mtime))
            if not self.store.check(key) and content_key(bytes(data)) == key:
                raise AssertionError("damage undone must pass")
            self.sealed[key] = content_key(bytes(data)) == key
        else:
            self.sealed[key] = False
        self.blobs[key] = bytes(data)

    @rule()
    def sweep(self) -> None:
        self.store.sweep()
        for key in set(self.blobs) - set(self.refs.values()):
            self._drop_unheld(key)
        self.lost.clear()

    @rule(reboot=st.booleans())
    def reopen(self, reboot: bool) -> None:
        if reboot:
            self.boots += 1
            boot = self.root / "boot_id"
            boot.write_text(str(self.boots))
            layout.BOOT_ID = str(boot)
            self.sealed = dict.fromkeys(self.sealed, False)
        self.store = Store.open(self.config)

    @rule(target=parts)
    def begin_part(self) -> Part:
        return self.store.part(version_ref("large", "v"), len(LARGE))

    @rule(part=parts, block=st.integers(0, 2))
    def write_block(self, part: Part, block: int) -> None:
        if not part.closed and self.store.part(part.ref, part.size) is part:
            start, stop = block_range(block, part.size)
            part.write(block, LARGE[start:stop])
            assert part.checked(block)

    @rule(target=parts, part=consumes(parts), wanted=some_links)
    def finish_part(self, part: Part, wanted: list[Link]):
        if part.closed or self.store.part(part.ref, part.size) is not part:
            return multiple()
        if not part.complete:
            try:
                part.finish(wanted)
            except DamagedBlob:
                return part
            raise AssertionError("an incomplete object was finished")
        assert part.finish(wanted) == content_key(LARGE)
        self._put(LARGE, wanted)
        return multiple()

    # --- what always holds ---

    @invariant()
    def readers_see_the_model(self) -> None:
        if not hasattr(self, "store"):
            return
        reader = Reader(self.config.dirs)
        for each in [(d, version_ref(f"bucket/{n}", "v")) for d in DATASETS for n in range(6)]:
            key = self.refs.get(each)
            found = reader.open(*each)
            path = reader.file(*each)
            if key is None or not self.sealed[key]:
                assert found is None
                assert path is None
            else:
                assert found is not None
                assert path is not None
                with open(found[0], "rb") as file:
                    assert file.read() == self.blobs[key]
            assert self.store.key_of(*each) == key

    @invariant()
    def the_store_knows_what_it_has(self) -> None:
        if not hasattr(self, "store"):
            return
        assert sorted(self.store.keys()) == sorted(self.blobs)
        assert self.store.usage().blobs == len(self.blobs)
        assert all(self.store.has(content_key(c)) == (content_key(c) in self.blobs) for c in CONTENTS)
        for dataset in DATASETS:
            named = {ref for d, ref in [*self.refs, *self.lost] if d == dataset}
            assert set(self.store.refs(dataset)) == named
            assert (dataset in set(self.store.datasets())) == bool(named)
        assert [name for d in self.config.dirs for name in os.listdir(d / "tmp")] == []


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,  # a disk may take its time
    suppress_health_check=[HealthCheck.too_slow],
)
