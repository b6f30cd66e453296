"""What datasets with a quota take on the disk: each charged once for each content that its refs name.

A dataset has several refs to one blob (a mount looks by version, a file system by snapshot), and blobs are shared
between datasets, so neither blobs nor refs can be summed up. A `Book` therefore knows the inode behind each ref of its
dataset: 8 bytes a ref, in sorted arrays, where equal inodes stand side by side. The first ref to an inode charges its
bytes and the last to go gives them back. Incomplete objects are charged to the dataset that began them, by what blocks
they have. Charged is content in whole blocks of the file system; maps, digests and directories are the cache's own.

Only datasets that a quota bounds have a book. For the others a change of a ref costs one look into a dictionary.

Every change of a ref of a dataset with a book is made under the lock of the book, and that is what makes a count of a
dataset in use exact: `count` goes through the folders of refs in order, and what changes meanwhile in a folder that it
has not come to will be found there, in one that it has left is charged at once, and in the one that it is reading is
noted and put right at its end.
"""

from __future__ import annotations

import contextlib
import os
import threading
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cachefs.digest import KEY_BYTES, digest
from cachefs.store.blockmap import held_blocks
from cachefs.store.folder import Folder, remove
from cachefs.store.layout import NO_SEAL, Places

# Files take whole blocks of the file system; 4 KiB on every one in use for caches.
ALLOCATION = 4096

# Refs lie in 256 folders (layout.py), and a book has as many arrays: an insertion moves 40 KB in a dataset of a
# million refs, which takes a microsecond or two.
FOLDERS = 256

_INODE_BITS = 64
_INODE_MASK = (1 << _INODE_BITS) - 1


