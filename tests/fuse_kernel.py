"""The kernel's side of the FUSE protocol for tests: requests and replies over a socket instead of /dev/fuse."""

from __future__ import annotations

import itertools
import socket
import struct
from typing import NamedTuple


class Reply(NamedTuple):
    error: int
    unique: int
    body: bytes


class Kernel:
    """`device` is what a session gets as its descriptor."""

    def __init__(self) -> None:
        self.device, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.device, self._ours):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self._ours.settimeout(60)
        self._uniques = itertools.count(2, 2)

    def send(self, opcode: int, node: int = 1, body: bytes = b"", *, pid: int = 0, unique: int = 0) -> int:
        unique = unique or next(self._uniques)
        self._ours.send(struct.pack("=IIQQIIIHH", 40 + len(body), opcode, unique, node, 0, 0, pid, 0, 0) + body)
        return unique

    def raw(self, packet: bytes) -> None:
        self._ours.send(packet)

    def reply(self) -> Reply:
        packet = self._ours.recv(4 << 20)
        length, error, unique = struct.unpack_from("=IiQ", packet)
        assert length == len(packet)
        return Reply(error, unique, packet[16:])

    def ask(self, opcode: int, node: int = 1, body: bytes = b"", *, pid: int = 0) -> Reply:
        unique = self.send(opcode, node, body, pid=pid)
        answer = self.reply()
        assert answer.unique == unique
        return answer

    def nothing_more(self) -> bool:
        """Whether no reply lies there."""
        self._ours.setblocking(False)
        try:
            self._ours.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self._ours.settimeout(60)
        return False

    def hang_up(self) -> None:
        self._ours.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._ours.close()
        self.device.close()


def read_body(offset: int, size: int) -> bytes:
    return struct.pack("=QQIIQII", 0, offset, size, 0, 0, 0, 0)


def directory(body: bytes, *, plus: bool) -> list[tuple[int, int, bytes, int]]:
    """(inode, cookie, name, type) of each record; of READDIRPLUS the node must be that of its entry."""
    entries = []
    at = 0
    while at < len(body):
        if plus:
            (node,) = struct.unpack_from("=Q", body, at)
            at += 128
        inode, cookie, length, kind = struct.unpack_from("=QQII", body, at)
        name = body[at + 24 : at + 24 + length]
        assert not plus or node == (0 if name in (b".", b"..") else inode)
        at += 24 + length + -length % 8
        entries.append((inode, cookie, name, kind))
    assert at == len(body)
    return entries
