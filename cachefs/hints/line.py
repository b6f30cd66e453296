"""A consumer's own connection to the fetcher. While it is open, the consumer lives; the fetcher forgets it with it."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TypeVar

import msgspec

from cachefs.client.launch import connect
from cachefs.client.session import FIRST_ID, LostFetcher, Session, expect
from cachefs.config import CacheConfig
from cachefs.errors import FetcherError, FetcherTimeout
from cachefs.messages import Attached, Reply, Request, Welcome, decode_reply, encode
from cachefs.packets import receive, send

R = TypeVar("R", bound=Reply)


class Line:
    """Raises LostFetcher when the fetcher is gone, FetcherTimeout after `patience` seconds, and what it answers."""

    def __init__(self, config: CacheConfig, session: Session, patience: float) -> None:
        self._patience = patience
        self._sock = connect(config, time.monotonic() + patience, local=session.local)
        self._next_id = FIRST_ID
        try:
            self.ask(session.hello(config), Welcome)
            self.attachment = self.ask(session.attach(), Attached).attachment
        except BaseException:
            self._sock.close()
            raise

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def ask(self, request: Request, expected: type[R], descriptor: int = -1) -> R:
        self._sock.settimeout(self._patience)
        try:
            send(self._sock, encode(request), descriptor)
            while True:
                data, _ = receive(self._sock)
                if not data:
                    raise LostFetcher("the fetcher closed the connection")
                reply = decode_reply(data)
                if reply.id == request.id:
                    return expect(reply, expected)
        except TimeoutError:
            raise FetcherTimeout(f"no answer from the fetcher in {self._patience:g} s") from None
        except (ConnectionError, BrokenPipeError) as error:
            raise LostFetcher(str(error)) from error
        except msgspec.MsgspecError as error:
            raise FetcherError(f"cannot understand the fetcher ({error}): another version of cachefs?") from error

    @property
    def alive(self) -> bool:
        """Whether the fetcher is still there; costs two system calls."""
        self._sock.settimeout(0)  # else Python waits in poll(2), whatever the flags say
        try:
            return bool(self._sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """For every process that has a copy of the socket."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
