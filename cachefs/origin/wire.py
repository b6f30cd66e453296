"""Plain HTTP reads with the standard library, for what obstore cannot ask.

Three cases need it: names that obstore refuses to address, servers that answer a range with status 200 (rclone),
and listings of the true names. Requests run in a bounded number of threads, each on a kept-alive connection.
"""

from __future__ import annotations

import asyncio
import http.client
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from cachefs.errors import CacheFSError
from cachefs.origin.failures import TRANSIENT_STATUSES, Place, error_code, status_error, untrusted
from cachefs.origin.patience import REQUEST_SECONDS, Patience, Transient

# Connections of one origin, and so threads: 32 saturate 10 Gb/s at 40 MB/s per connection, which is what S3 gives.
CONNECTIONS = 32

# How much of a body that is not wanted is read to keep the connection; more is cheaper to cut off.
_DRAIN_BYTES = 64 * 1024

# Most bytes taken from a socket at once; more than the kernel's receive buffer usually holds.
_PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Answer:
    """headers: names in lower case. size: of the whole object, -1 where the server does not say.

    body: what was asked for; None where it was larger than the limit.
    """

    status: int
    headers: Mapping[str, str]
    size: int
    body: bytes | None


class Wire:
    """HTTP to any host, as one user. verify: True, False, or the path of a CA file (as in requests and boto)."""

    def __init__(self, place: Place, patience: Patience, verify: bool | str = True) -> None:
        self._place = place
        self._patience = patience
        self._verify = verify
        self._context: ssl.SSLContext | None = None
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="cachefs-wire")
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._lock = threading.Lock()
        self._closed = False

    async def get(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        path: str,
        method: str = "GET",
        limit: int | None = None,
        span: tuple[int, int] | None = None,
    ) -> Answer:
        """One request without retries. span: byte range wanted. path: the object, for messages.

        Raises Transient for what may pass, else an error of cachefs.errors.
        """
        answer = await self.ask(url, headers, path=path, method=method, limit=limit, span=span)
        if answer.status in (200, 206):
            return answer
        raise self._error(answer, path)

    async def ask(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        path: str,
        method: str = "GET",
        limit: int | None = None,
        span: tuple[int, int] | None = None,
    ) -> Answer:
        """The same, but whatever the server answers is an answer, unless it may pass."""
        if span is not None:
            headers = {**headers, "Range": f"bytes={span[0]}-{span[1] - 1}"}
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._pool, self._exchange, method, url, headers, path, limit, span)
        if answer.status in TRANSIENT_STATUSES:
            raise Transient(self._error(answer, path))
        return answer

    def _error(self, answer: Answer, path: str) -> CacheFSError:
        code = error_code((answer.body or b"").decode("utf-8", "replace"))
        return status_error(answer.status, code, self._place, path)

    async def aclose(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True  # what is still in a thread closes its connection itself
            connections = [connection for idle in self._idle.values() for connection in idle]
            self._idle.clear()
        for connection in connections:
            connection.close()

    # --- in a thread ---

    def _exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        path: str,
        limit: int | None,
        span: tuple[int, int] | None,
    ) -> Answer:
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if parts.scheme == "http" and _proxy(parts):
            target = url  # a proxy without a tunnel wants the whole of it
        connection: http.client.HTTPConnection | None = None
        try:
            connection, fresh = self._connection(parts)
            try:
                connection.request(method, target, headers=dict(headers))
                response = connection.getresponse()
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                if fresh:
                    raise
                # The server closed a connection that was idle: not a failure, and not worth a pause.
                connection.close()
                connection = self._connect(parts)
                connection.request(method, target, headers=dict(headers))
                response = connection.getresponse()
            answer, reusable = _receive(response, method, limit, span)
            if reusable:
                self._give_back(parts, connection)
                connection = None
            return answer
        except TimeoutError as error:
            raise Transient(self._patience.too_slow(self._place.url(path))) from error
        except ssl.SSLCertVerificationError as error:
            raise untrusted(self._place, path) from error
        except (OSError, http.client.HTTPException) as error:
            raise Transient(self._patience.unreachable(self._place.where, type(error).__name__)) from error
        finally:
            if connection is not None:
                connection.close()

    def _connection(self, parts: SplitResult) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            idle = self._idle.get((parts.scheme, parts.netloc))
            if idle:
                return idle.pop(), False
        return self._connect(parts), True

    def _give_back(self, parts: SplitResult, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            idle = self._idle.setdefault((parts.scheme, parts.netloc), [])
            if len(idle) < CONNECTIONS and not self._closed:
                idle.append(connection)
                return
        connection.close()

    def _connect(self, parts: SplitResult) -> http.client.HTTPConnection:
        proxy = _proxy(parts)
        host, port = (proxy.hostname, proxy.port) if proxy else (parts.hostname, parts.port)
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(host or "", port, context=self._tls())
            if proxy:
                connection.set_tunnel(parts.hostname or "", parts.port or 443)
        else:
            connection = http.client.HTTPConnection(host or "", port)
        connection.timeout = self._patience.connect
        try:
            connection.connect()
        except TimeoutError as error:
            connection.close()
            raise ConnectionError("no connection in time") from error
        connection.sock.settimeout(self._patience.read)
        return connection

    def _tls(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                file = self._verify if isinstance(self._verify, str) else None
                self._context = ssl.create_default_context(cafile=file)
                if self._verify is False:
                    self._context.check_hostname = False
                    self._context.verify_mode = ssl.CERT_NONE
            return self._context


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name for this URL, as obstore finds it too."""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def _receive(
    response: http.client.HTTPResponse, method: str, limit: int | None, span: tuple[int, int] | None
) -> tuple[Answer, bool]:
    """The answer, and whether the connection can be used again."""
    headers = {name.lower(): value for name, value in response.getheaders()}
    length = int(headers["content-length"]) if headers.get("content-length", "").isdigit() else -1
    if response.status not in (200, 206):
        return Answer(response.status, headers, -1, response.read(_DRAIN_BYTES)), response.isclosed()
    partial = headers.get("content-range", "")
    size = _size_in(partial) if partial else length
    if method == "HEAD":
        response.read()
        return Answer(response.status, headers, size, b""), True
    if limit is not None and size > limit:
        return Answer(response.status, headers, size, None), False
    deadline = time.monotonic() + REQUEST_SECONDS
    if span is not None:
        start, stop = span
        at = _start_in(partial) if partial else 0  # a server that ignores Range sends everything
        if at <= start:
            _read(response, start - at, deadline, keep=False)
            body = _read(response, stop - start, deadline)
            if len(body) < stop - start and size >= stop:
                raise http.client.IncompleteRead(body, stop - start - len(body))
            return Answer(response.status, headers, size, body), response.isclosed()
        return Answer(response.status, headers, size, b""), False
    most = length if length >= 0 else None
    body = _read(response, most if most is not None or limit is None else limit + 1, deadline)
    if most is not None and len(body) != most:
        raise http.client.IncompleteRead(body, most - len(body))
    if limit is not None and len(body) > limit:
        return Answer(response.status, headers, size, None), False
    return Answer(response.status, headers, size if size >= 0 else len(body), body), response.isclosed()


def _read(response: http.client.HTTPResponse, count: int | None, deadline: float, *, keep: bool = True) -> bytes:
    """`count` bytes (None = to the end), fewer where the body ends. Never waits for a server that drips on and on."""
    parts: list[bytes] = []
    left = count
    while left is None or left > 0:
        part = response.read1(_PIECE_BYTES if left is None else min(_PIECE_BYTES, left))
        if not part:
            break
        if keep:
            parts.append(part)
        if left is not None:
            left -= len(part)
        if time.monotonic() > deadline:
            raise TimeoutError
    if count is not None and left == 0 and response.length == 0:
        response.close()  # everything was read: this marks the connection as free
    return b"".join(parts)


def _start_in(content_range: str) -> int:
    """ "bytes 5-9/100" -> 5."""
    first = content_range.removeprefix("bytes").strip().partition("-")[0]
    return int(first) if first.isdigit() else 0


def _size_in(content_range: str) -> int:
    """ "bytes 5-9/100" -> 100; -1 for "*"."""
    total = content_range.rpartition("/")[2]
    return int(total) if total.isdigit() else -1
