"""READ, as far as this process can answer it alone: from the blob on the local disk.

A node is looked up under its object's path and version in the store; the bytes are read into the reply buffer
behind room for the header, so a hit costs one open, one read and one write. A small file that fits one READ is
checked against its key on the way (2 us per 110 KB). What cannot be answered here is a `Miss`: what to ask the
fetcher for. Descriptors are closed only while the session's lock is held, because a number closed by one thread
and reused under another would be wrong bytes.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import NamedTuple, Protocol

from cachefs import memory
from cachefs.digest import BLOCK_SIZE, digest, version_ref
from cachefs.errors import IsADirectory, StaleObject
from cachefs_sidecar.fuse.refs import Refs
from cachefs_sidecar.fuse.reply import Reply
from cachefs_sidecar.fuse.tree import Tree
from cachefs_sidecar.fuse.wire import WireError

# 256 pages: the most the kernel asks for in one READ (its own limit, fs.fuse.max_pages_limit).
MAX_READ = 1024 * 1024

# Descriptors held for files that are read in several READs: more than the shards that all loaders of a node read
# at once, well below the 1,024 descriptors that a process may have by default.
MAX_WINDOWS = 256

# Bytes of descriptors that are memory (of blocks that did not fit into the cache): the readers of a node would add up
# to any amount. A reader whose block was let go fetches it once more.
IN_MEMORY_SHARE, IN_MEMORY_LEAST, IN_MEMORY_MOST = 64, 2 * BLOCK_SIZE, 64 * BLOCK_SIZE

# Of the files that are read whole and past our eyes, one in so many is read in sight and compared with its key, so that
# rot is found where nobody runs `cachefs verify`. It costs 3% of a cold read on the average.
LOOK_EVERY = 16

# The extended attribute in which the store writes a blob's key.
KEY_ATTRIBUTE = "user.cachefs.key"
KEY_DIGITS = 32  # what follows says whose blob it is


class Store(Protocol):
    """The part of cachefs.store.Reader that a mount asks."""

    def open(self, dataset: str, ref: str) -> tuple[int, os.stat_result] | None: ...


class Window(NamedTuple):
    """Bytes [start, stop) of an object are in `fd`, byte `o` at offset `o - base`.

    info: of the file, as it was when the bytes were found good. whole: it is a blob, else it is still written to.
    memory: bytes of memory that the descriptor keeps; 0 for a file.
    """

    start: int
    stop: int
    base: int
    fd: int
    info: os.stat_result
    whole: bool
    memory: int = 0

    @property
    def current(self) -> bool:
        """Whether it may be read as it is. False when something wrote to the file since (for an incomplete object
        that may be its next block: it is asked for again), and when an incomplete object got or lost a name: it
        became a blob, to be opened as one, or was dropped."""
        now = os.fstat(self.fd)
        if now.st_mtime_ns != self.info.st_mtime_ns:
            return False
        return self.whole or now.st_nlink == self.info.st_nlink


class Miss(NamedTuple):
    """Bytes [offset, stop) of an object that are not readable here. size: of the whole object.

    damaged: there is a blob, and its bytes are wrong or its disk fails.
    """

    node: int
    path: str
    version: str
    size: int
    offset: int
    stop: int
    damaged: bool


class _Held:
    """What is open of one node. used: since the last sweep."""

    __slots__ = ("size", "used", "windows")

    def __init__(self, size: int) -> None:
        self.size = size
        self.windows: list[Window] = []
        self.used = True


class Reading:
    """Every method is called with the session's lock held.

    reply: what `read` fills. through_pipe: whether the device that it is sent to can splice, as /dev/fuse can.
    refs: what the workers know together.
    """

    def __init__(
        self, tree: Tree, store: Store, dataset: str, *, through_pipe: bool = False, refs: Refs | None = None
    ) -> None:
        self._tree = tree
        self._store = store
        self._dataset = dataset
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._windows = 0
        self._memory = 0
        self._most_memory = memory.share(IN_MEMORY_SHARE, least=IN_MEMORY_LEAST, most=IN_MEMORY_MOST)
        self._refs = refs or Refs(0)
        self.reply = Reply(MAX_READ, through_pipe=through_pipe)
        self._wholes = 0

    def read(self, unique: int, node: int, offset: int, size: int) -> int | Miss:
        """Fill the reply to the request `unique`; its number of bytes, or what to ask the fetcher.

        Never fewer bytes than asked except at the end of the file: the kernel takes a short answer for the end.
        Raises StaleObject, IsADirectory, CatalogError, WireError.
        """
        if size > MAX_READ:
            raise WireError(f"READ of {size} bytes where at most {MAX_READ} were agreed")
        held = self._held.get(node)
        if held is not None:
            stop = min(offset + size, held.size)
            if stop <= offset:
                return self.reply.clear()
            for window in held.windows:
                if window.start <= offset and stop <= window.stop:
                    held.used = True
                    self._held.move_to_end(node)
                    # Looked at after the bytes were read: write(2) changes the time before the bytes.
                    if self.reply.fill(unique, window.fd, offset - window.base, stop - offset) and window.current:
                        return stop - offset
                    self._release(node)
                    break
        return self._open(unique, node, offset, size)

    def hold(self, node: int, size: int, window: Window) -> None:
        """Keep a descriptor (owned by this object from now on) for the READs that follow."""
        held = self._held.get(node)
        if held is None:
            held = self._held[node] = _Held(size)
        covered = [w for w in held.windows if window.start <= w.start and w.stop <= window.stop]
        for old in covered:
            held.windows.remove(old)
            self._close(old)
        held.windows.append(window)
        held.used = True
        self._windows += 1
        self._memory += window.memory
        self._held.move_to_end(node)
        while self._windows > MAX_WINDOWS:
            self._release_oldest(node)
        while self._memory > self._most_memory and self._windows > 1:
            self._release_oldest(node)

    def sweep(self) -> None:
        """Close what was not used since the last sweep: an evicted blob keeps its disk space while it is open."""
        for node in [node for node, held in self._held.items() if not held.used]:
            self._release(node)
        for held in self._held.values():
            held.used = False

    def is_cached(self, node: int) -> bool:
        """Whether all bytes of the node are in the store."""
        return self.key_of(node) is not None

    def key_of(self, node: int) -> str | None:
        """The content key of the node's blob, in hex; "" where the disk keeps no attributes; None = not cached."""
        path, row = self._tree.object(node)
        found = self._store.open(self._dataset, version_ref(path, row.version))
        if found is None:
            return None
        try:
            return _key(found[0])[:KEY_DIGITS]
        finally:
            os.close(found[0])

    def _open(self, unique: int, node: int, offset: int, size: int) -> int | Miss:
        ref, whole = self._refs.get(node) or self._find_out(node)
        stop = min(offset + size, whole)
        if stop <= offset:
            return self.reply.clear()
        found = self._store.open(self._dataset, ref)
        damaged = found is not None
        if found is not None:
            fd, info = found
            # The kernel keeps all pages of a file that it got whole: there is no next READ to hold it for.
            entire = offset == 0 and stop == whole
            held = False
            try:
                if (
                    info.st_size == whole
                    and self.reply.fill(unique, fd, offset, stop - offset, look=entire and self._looks())
                    and (self._intact(fd, whole) if entire and self.reply.visible else _unwritten(fd, info))
                ):
                    if not entire:
                        self.hold(node, whole, Window(0, whole, 0, fd, info, whole=True))
                        held = True
                    return stop - offset
            finally:
                if not held:
                    os.close(fd)
        path, row = self._tree.object(node)
        return Miss(node, path, row.version, row.size, offset, stop, damaged)

    def _find_out(self, node: int) -> tuple[str, int]:
        """(ref, size) of a node. Raises IsADirectory, StaleObject, CatalogError."""
        path, row = self._tree.object(node)
        if row.directory:
            raise IsADirectory(f"{path or '/'}: is a directory", path=path)
        ref = version_ref(path, row.version)
        self._refs.put(node, ref, row.size)
        return ref, row.size

    def _looks(self) -> bool:
        """Whether the next file that is read whole must come in sight: all are compared with their keys that do."""
        self._wholes += 1
        return self._wholes % LOOK_EVERY == 0

    def _intact(self, fd: int, size: int) -> bool:
        key = _key(fd)
        return not key or digest(self.reply.payload[:size]).hex() == key[:KEY_DIGITS]

    def _release(self, node: int) -> None:
        for window in self._held.pop(node).windows:
            self._close(window)

    def _release_oldest(self, newest: int) -> None:
        """The node that was used longest ago; of `newest` itself, when it is the only one, its first window."""
        oldest = next(iter(self._held))
        if oldest == newest:
            self._close(self._held[newest].windows.pop(0))
        else:
            self._release(oldest)

    def _close(self, window: Window) -> None:
        self._windows -= 1
        self._memory -= window.memory
        os.close(window.fd)

    def close(self) -> None:
        for node in list(self._held):
            self._release(node)


def _unwritten(fd: int, info: os.stat_result) -> bool:
    """Whether nothing was written to a file since it was looked at."""
    return os.fstat(fd).st_mtime_ns == info.st_mtime_ns


def _key(fd: int) -> str:
    try:
        return os.getxattr(fd, KEY_ATTRIBUTE).decode("ascii", "replace")
    except OSError:
        return ""


def stale(miss: Miss, size: int) -> StaleObject:
    """The error for an object whose bytes turn out to be of another size than its snapshot says."""
    return StaleObject(
        f"{miss.path}: has {size} bytes where the snapshot says {miss.size}; run `cachefs refresh` to take the new",
        path=miss.path,
    )
