"""A fetcher inside the reader's own process, for places where no helper may be started, and for bytes that only
this process has (memory://, a file system instance).

It is the same Service, on a thread with a loop of its own. It takes the cache's lock and listens on the cache's
socket, so that other processes with the same setting, forked DataLoader workers above all, read through it and each
object is still fetched once. Where another process holds the lock, it serves without a store: what it fetches passes
through memory. It ends with the process.

After a fork the child has no such thread, so it starts anew; what it inherited of the parent's descriptors it closes,
because a lock or a listening socket lives as long as any copy of it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from cachefs.config import CacheConfig
from cachefs.errors import CacheUnusable, FetcherError, FetcherTimeout
from cachefs.fetcher.attachments import Attachments
from cachefs.fetcher.hosting import take_lock
from cachefs.fetcher.index import Index
from cachefs.fetcher.room import Room
from cachefs.fetcher.service import Service
from cachefs.fetcher.storeless import MemoryIndex, NoStore
from cachefs.origin import Origin, OriginSpec
from cachefs.origin.generic import FsspecOrigin
from cachefs.packets import SOCKET_NAME, dial, listen
from cachefs.store import Store

log = logging.getLogger("cachefs.fetcher")

# The protocol of an origin that is an instance of this process; its one option is the handle that `lend` gave it.
INSTANCE = "instance"

# How long the process waits at its end for the index to be written.
END_SECONDS = 5.0

_starting = threading.Lock()
_running: dict[tuple[Path, bool], _Embedded] = {}  # by home, and whether it has the store
_lent: dict[str, Any] = {}


def lend(fs: Any) -> OriginSpec:
    """The origin that `fs`, an instance of an fsspec file system, is within this process."""
    handle = next((handle for handle, known in _lent.items() if known is fs), None)
    if handle is None:
        handle = secrets.token_hex(8)
        _lent[handle] = fs
    return OriginSpec(INSTANCE, {"handle": handle}, {})


def connect_embedded(config: CacheConfig, deadline: float, *, local: bool) -> socket.socket:
    """A connected socket to a fetcher in this process, or in another one that serves this cache.

    local: only this process will do. deadline: on time.monotonic(). Raises CacheUnusable, FetcherError.
    """
    run = config.home / "run"
    with _starting:
        ours = _alive(config.home, stores=True)
        if ours is None and not local:
            with contextlib.suppress(OSError):
                return dial(run, max(0.01, deadline - time.monotonic()))
        ours = ours or _alive(config.home, stores=False)
        if ours is None:
            ours = _Embedded(config)
            ours.start(deadline)
            _running[config.home, ours.lock >= 0] = ours
        return ours.dial(deadline)


def _alive(home: Path, *, stores: bool) -> _Embedded | None:
    embedded = _running.get((home, stores))
    return embedded if embedded is not None and embedded.thread.is_alive() else None


class _Embedded:
    """One cache served by this process. lock: -1 when another process has it."""

    def __init__(self, config: CacheConfig) -> None:
        # It ends with the process, not when it is idle: it must outlast pauses of forked children, which could
        # not start one after this process has used obstore.
        self.config = replace(config, idle=float("inf"))
        self.run = config.home / "run"
        self.lock, self.listener = self._take()
        self.thread = threading.Thread(target=self._serve, name="cachefs-fetcher", daemon=True)
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._service: Service | None = None

    def _take(self) -> tuple[int, socket.socket]:
        try:
            self.run.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise CacheUnusable(
                f"{self.run}: cannot be created ({error.strerror}); choose another cache directory (cache_dir=, "
                "CACHEFS_DIR)"
            ) from error
        try:
            lock = take_lock(self.run)
        except FetcherError:
            log.warning(
                "%s: another process serves this cache, so what this one fetches is not stored", self.config.home
            )
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(b"")  # the kernel picks a name outside the file system; other users are refused by uid
            listener.listen()
            return -1, listener
        try:
            return lock, listen(self.run)
        except BaseException:
            os.close(lock)
            raise

    def start(self, deadline: float) -> None:
        self.thread.start()
        if not self._ready.wait(max(0.0, deadline - time.monotonic())):
            raise FetcherTimeout(f"{self.config.home}: the fetcher in this process did not start in time")
        if self._failure is not None:
            self.thread.join()
            raise self._failure
        atexit.register(self.stop)

    def dial(self, deadline: float) -> socket.socket:
        timeout = max(0.01, deadline - time.monotonic())
        if self.lock >= 0:
            return dial(self.run, timeout)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.settimeout(timeout)
            sock.connect(self.listener.getsockname())
        except BaseException:
            sock.close()
            raise
        return sock

    def _serve(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_new_loop) as runner:
                runner.run(self._run())
        except Exception as error:
            if self._ready.is_set():
                log.exception("the fetcher in this process ended")
            self._failure = error
        finally:
            self._ready.set()
            self.listener.close()
            if self.lock >= 0:
                (self.run / SOCKET_NAME).unlink(missing_ok=True)
                os.close(self.lock)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        room = self._room()
        room.attachments = _LocalAttachments(self.config.home)
        self._service = Service(room)
        self._ready.set()
        await self._service.run(self.listener)

    def _room(self) -> Room:
        if self.lock >= 0:
            return Room(self.config, Store.open(self.config), Index(self.config.home / "index"))
        room = Room(self.config, NoStore(self.config), MemoryIndex())
        room.capacity.limit = 0
        return room

    def stop(self) -> None:
        """End it and wait until it has written what it knows."""
        if self._loop is not None and self._service is not None and self.thread.is_alive():
            self._loop.call_soon_threadsafe(self._service.over.set)
            self.thread.join(END_SECONDS)

    def abandon(self) -> None:
        """In a forked child: let go of the parent's."""
        atexit.unregister(self.stop)
        with contextlib.suppress(OSError):
            os.close(self.listener.detach())
        if self.lock >= 0:
            with contextlib.suppress(OSError):
                os.close(self.lock)


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


def stop_embedded(home: Path) -> None:
    """End the fetchers of this process that serve the cache at `home`, as for a test that throws it away."""
    with _starting:
        for key in [key for key in _running if key[0] == home]:
            embedded = _running.pop(key)
            atexit.unregister(embedded.stop)
            embedded.stop()


def _after_fork() -> None:
    global _starting
    _starting = threading.Lock()  # a thread of the parent may have held it
    for embedded in _running.values():
        embedded.abandon()
    _running.clear()


os.register_at_fork(after_in_child=_after_fork)


# --- origins of this process -----------------------------------------------------------------------------------


class _LocalAttachments(Attachments):
    def _origin(self, spec: OriginSpec, redacted: bool) -> Origin:
        if spec.protocol != INSTANCE:
            return super()._origin(spec, redacted)
        handle = str(spec.options["handle"])
        if handle not in _lent:
            raise FetcherError("this file system instance belongs to another process; give target_protocol instead")
        if handle not in self._origins:
            self._origins[handle] = _LentOrigin(spec, _lent[handle])
        return self._origins[handle]


class _LentOrigin(FsspecOrigin):
    """Reads through an instance that somebody else made and goes on using. One call at a time."""

    def __init__(self, spec: OriginSpec, fs: Any) -> None:
        super().__init__(OriginSpec("memory", {}, {}))
        self.identity = spec.identity
        self._pool.shutdown(wait=False)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cachefs-instance")
        self._lent = fs

    def _open(self) -> Any:
        return self._lent
