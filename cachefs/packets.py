"""Packets between a reader and its fetcher: one message each, with the descriptors that belong to it."""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from pathlib import Path

from cachefs.errors import FetcherError
from cachefs.messages import MAX_PACKET

SOCKET_NAME = "fetcher.sock"

# asm-generic/socket.h, Linux 6.5 and newer; Python has no name for it yet.
_SO_PEERPIDFD = 77


def dial(run: Path, timeout: float | None) -> socket.socket:
    """Connect to the fetcher's socket in the directory `run`. Raises OSError when nobody listens there.

    The address goes through a descriptor of the directory, because a socket address holds 107 bytes and a cache
    directory may be deeper than that.
    """
    directory = os.open(run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.settimeout(timeout)
            sock.connect(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
        except BaseException:
            sock.close()
            raise
        return sock
    finally:
        os.close(directory)


def listen(run: Path) -> socket.socket:
    """Bind the fetcher's socket, mode 0600, in place of a stale one. The caller holds the fetcher's lock."""
    directory = os.open(run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        (run / SOCKET_NAME).unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        old = os.umask(0o177)
        try:
            sock.bind(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
        finally:
            os.umask(old)
        # As many readers as a node has cores may come at once, several hundred on the largest ones.
        sock.listen(512)
        return sock
    finally:
        os.close(directory)


def peer_uid(sock: socket.socket) -> int:
    """The effective uid of the process at the other end, as the kernel saw it at connect (unix(7), SO_PEERCRED)."""
    return _peer(sock)[1]


def peer_pid(sock: socket.socket) -> int:
    """The process at the other end; 0 when it is in a pid namespace that we cannot see."""
    return _peer(sock)[0]


def peer_handle(sock: socket.socket) -> int:
    """A pidfd of the process at the other end, which becomes readable when that ends; -1 where none can be had.

    The kernel knows it by the connection, so it may be in a pid namespace that we cannot see (another container), and
    its number cannot be somebody else's by now. Before Linux 6.5 the number is all there is. Raises ProcessLookupError
    when the process has ended.
    """
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise
    pid = peer_pid(sock)
    try:
        return os.pidfd_open(pid) if pid else -1
    except ProcessLookupError:
        raise
    except OSError:  # no pidfd_open before Linux 5.3, or it is forbidden here
        return -1


def _peer(sock: socket.socket) -> tuple[int, int, int]:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return pid, uid, gid


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and its descriptors; (b"", []) at the end. Raises BlockingIOError, TimeoutError, OSError."""
    ancillary_size = socket.CMSG_SPACE(4)
    data, ancillary, flags, _ = sock.recvmsg(MAX_PACKET, ancillary_size, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, raw in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(raw[: len(raw) - len(raw) % descriptors.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in descriptors:
            os.close(fd)
        raise FetcherError("a message of the fetcher was cut: is it another version of cachefs?")
    return data, list(descriptors)


def send(sock: socket.socket, data: bytes, descriptor: int = -1) -> None:
    """Send one packet. Raises BlockingIOError, TimeoutError, OSError (EMSGSIZE when it is too large)."""
    if descriptor < 0:
        sock.send(data)
    else:
        socket.send_fds(sock, [data], [descriptor])
