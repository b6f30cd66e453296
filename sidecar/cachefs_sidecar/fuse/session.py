"""One descriptor of a FUSE connection: requests in, replies out.

The thread that calls `serve` blocks in read(2), because the kernel wakes exactly one blocked reader per request
and every poller. It answers names, attributes and cached bytes itself. A read that must wait for the fetcher is
handed over (`MissSink`), and whoever took it writes the reply later, in any order.

Open-free: OPEN and OPENDIR are answered with ENOSYS once, after which the kernel opens and closes by itself and
keeps pages and listings; a hot read never comes here. The other mode is in passthrough.py. Nothing in a mount changes
except by refresh, which tells the kernel what to forget, so everything else is remembered for good.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cachefs.errors import CacheFSError, errno_of
from cachefs_sidecar.fuse import abi, tracing, wire
from cachefs_sidecar.fuse.abi import Opcode
from cachefs_sidecar.fuse.listing import Listing
from cachefs_sidecar.fuse.negotiation import Agreement
from cachefs_sidecar.fuse.passthrough import Passthrough
from cachefs_sidecar.fuse.reading import Miss, Reading
from cachefs_sidecar.fuse.tree import Tree
from cachefs_sidecar.fuse.wire import Request
from cachefs_sidecar.fuse.xattrs import Attributes

log = logging.getLogger("cachefs.mount")

# Ten years, in seconds: longer than a kernel runs. Names and attributes change only by refresh, which says so.
FOREVER = 10 * 365 * 24 * 3600

# Room for one request. Mutations are refused and max_write is at its minimum, so requests are names and numbers;
# only FORGETs come in bulk (4,000 fit), when the kernel drops its inodes. At least 8 KiB, or read(2) fails.
REQUEST_BYTES = 64 * 1024

_MUTATIONS = (
    Opcode.SETATTR,
    Opcode.SYMLINK,
    Opcode.MKNOD,
    Opcode.MKDIR,
    Opcode.UNLINK,
    Opcode.RMDIR,
    Opcode.RENAME,
    Opcode.LINK,
    Opcode.WRITE,
    Opcode.SETXATTR,
    Opcode.REMOVEXATTR,
    Opcode.CREATE,
    Opcode.FALLOCATE,
    Opcode.RENAME2,
    Opcode.COPY_FILE_RANGE,
    Opcode.COPY_FILE_RANGE_64,
    Opcode.TMPFILE,
)

# As plain numbers, which compare ten times faster than an IntEnum.
_READ = int(Opcode.READ)
_IOCTL = int(Opcode.IOCTL)

_KNOWN = frozenset(map(int, Opcode))

# The kernel takes no larger error (those from 512 on are its own) and would leave the request unanswered.
_LAST_ERRNO = 511

# The body of a reply, a negative errno, or None: no reply now.
Answer = bytes | memoryview | int | None


class MissSink(Protocol):
    """Who answers what this process cannot."""

    def take(self, unique: int, pid: int, miss: Miss) -> None: ...
    def interrupt(self, unique: int) -> None: ...


class Session:
    """lock: held while a request is answered; whoever switches catalogs or closes descriptors takes it.

    passthrough: None = the mount is open-free.
    """

    def __init__(
        self,
        device: int,
        agreement: Agreement,
        tree: Tree,
        reading: Reading,
        misses: MissSink,
        lock: threading.Lock,
        *,
        passthrough: Passthrough | None = None,
        trace: bool = False,
    ) -> None:
        self._device = device
        self._agreement = agreement
        self._tree = tree
        self._reading = reading
        self._misses = misses
        self._lock = lock
        self._passthrough = passthrough
        self._trace = trace
        self._xattrs = Attributes(tree, reading)
        self._listing = Listing(tree, reading.reply.buffer, FOREVER)
        self.counts: Counter[str] = Counter(IOCTL=0)
        self._catalogs: Sequence[Path] | None = None
        self.finishing = False
        self._buffer = bytearray(REQUEST_BYTES)
        self._view = memoryview(self._buffer)
        self._handlers: dict[int, Callable[[Request], Answer]] = {
            Opcode.LOOKUP: self._lookup,
            # Node ids are the catalog's: there is nothing to forget.
            Opcode.FORGET: lambda _: None,
            Opcode.BATCH_FORGET: lambda _: None,
            Opcode.NOTIFY_REPLY: lambda _: None,
            Opcode.GETATTR: self._getattr,
            Opcode.READLINK: lambda _: -errno.EINVAL,
            Opcode.OPEN: self._open,
            Opcode.OPENDIR: self._opendir,
            Opcode.RELEASE: self._release,
            Opcode.RELEASEDIR: lambda _: b"",
            # Whole ones have been taken out before.
            Opcode.READ: lambda _: -errno.EINVAL,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.STATFS: self._statfs,
            Opcode.GETXATTR: lambda request: self._xattrs.get(request.node, request.body),
            Opcode.LISTXATTR: lambda request: self._xattrs.list(request.node, request.body),
            Opcode.INTERRUPT: self._interrupt,
            Opcode.DESTROY: lambda _: b"",
            **dict.fromkeys(_MUTATIONS, lambda _: -errno.EROFS),
        }
        # Everything else is answered ENOSYS: the kernel then does it by itself (ACCESS, since default_permissions
        # is set; FLUSH, FSYNC, LSEEK, STATX, locks) and for most of them never asks again.

    def serve(self) -> None:
        """Answer until the mount is gone, or `finish`. Raises OSError when the descriptor breaks otherwise."""
        buffers = [self._buffer]
        while not self.finishing:
            try:
                length = os.readv(self._device, buffers)
            except OSError as error:
                # ENOENT: the request was interrupted before it was delivered. EAGAIN: `finish` was called.
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                if error.errno in (errno.ENODEV, errno.ECONNRESET):
                    return  # unmounted, or the connection was aborted
                raise
            if length == 0:
                return
            self.take(length)

    @property
    def buffer(self) -> bytearray:
        """Where `take` finds a request."""
        return self._buffer

    def take(self, length: int) -> None:
        """Answer the request in the first `length` bytes of the buffer; behind it lies what is left of others.

        The two requests that matter for speed skip the general way; they are answered as it would.
        """
        said, opcode, unique = wire.first_look(self._buffer)
        if said != length or length < wire.IN_HEADER_BYTES or unique == 0:
            self.answer(self._view[:length])  # says what is wrong with it
        elif opcode == _READ and length >= wire.READ_BYTES:
            self._answer_read(unique)
        elif opcode == _IOCTL:
            self._answer_ioctl(unique)
        else:
            self.answer(self._view[:length])

    def finish(self) -> None:
        """Read no further request. Called in the thread that serves, by a signal handler: the signal ends the wait.

        A request that was read is answered: an exception out of the handler could come between the two.
        """
        self.finishing = True
        os.set_blocking(self._device, False)  # Python begins an interrupted read again, and this time it must not wait

    def _answer_ioctl(self, unique: int) -> None:
        """Python's open() asks every file whether it is a terminal, with an ioctl that the kernel always passes on.

        It is the only request of a hot read, so it gets the shortest way there is: no other thread is involved.
        """
        self.counts["IOCTL"] += 1
        self._write(wire.out_header(0, -errno.ENOTTY, unique))
        if self._trace:
            tracing.passed(self._request(), -errno.ENOTTY)

    def _answer_read(self, unique: int) -> None:
        node, pid, offset, size = wire.whole_read(self._buffer)
        with self._lock:
            if self._catalogs is not None:
                self._take_new_catalogs()
            self.counts["READ"] += 1
            answer: Answer
            try:
                answer = self._read(unique, pid, node, offset, size)
            except Exception as error:  # noqa: BLE001 - told apart there
                answer = _failed("READ", node, error)
                self._write(wire.out_header(0, answer, unique))
        if self._trace:
            tracing.passed(self._request(), answer)

    def _request(self) -> Request:
        """What is in the buffer, for the trace."""
        return wire.decode(self._view[: wire.first_look(self._buffer)[0]])

    def switch_before_next(self, files: Sequence[Path]) -> None:
        """Answer from other catalogs from the next request on. Called with the lock held, by any thread.

        The catalogs are opened by the thread that answers, because SQLite binds a connection to its thread.
        """
        self._catalogs = files

    def answer(self, packet: memoryview) -> None:
        """Answer one request. Raises only when a new catalog is broken (CatalogError)."""
        try:
            request = wire.decode(packet)
        except wire.WireError as error:
            log.error("a request cannot be read: %s", error)
            if error.unique:
                self._write(wire.out_header(0, -errno.EINVAL, error.unique))
            return
        with self._lock:
            if self._catalogs is not None:
                self._take_new_catalogs()
            self.counts[request.name if request.opcode in _KNOWN else "unknown"] += 1
            handler = self._handlers.get(request.opcode)
            try:
                answer = handler(request) if handler else -errno.ENOSYS
            except Exception as error:  # noqa: BLE001 - told apart there
                answer = _failed(request.name, request.node, error)
            if request.opcode in abi.UNANSWERED:
                answer = None
            # The reply is written under the lock: a refresh that gets the lock afterwards may rely on it that no
            # answer from the old catalog is still on its way to the kernel.
            if isinstance(answer, int):
                self._write(wire.out_header(0, answer, request.unique))
            elif answer is not None:
                taken = self._write(wire.out_header(len(answer), 0, request.unique), answer)
                if not taken and request.opcode == Opcode.OPEN and self._passthrough is not None:
                    self._passthrough.not_taken(request.unique)
        if self._trace:
            tracing.passed(request, answer)

    # Answers to READs that waited. Called from the thread that took the miss.

    def reply_bytes(self, unique: int, data: bytes | memoryview) -> None:
        self._write(wire.out_header(len(data), 0, unique), data)
        if self._trace:
            tracing.answered(unique, data)

    def reply_error(self, unique: int, number: int) -> None:
        """`number`: a positive errno."""
        answer = -number if 0 < number <= _LAST_ERRNO else -errno.EIO
        self._write(wire.out_header(0, answer, unique))
        if self._trace:
            tracing.answered(unique, answer)

    def _take_new_catalogs(self) -> None:
        assert self._catalogs is not None
        self._tree.switch(self._catalogs)
        self._catalogs = None

    def _write(self, *reply: bytes | memoryview) -> bool:
        """Whether the kernel took it. Never raises: a descriptor that is broken says so to the next read of it."""
        try:
            os.writev(self._device, reply)
        except OSError as error:
            _note(error)
            return False
        return True

    # --- names and attributes ---

    def _lookup(self, request: Request) -> Answer:
        name = wire.name_in(request.body)
        if len(name) > abi.NAME_MAX:
            return -errno.ENAMETOOLONG
        row = self._tree.lookup(request.node, name)
        if row is None:
            return wire.no_entry_out(FOREVER)
        return wire.entry_out(self._tree.attributes(row), FOREVER)

    def _getattr(self, request: Request) -> Answer:
        return wire.attr_out(self._tree.attributes(self._tree.get(request.node)), FOREVER)

    def _statfs(self, _: Request) -> Answer:
        summary = self._tree.summary
        return wire.statfs_out(blocks=-(-summary.bytes // abi.BLOCK), files=summary.files + summary.directories)

    def _open(self, request: Request) -> Answer:
        if self._passthrough is not None:
            return self._passthrough.open(request.unique, request.node)
        if self._agreement.open_free:
            return -errno.ENOSYS
        return wire.open_out(abi.Open.KEEP_CACHE)

    def _release(self, request: Request) -> Answer:
        if self._passthrough is not None:
            self._passthrough.release(wire.release_in(request.body))
        return b""

    def _opendir(self, _: Request) -> Answer:
        if self._agreement.opendir_free:
            return -errno.ENOSYS
        return wire.open_out(abi.Open.KEEP_CACHE | abi.Open.CACHE_DIR)

    def _readdir(self, request: Request) -> Answer:
        return self._listing.page(request.node, *wire.read_in(request.body), plus=False)

    def _readdirplus(self, request: Request) -> Answer:
        return self._listing.page(request.node, *wire.read_in(request.body), plus=True)

    # --- bytes ---

    def _read(self, unique: int, pid: int, node: int, offset: int, size: int) -> Answer:
        """The bytes that were answered, None when the read waits, or a negative errno that is still to be said."""
        found = self._reading.read(unique, node, offset, size)
        if isinstance(found, Miss):
            self.counts["damaged" if found.damaged else "misses"] += 1
            self._misses.take(unique, pid, found)
            return None
        self.counts["hits"] += 1
        if offset == 0:
            self.counts["found"] += 1
        self.counts["hit_bytes"] += found
        reply = self._reading.reply
        try:
            reply.send(self._device, unique)
        except OSError as error:
            _note(error)
        return reply.payload[:found]  # of one that went through a pipe this shows the length only

    def _interrupt(self, request: Request) -> Answer:
        self._misses.interrupt(wire.interrupt_in(request.body))
        return None


def _failed(name: str, node: int, error: Exception) -> int:
    """The negative errno to answer for what went wrong, which is logged."""
    if isinstance(error, wire.WireError):
        log.error("%s refused: %s", name, error)
        return -errno.EINVAL
    if isinstance(error, (CacheFSError, OSError)):
        log.error("%s node %d: %s", name, node, error)
        number = errno_of(error)
        return -number if 0 < number <= _LAST_ERRNO else -errno.EIO
    # A fault of ours in one request must not take the other requests with it.
    log.error("%s node %d failed", name, node, exc_info=error)
    return -errno.EIO


def _note(error: OSError) -> None:
    """Why the kernel does not take an answer, unless that is in order."""
    # ENOENT: the request was interrupted, or delivered again to another worker that was faster.
    # ENODEV, ENOTCONN, EPIPE: the mount is gone, and the next read says so.
    if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN, errno.EPIPE):
        # The kernel has ended the request with EIO by itself.
        log.error("the kernel does not take an answer (%s)", error.strerror)
