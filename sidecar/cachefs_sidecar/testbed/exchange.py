"""One client connection through the throttle: what is asked on it, and when its bytes may pass.

Requests are framed (that is how they are counted exactly); responses are a stream of bytes that belongs to the
request before it, because no S3 client pipelines. Bytes pass unchanged unless a fault says otherwise: signatures
cover the Host header, so not even that is rewritten.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    from cachefs_sidecar.testbed.proxy import Fault, Proxy

# Bytes of a response that may wait for their turn on a slow connection before the server is told to pause.
BACKLOG = 512 * 1024

# A request head larger than this is not HTTP. S3 allows 8 KiB of headers.
LARGEST_HEAD = 64 * 1024

# Loops wake timers at whole milliseconds; what is due within the next one is let go with the rest.
TICK = 0.001


class Request:
    """What the head of a request says: method, object path ("" for a bucket), and how long its body is."""

    __slots__ = ("chunked", "length", "method", "path", "ranged")

    def __init__(self, head: bytes) -> None:
        """Raises ValueError for what is not HTTP."""
        method, target, _ = head[: head.index(b"\r\n")].split(b" ", 2)
        bucket, slash, key = target.partition(b"?")[0][1:].partition(b"/")
        self.method = method.decode("ascii")
        self.path = unquote_to_bytes(bucket + slash + key).decode(errors="surrogateescape") if key else ""
        self.length = 0
        self.chunked = False
        self.ranged = b"\r\nrange:" in head.lower()
        if method in (b"GET", b"HEAD"):  # neither has a body in S3, and they are nearly all there is
            return
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                self.length = int(value)
            elif name.lower() == b"transfer-encoding":
                self.chunked = value.strip().lower() == b"chunked"

    @property
    def kind(self) -> str:
        """The method and "object" or "bucket"; "LIST" for a GET of a bucket."""
        if self.path:
            return f"{self.method} object"
        return "LIST" if self.method == "GET" else f"{self.method} bucket"


class Exchange(asyncio.Protocol):
    """The client's side of one connection; it owns the server's side."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.client: asyncio.Transport | None = None
        self.server: asyncio.Transport | None = None
        self.connecting: asyncio.Task[None] | None = None
        # The request that arrives:
        self.head = b""
        self.body_left = 0
        self.body_chunked = False
        self.held: list[bytes] = []  # bytes that wait for the latency to pass or for the server's connection
        self.latency: asyncio.TimerHandle | None = None
        self.fault: Fault | None = None
        # The response that leaves, piece by piece, each with the time at which it is let go:
        self.pieces: deque[tuple[float, bytes]] = deque()
        self.pieces_size = 0
        self.free_at = 0.0
        self.release: asyncio.TimerHandle | None = None
        self.client_is_full = False
        self.closing = False
        self.unmended = False  # the answer to a ranged request is still to come, and to be mended
        # The response as far as a fault that changes it has seen it:
        self.answer_head: bytes | None = None
        self.answer_body = 0

    # --- from the client to the server ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.client = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self.proxy.exchanges.add(self)
        self.connecting = self.proxy.loop.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            await self.proxy.loop.create_connection(lambda: _ServerSide(self), "127.0.0.1", self.proxy.upstream_port)
        except OSError:  # the server is stopped, and so it looks from the client
            self._close()

    def data_received(self, data: bytes) -> None:
        self.proxy.traffic.bytes_up += len(data)
        while data:
            if self.body_chunked:
                # The end of a chunked body is its last chunk, which clients send by itself at the end of a write.
                self.body_chunked = not data.endswith(b"0\r\n\r\n")
                self._forward(data)
                return
            if self.body_left:
                part, data = data[: self.body_left], data[self.body_left :]
                self.body_left -= len(part)
                self._forward(part)
                continue
            self.head += data
            end = self.head.find(b"\r\n\r\n") + 4
            if end < 4:
                if len(self.head) > LARGEST_HEAD:
                    self._close()
                return
            head, data, self.head = self.head[:end], self.head[end:], b""
            try:
                request = Request(head)
            except ValueError:
                self._close()
                return
            self._asked(request, head)

    def _asked(self, request: Request, head: bytes) -> None:
        self.body_left, self.body_chunked = request.length, request.chunked
        self.proxy.traffic.count(request.kind, request.path if request.method == "GET" else "")
        self.unmended = self.proxy.mend_ranges and request.ranged
        self.fault = self.proxy.fault_for(request.path)
        self.answer_head, self.answer_body = b"", 0
        delay = self.proxy.latency + (self.fault.amount if self.fault and self.fault.kind == "delay" else 0)
        self.held.append(head)
        self.latency = self.proxy.loop.call_later(delay, self._latency_passed) if delay else None
        self._flush()

    def let_pass(self) -> None:
        if self.latency is not None:
            self.latency.cancel()
            self._latency_passed()

    def _latency_passed(self) -> None:
        self.latency = None
        self._flush()

    def _forward(self, data: bytes) -> None:
        self.held.append(data)
        self._flush()

    def _flush(self) -> None:
        if self.server is None or self.latency is not None:
            return
        if self.fault is not None and self.fault.kind in ("hang", "status"):
            self.held.clear()
            if self.fault.kind == "status":
                self._refuse(int(self.fault.amount))
            return
        for data in self.held:
            self.server.write(data)
        self.held.clear()

    def _refuse(self, status: int) -> None:
        """Answer in the server's stead."""
        code = {403: "AccessDenied", 404: "NoSuchKey", 503: "SlowDown"}.get(status, "InternalError")
        body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code></Error>'.encode()
        head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        self._queue(head.encode() + b"Connection: close\r\n\r\n" + body)
        self._close_when_sent()

    # --- from the server to the client ---------------------------------------------------------------------

    def server_connected(self, server: asyncio.Transport) -> None:
        self.server = server
        if self.client is None or self.client.is_closing():
            server.abort()
            return
        self._flush()

    def answered(self, data: bytes) -> None:
        if self.closing:
            return
        if self.unmended:  # the head comes in one piece
            self.unmended = False
            if b"\r\ncontent-range:" in data[:LARGEST_HEAD].lower():
                data = data.replace(b"HTTP/1.1 200 OK", b"HTTP/1.1 206 Partial Content", 1)
        if self.fault is None or self.fault.kind not in ("flip", "cut"):
            self._queue(data)
            return
        start = self._skip_head(data)
        offset, self.answer_body = self.answer_body, self.answer_body + len(data) - start
        at = start + int(self.fault.amount) - offset  # where in `data` the fault strikes
        if self.fault.kind == "flip" and start <= at < len(data):
            data = data[:at] + bytes((data[at] ^ 0xFF,)) + data[at + 1 :]
        elif self.fault.kind == "cut" and at < len(data):
            self._queue(data[:at])
            self._close_when_sent()
            return
        self._queue(data)

    def _skip_head(self, data: bytes) -> int:
        """Where the body begins in `data`: its length while the head goes on. Interim answers (1xx) are heads too."""
        if self.answer_head is None:
            return 0
        before = len(self.answer_head)
        self.answer_head += data
        end = self.answer_head.find(b"\r\n\r\n") + 4
        while end >= 4 and self.answer_head.startswith(b"HTTP/1.1 1"):
            self.answer_head, before = self.answer_head[end:], before - end
            end = self.answer_head.find(b"\r\n\r\n") + 4
        if end < 4:
            return len(data)
        self.answer_head = None
        return end - before

    def server_lost(self) -> None:
        self._close_when_sent()

    def _queue(self, data: bytes) -> None:
        due = self._due(len(data))
        if due is None:
            self._deliver(data)
            return
        self.pieces.append((due, data))
        self.pieces_size += len(data)
        if self.release is None:
            self.release = self.proxy.loop.call_at(due, self._let_go)
        self._hold_or_resume_server()

    def _due(self, size: int) -> float | None:
        """When the last of `size` more bytes has passed the slow line; None when the line is not slow."""
        each, proxy = self.proxy.bandwidth_per_connection, self.proxy
        if each is None and proxy.total_bandwidth is None:
            return None
        now = due = proxy.loop.time()
        if each is not None:
            self.free_at = due = max(now, self.free_at) + size / each
        if proxy.total_bandwidth is not None:
            proxy.free_at = max(now, proxy.free_at) + size / proxy.total_bandwidth
            due = max(due, proxy.free_at)
        return due

    def _let_go(self) -> None:
        now = self.proxy.loop.time() + TICK
        while self.pieces and self.pieces[0][0] <= now:
            data = self.pieces.popleft()[1]
            self.pieces_size -= len(data)
            self._deliver(data)
        self.release = self.proxy.loop.call_at(self.pieces[0][0], self._let_go) if self.pieces else None
        self._hold_or_resume_server()
        if self.closing:
            self._close_when_sent()

    def _deliver(self, data: bytes) -> None:
        self.proxy.traffic.bytes_down += len(data)
        if self.client is not None:
            self.client.write(data)

    def pause_writing(self) -> None:
        self.client_is_full = True
        self._hold_or_resume_server()

    def resume_writing(self) -> None:
        self.client_is_full = False
        self._hold_or_resume_server()

    def _hold_or_resume_server(self) -> None:
        if self.server is None or self.server.is_closing():
            return
        if self.client_is_full or self.pieces_size > BACKLOG:
            self.server.pause_reading()
        else:
            self.server.resume_reading()

    # --- the end -----------------------------------------------------------------------------------------------

    def _close_when_sent(self) -> None:
        self.closing = True
        if not self.pieces:
            self._close()

    def _close(self) -> None:
        if self.client is not None:
            self.client.close()

    def abort(self) -> None:
        if self.client is not None:
            self.client.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.proxy.exchanges.discard(self)
        self.pieces.clear()
        for timer in (self.latency, self.release, self.connecting):
            if timer is not None:
                timer.cancel()
        if self.server is not None:
            self.server.abort()


class _ServerSide(asyncio.Protocol):
    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.exchange.server_connected(cast(asyncio.Transport, transport))

    def data_received(self, data: bytes) -> None:
        self.exchange.answered(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.exchange.server_lost()
