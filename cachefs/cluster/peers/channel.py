"""A socket to a peer on an event loop, with or without TLS: messages both ways, and the bytes of frames.

A plain socket that does not block (or an `ssl.SSLSocket` around it), not a stream of asyncio: bytes of objects go from
the file to the socket (sendfile) and from the socket to their place (recv_into) with nothing in between, which is where
the time of a transfer is. Used by one task at a time. No wait here has an end of its own: whoever calls has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Generator
from typing import TypeVar

from cachefs.cluster.peers.wire import LENGTH
from cachefs.errors import PeerWrong

T = TypeVar("T")

# What is taken from a socket in one turn of the loop: a millisecond's worth, so that others have their turn.
TURN_BYTES = 4 * 1024 * 1024

# Of a message its length and all that has come with it, in one call.
AHEAD_BYTES = 4096

# While so much is sure to come, who receives is woken for no less: a packet at a time costs both sides a wake-up each.
WAKE_BYTES = 256 * 1024

# Whoever fills it yields views to be filled, one after the other.
Filler = Generator[memoryview, None, None]


class Channel:
    """Owns its socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # not TCP: a pair of sockets
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self._ahead = bytearray()  # came with what was waited for

    def close(self) -> None:
        if self.sock.fileno() >= 0:
            self._loop.remove_reader(self.sock.fileno())
            self._loop.remove_writer(self.sock.fileno())
        self.sock.close()

    async def start_tls(self, context: ssl.SSLContext, server_name: str | None) -> ssl.SSLSocket:
        """Shake hands. server_name: of the node that we called; None = it is we who were called."""
        secured = context.wrap_socket(
            self.sock, server_side=server_name is None, server_hostname=server_name, do_handshake_on_connect=False
        )
        self.sock = secured
        while True:
            try:
                secured.do_handshake()
            except ssl.SSLWantReadError:
                await self.readable()
            except ssl.SSLWantWriteError:
                await self.writable()
            else:
                return secured

    # --- messages ---

    async def send_message(self, body: bytes, tag: bytes = b"") -> None:
        await self.send(LENGTH.pack(len(body)) + body + tag)

    async def receive_message(
        self, most: int, tag_bytes: int = 0, *, begun: Callable[[], None] | None = None
    ) -> tuple[bytes, bytes]:
        """(body, tag) of the next message. begun: called when it has begun to come.

        Raises PeerWrong when it is longer than `most`, ConnectionError at the end of the connection.
        """
        (length,) = LENGTH.unpack(await self.receive(LENGTH.size))
        if begun is not None:
            begun()
        if length > most:
            raise PeerWrong(f"a message of {length} bytes, where {most} are the most")
        data = await self.receive(length + tag_bytes)
        return data[:length], data[length:]

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await self.writable()
            except ssl.SSLWantReadError:
                await self.readable()

    async def receive(self, count: int) -> bytes:
        """Exactly `count` bytes of messages. Raises ConnectionError at the end of the connection."""
        while (missing := count - len(self._ahead)) > 0:
            try:
                data = self.sock.recv(max(missing, AHEAD_BYTES))
            except (BlockingIOError, ssl.SSLWantReadError):
                await self.readable()
            except ssl.SSLWantWriteError:
                await self.writable()
            else:
                _some(len(data))
                self._ahead += data
        taken = bytes(self._ahead[:count])
        del self._ahead[:count]
        return taken

    def hung_up(self) -> bool:
        """Whether the other side is gone. Nothing is taken from the socket: below TLS, whose own look would."""
        try:
            return not socket.socket.recv(self.sock, 1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    # --- bytes of frames ---

    async def fill(self, filler: Filler, stall: Callable[[], float]) -> None:
        """Fill what `filler` yields until it ends. Raises what it raises, TimeoutError after `stall()` seconds without
        a byte, PeerWrong when there was more than the last message before.

        The socket is looked at by one callback for all of it: a future per wait costs more than a small object.
        """
        if self._ahead:
            raise PeerWrong("it said more than it was asked")
        filling = _Filling(self, filler)
        fd = self.sock.fileno()
        filling.take()
        if not filling.done.done():
            self._loop.add_reader(fd, filling.take)
        try:
            while not filling.done.done():
                left = filling.last + stall() - self._loop.time()
                if left <= 0:
                    raise TimeoutError
                # Looked at every second, because how long it may take depends on what has come by then.
                await asyncio.wait((filling.done,), timeout=min(left, 1.0))
            filling.done.result()
        finally:
            self._loop.remove_reader(fd)
            filling.end()

    # --- waiting ---

    async def readable(self) -> None:
        await self._wait(self._loop.add_reader, self._loop.remove_reader)

    async def writable(self) -> None:
        await self._wait(self._loop.add_writer, self._loop.remove_writer)

    async def _wait(self, add: Callable[..., object], remove: Callable[[int], object]) -> None:
        turn = self._loop.create_future()
        fd = self.sock.fileno()
        add(fd, _wake, turn)
        try:
            await turn
        finally:
            remove(fd)


class _Filling:
    """What `Channel.fill` has under way. last: when there was a byte. (An object, not a closure: that would refer to
    itself, and hold all that was filled until the collector comes.)
    """

    def __init__(self, channel: Channel, filler: Filler) -> None:
        self._sock = channel.sock
        self._loop = asyncio.get_running_loop()
        self._filler = filler
        self._view = next(filler, None)
        self._least = 1
        self.done = self._loop.create_future()
        self.last = self._loop.time()

    def take(self) -> None:
        """Take what the socket has, up to a turn's worth."""
        if self.done.done():
            return
        sock, view, budget = self._sock, self._view, TURN_BYTES
        try:
            while view is not None and budget > 0:
                got = _some(sock.recv_into(view))
                budget -= got
                view = view[got:]
                while view is not None and not view:
                    view = next(self._filler, None)
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            self.done.set_exception(error)
            return
        self._view = view
        self.last = self._loop.time()
        if view is None:
            self.done.set_result(None)
            return
        self._wake_at(min(len(view), WAKE_BYTES))
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            self._loop.call_soon(self.take)  # what TLS has read already makes no socket readable

    def _wake_at(self, least: int) -> None:
        """Wait for no fewer bytes than that, of those that the peer has announced."""
        if least < WAKE_BYTES:
            least = 1  # a change costs a call
        if least != self._least and not isinstance(self._sock, ssl.SSLSocket):  # TLS has taken some of them already
            self._least = least
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_at(1)
        if not self.done.done():
            self.done.cancel()
        elif not self.done.cancelled():
            self.done.exception()  # retrieved, whatever else is raised


def _wake(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


def _some(got: int) -> int:
    if not got:
        raise ConnectionResetError("the connection was closed")
    return got
