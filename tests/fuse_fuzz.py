"""Requests thrown at a session, and what must be true of its answers. No mount and no threads: a run can be repeated.

`captured` are those of a real kernel (tests/fuse_capture.py makes the file anew); tests/fuse_guided.py searches for
others by what they reach in the code.
"""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from cachefs.catalog import Builder, Catalog
from cachefs.config import CacheConfig
from cachefs.digest import content_key, version_ref
from cachefs.messages import Entry
from cachefs.store import Reader, Store
from cachefs_sidecar.fuse import abi, wire
from cachefs_sidecar.fuse.abi import Opcode
from cachefs_sidecar.fuse.negotiation import WANTED, Agreement
from cachefs_sidecar.fuse.reading import MAX_READ, Miss, Reading
from cachefs_sidecar.fuse.session import REQUEST_BYTES, Session
from cachefs_sidecar.fuse.tree import Tree
from tests.fuse_kernel import directory

CAPTURED = Path(__file__).with_name("fuse_requests.txt")

_DATASET = "0" * 32
_TIME_NS = 1_600_000_000_000_000_005
_dice = random.Random(1)

# Whole in the cache, at the origin only, and at an origin that does not answer; the same in every run.
CACHED = {"a.jpg": _dice.randbytes(9000), "folder/b.jpg": _dice.randbytes(70_000), "empty": b""}
COLD = {"cold.jpg": _dice.randbytes(5000), "folder/caf\u00e9": _dice.randbytes(300_000)}
HANGING = {"hang": b"never"}
FILES = CACHED | COLD | HANGING


class Wrong(AssertionError):
    """A session did what it must not do."""


class Target:
    """A session over a small dataset. `ask` hands it packets and says what it answered; what waits is answered too."""

    def __init__(self, folder: Path, *, flags: int = int(WANTED)) -> None:
        config = CacheConfig.make([folder / "cache"], min_free=0)
        store = Store.open(config)
        self.catalog = folder / "catalog.sqlite"
        builder = Builder(self.catalog, identity="test", root="b")
        for name, content in FILES.items():
            builder.add(Entry(f"b/{name}", len(content), _TIME_NS, content_key(content).hex()))
        builder.seal().close()
        for name, content in CACHED.items():
            ref = version_ref(f"b/{name}", content_key(content).hex())
            store.put(content, links=[(_DATASET, ref)])
        self._content: dict[int, bytes] = {}
        with Catalog.open(self.catalog) as catalog:
            for path, row in catalog.files():
                self._content[row.id] = FILES[path.removeprefix("b/")]
        self._tree = Tree([self.catalog], Catalog.open, uid=11, gid=12)
        self._device, self._kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._device, self._kernel):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self._waiting: list[tuple[int, Miss]] = []
        self.session = Session(
            self._device.fileno(),
            Agreement(40, flags),
            self._tree,
            Reading(self._tree, Reader(config.dirs), _DATASET),
            self,
            threading.Lock(),
        )

    # What a session asks of `Misses`.

    def take(self, unique: int, pid: int, miss: Miss) -> None:
        self._waiting.append((unique, miss))

    def interrupt(self, unique: int) -> None:
        return

    def hangs(self, node: int) -> bool:
        return self._content.get(node) == HANGING["hang"]

    # What the kernel does.

    def ask(self, *packets: bytes) -> list[bytes]:
        """Hand over the packets, one after the other, and check what comes back. Raises Wrong."""
        answers: list[bytes] = []
        for packet in packets:
            packet = packet[:REQUEST_BYTES]
            if not packet:  # the end of a connection, not a request
                continue
            self.session.buffer[: len(packet)] = packet
            self.session.take(len(packet))
            for unique, miss in self._waiting:
                self._answer(unique, miss)
            self._waiting.clear()
            got = list(self._replies())
            self._check(packet, got)
            answers += got
        return answers

    def _answer(self, unique: int, miss: Miss) -> None:
        if self.hangs(miss.node):
            self.session.reply_error(unique, errno.EINTR)
        else:
            self.session.reply_bytes(unique, self._content[miss.node][miss.offset : miss.stop])

    def _replies(self) -> Iterator[bytes]:
        with contextlib.suppress(BlockingIOError):
            while True:
                yield self._kernel.recv(4 << 20, socket.MSG_DONTWAIT)

    def _check(self, packet: bytes, replies: list[bytes]) -> None:
        whole = len(packet) >= wire.IN_HEADER_BYTES
        said, opcode, unique, node = struct.unpack_from("=IIQQ", packet) if whole else (0, 0, 0, 0)
        if unique == 0 or opcode in abi.UNANSWERED:
            _require(not replies, "an answer that nobody waits for", packet)
            return
        _require(len(replies) == 1, f"{len(replies)} answers", packet)
        length, error, number = struct.unpack_from("=IiQ", replies[0])
        body = replies[0][16:]
        _require(length == len(replies[0]), "an answer that the kernel cannot take", packet)
        _require(number == unique, "another number than was asked", packet)
        _require(-512 < error <= 0 and (error == 0 or not body), "no errno of the kernel's", packet)
        if error == 0:
            _require(said == len(packet), "an answer to half a request", packet)
            self._check_body(opcode, node, packet, body)

    def _check_body(self, opcode: int, node: int, packet: bytes, body: bytes) -> None:
        rest = packet[wire.IN_HEADER_BYTES :]
        match opcode:
            case Opcode.READ:
                _, offset, size = struct.unpack_from("=QQI", rest)
                _require(size <= MAX_READ and body == self._content[node][offset : offset + size], "bytes", packet)
            case Opcode.LOOKUP:
                found = struct.unpack_from("=Q", body)[0]
                row = self._tree.lookup(node, rest.partition(b"\0")[0])
                _require(len(body) == 128 and found == (row.id if row else 0), "another entry", packet)
            case Opcode.GETATTR:
                _require(len(body) == 104 and struct.unpack_from("=Q", body, 16)[0] == node, "another node", packet)
            case Opcode.READDIR | Opcode.READDIRPLUS:
                plus = opcode == Opcode.READDIRPLUS
                _require(len(body) <= struct.unpack_from("=I", rest, 16)[0], "more than there is room for", packet)
                for inode, _, name, _ in directory(body, plus=plus):
                    row = self._tree.lookup(node, name)
                    known = name in (b".", b"..") or (row is not None and row.id == inode)
                    _require(known, "an entry of another directory", packet)

    def close(self) -> None:
        self._tree.close()
        self._device.close()
        self._kernel.close()


def _require(true: bool, what: str, packet: bytes) -> None:
    if not true:
        raise Wrong(f"{what}: {packet.hex()}")


# --- captured requests ------------------------------------------------------------------------------------------------


def captured() -> list[bytes]:
    """Requests of a real kernel, in their order."""
    return [
        bytes.fromhex(line.rpartition(" ")[2]) for line in CAPTURED.read_text().splitlines() if not line.startswith("#")
    ]