def charge(size: int) -> int:
    """Bytes that content of `size` bytes is charged."""
    return -(-size // ALLOCATION) * ALLOCATION


class _Left(msgspec.Struct, array_like=True):
    """What a book leaves for the next process. disks: where those inodes are."""

    disks: list[tuple[str, int]]
    used: int
    inodes: list[bytes]
    parts: dict[int, int]


class Book:
    """One dataset's account. `used` may be read at any time; whatever else is done is done under the lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.used = 0
        self.counted = False
        self._inodes = tuple(array("Q") for _ in range(FOLDERS))
        self._parts: dict[int, int] = {}
        self._parts_read = False
        self._at = 0  # the folder of refs that `count` has come to; those before are in the book
        self._changed: dict[tuple[str, str], os.stat_result | None] = {}  # in that folder, since it came there

    def holds(self, folder: Folder, inode: int) -> bool:
        """Whether another ref to that inode costs nothing."""
        number = _number(folder, inode)
        with self.lock:
            inodes, at = self._find(number)
            return at < len(inodes) and inodes[at] == number

    # --- under the lock ---

    def change(self, folder: Folder, ref: str, before: os.stat_result | None, after: os.stat_result | None) -> None:
        """A ref named `before` and names `after`; None: there was, or is, no such ref."""
        number = int(ref[:2], 16)
        if number > self._at:
            return
        if number == self._at:
            self._changed[folder.id, ref] = after
            return
        if before is not None and after is not None and before.st_ino == after.st_ino:
            return
        if before is not None:
            self._take(folder, before)
        if after is not None:
            self._add(folder, after)

    def set_part(self, folder: Folder, inode: int, held: int) -> None:
        """An incomplete object has `held` bytes."""
        number = _number(folder, inode)
        self.used += held - self._parts.get(number, 0)
        self._parts[number] = held

    def forget_part(self, folder: Folder, inode: int) -> None:
        """It is gone, or became a blob."""
        number = _number(folder, inode)
        self.used -= self._parts.pop(number, 0)
        if not self._parts_read:
            self._parts[number] = 0  # the count may have read its map just before

    def _add(self, folder: Folder, info: os.stat_result) -> None:
        number = _number(folder, info.st_ino)
        inodes, at = self._find(number)
        if at == len(inodes) or inodes[at] != number:
            # An object that is complete keeps its inode: at no time it is charged twice, or not at all.
            self.forget_part(folder, info.st_ino)
            self.used += charge(info.st_size)
        inodes.insert(at, number)

    def _take(self, folder: Folder, info: os.stat_result) -> None:
        number = _number(folder, info.st_ino)
        inodes, at = self._find(number)
        if at == len(inodes) or inodes[at] != number:
            return
        del inodes[at]
        if at == len(inodes) or inodes[at] != number:
            self.used -= charge(info.st_size)

    def _find(self, number: int) -> tuple[array[int], int]:
        inodes = self._inodes[number % FOLDERS]
        return inodes, bisect_left(inodes, number)

    # --- the beginning and the end of a book ---

    def count(self, folders: Sequence[Folder], dataset: str) -> None:
        """Read the dataset's refs and incomplete objects from the disk. Takes 3 s per million refs; in use or not."""
        for folder in folders:
            for inode, held in _parts(folder, dataset):
                with self.lock:
                    if _number(folder, inode) not in self._parts:
                        self.set_part(folder, inode, held)
        with self.lock:
            self._parts = {number: held for number, held in self._parts.items() if held}
            self._parts_read = True
        for number in range(FOLDERS):
            with self.lock:
                self._changed = {}
            found: dict[tuple[str, str], tuple[Folder, os.stat_result | None]] = {}
            for folder in folders:
                for entry in folder.ref_folder(dataset, number):
                    with contextlib.suppress(FileNotFoundError):
                        found[folder.id, entry.name] = folder, entry.stat(follow_symlinks=False)
            by_id = {folder.id: folder for folder in folders}
            with self.lock:
                for (id, ref), info in self._changed.items():
                    if id in by_id:
                        found[id, ref] = by_id[id], info
                for folder, info in found.values():
                    if info is not None:
                        self._add(folder, info)
                self._at = number + 1
        with self.lock:
            self.counted = True
            self._changed = {}

    def dump(self, folders: Sequence[Folder]) -> bytes:
        """The whole book, to be left at an orderly end."""
        inodes = [each.tobytes() for each in self._inodes]
        body = msgspec.msgpack.encode(_Left(_disks(folders), self.used, inodes, self._parts))
        return digest(body) + body

    def load(self, data: bytes, folders: Sequence[Folder]) -> bool:
        """Take up what the last process left. False: it is damaged, or of other disks than these."""
        body = memoryview(data)[KEY_BYTES:]
        if digest(body) != data[:KEY_BYTES]:
            return False
        try:
            left = msgspec.msgpack.decode(body, type=_Left)
            if left.disks != _disks(folders) or len(left.inodes) != FOLDERS:
                return False
        except (msgspec.MsgspecError, OSError):
            return False
        for inodes, raw in zip(self._inodes, left.inodes, strict=True):
            inodes.frombytes(raw)
        self.used, self._parts = left.used, left.parts
        self._at, self._parts_read, self.counted = FOLDERS, True, True
        return True


class Ledger:
    """The books of one store."""

    def __init__(self) -> None:
        self._books: dict[str, Book] = {}

    def book(self, dataset: str) -> Book | None:
        return self._books.get(dataset)

    def open(self, dataset: str) -> Book:
        """The dataset's book; a new one is to be counted, or loaded before anything changes."""
        return self._books.setdefault(dataset, Book())

    def close(self, dataset: str) -> None:
        self._books.pop(dataset, None)

    # --- what is done to refs and incomplete objects: under the key's lock ---

    def attach(self, folder: Folder, name: str, dataset: str, ref: str) -> str | None:
        """As Folder.attach."""
        book = self._books.get(dataset)
        if book is None:
            return folder.attach(name, dataset, ref)
        path = folder.places.ref(dataset, ref)
        with book.lock:
            before = _stat(path)
            try:
                return folder.attach(name, dataset, ref)
            finally:
                book.change(folder, ref, before, _stat(path))

    def unlink(self, folder: Folder, dataset: str, ref: str) -> None:
        """Raises FileNotFoundError."""
        path = folder.places.ref(dataset, ref)
        book = self._books.get(dataset)
        if book is None:
            os.unlink(path)
            return
        with book.lock:
            before = os.stat(path)
            os.unlink(path)
            book.change(folder, ref, before, None)

    def set_part(self, owner: str, folder: Folder, inode: int, held: int) -> None:
        if book := self._books.get(owner):
            with book.lock:
                book.set_part(folder, inode, held)

    def remove_part(self, folder: Folder, ref: str, inode: int = 0) -> int:
        """Remove an incomplete object. inode: of one whose file has become a blob. Bytes freed."""
        path = folder.places.part(ref)
        info = _stat(path)
        # Killed between the two, there are bytes without a map or a map without bytes: Part believes neither.
        freed = remove(folder.places.map(ref)) + remove(path)
        inode = inode or (info.st_ino if info is not None else 0)
        for book in list(self._books.values()) if inode else ():
            with book.lock:
                book.forget_part(folder, inode)
        return freed


def count_of(dirs: Sequence[Path], dataset: str) -> int:
    """What a dataset is charged, for a process that only looks."""
    found = {}
    for at, root in enumerate(dirs):
        folder = Folder(Places(root), f"{at:032x}", NO_SEAL)
        for entry in folder.ref_entries(dataset):
            with contextlib.suppress(FileNotFoundError):
                found[at, entry.inode()] = charge(entry.stat(follow_symlinks=False).st_size)
        found |= {(at, inode): held for inode, held in _parts(folder, dataset)}
    return sum(found.values())


def _parts(folder: Folder, dataset: str) -> list[tuple[int, int]]:
    """(inode, bytes) of the incomplete objects that the dataset began."""
    found = []
    for entry in folder.part_entries():
        if not entry.name.endswith(".map"):
            with contextlib.suppress(FileNotFoundError):
                held = held_blocks(entry.path + ".map", dataset)
                if held:
                    found.append((entry.inode(), sum(map(charge, held))))
    return found


def _disks(folders: Sequence[Folder]) -> list[tuple[str, int]]:
    """A copy of a directory has the same id, and other inodes."""
    return [(folder.id, os.stat(folder.places.refs).st_ino) for folder in folders]


def _number(folder: Folder, inode: int) -> int:
    """A number for an inode of one of several disks. File systems do not use the uppermost bits."""
    return (inode ^ int(folder.id[:4], 16) << (_INODE_BITS - 16)) & _INODE_MASK


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
