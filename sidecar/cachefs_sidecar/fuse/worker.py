"""A worker process: one thread that reads requests, one event loop for reads that wait and for the keeper's words.

The keeper forks it. It opens its own catalogs (SQLite does not survive a fork), never touches the origin's
libraries, says that it is ready and reads nothing before it is told to begin. It ends when the mount is gone, or
when it is told to finish: then it reads nothing more and answers what it has. When it dies, the keeper forks another
on the same descriptor. When the keeper dies, it goes on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from cachefs import hits
from cachefs.config import CacheConfig
from cachefs.datasets import touch
from cachefs_sidecar.fuse import tracing
from cachefs_sidecar.fuse.invalidation import Change
from cachefs_sidecar.fuse.misses import Fetching, Misses
from cachefs_sidecar.fuse.negotiation import Agreement
from cachefs_sidecar.fuse.opens import Opens
from cachefs_sidecar.fuse.passthrough import Passthrough
from cachefs_sidecar.fuse.reading import Reading, Store
from cachefs_sidecar.fuse.refs import Refs
from cachefs_sidecar.fuse.session import Session
from cachefs_sidecar.fuse.tree import Names, Tree

log = logging.getLogger("cachefs.mount")

# Python lets a thread that computes keep the interpreter for 5 ms by default. The thread that answers hits must not
# wait that long for the loop: a hit takes 0.1 ms.
SWITCH_SECONDS = 0.0005

# Descriptors that nobody used for one to two of these are closed.
SWEEP_SECONDS = 5.0

# A dataset counts as used when its mount answers requests; this is told to the cache at most so often.
TOUCH_SECONDS = 60.0

# The keeper's packets: a list of catalog files at most.
CONTROL_PACKET = 64 * 1024


@dataclass(frozen=True)
class Rooms:
    """What the mount is built from, so that a test can give it other ones."""

    catalog: Callable[[Path], Names]
    changes: Callable[[Any, Any], Iterable[Change]]
    store: Callable[[tuple[Path, ...]], Store]
    connection: Callable[[CacheConfig], Fetching] = field(repr=False)


@dataclass(frozen=True)
class Serving:
    """What a worker serves. opens: the table of open files of a mount in passthrough, None = it is open-free.

    refs: what the workers know together.
    """

    cache: CacheConfig
    dataset: str
    catalogs: Sequence[Path]
    agreement: Agreement
    uid: int
    gid: int
    rooms: Rooms
    opens: Path | None
    refs: Refs


class Worker:
    """`control`: the keeper's end is the other end of this SOCK_SEQPACKET socket."""

    def __init__(self, serving: Serving, device: int, control: socket.socket) -> None:
        self._serving = serving
        self._control = control
        self._lock = threading.Lock()
        self._tree = Tree(serving.catalogs, serving.rooms.catalog, uid=serving.uid, gid=serving.gid)
        store = serving.rooms.store(serving.cache.dirs)
        self._reading = Reading(self._tree, store, serving.dataset, through_pipe=True, refs=serving.refs)
        self._loop = uvloop.new_event_loop()
        self._misses = Misses(
            self._loop,
            serving.rooms.connection(serving.cache),
            self._reading,
            self._lock,
            deadline=serving.cache.deadline,
            pass_on=lambda unique: self._tell({"op": "interrupt", "unique": unique}),
        )
        self._passthrough: Passthrough | None = None
        if serving.opens is not None:
            opens = Opens(serving.opens)
            self._passthrough = Passthrough(device, opens, self._tree, store, serving.dataset, serving.cache.dirs)
        self._session = Session(
            device,
            serving.agreement,
            self._tree,
            self._reading,
            self._misses,
            self._lock,
            passthrough=self._passthrough,
            trace=tracing.wanted(),
        )
        self._misses.replies = self._session
        self._answered = 0
        self._told = 0  # of what was found on the disk
        self._server = threading.get_ident()

    def run(self) -> None:
        """Serve until the mount is gone, or `finish`. Raises OSError when the descriptor breaks otherwise."""
        signal.signal(signal.SIGUSR1, lambda *_: self._session.finish())
        self._tell({"op": "ready"})
        if not self._control.recv(CONTROL_PACKET):
            return  # a successor's, which came to nothing
        # A daemon thread, because a broken descriptor must end the process even while a read waits.
        thread = threading.Thread(target=self._run_loop, name="misses", daemon=True)
        thread.start()
        try:
            self._session.serve()
            if self._session.finishing:
                asyncio.run_coroutine_threadsafe(self._misses.finished(), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(timeout=1.0)
            self._tell_found(patience=hits.LAST_SECONDS)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._control.setblocking(False)
        self._loop.add_reader(self._control.fileno(), self._heard)
        self._loop.call_later(SWEEP_SECONDS, self._sweep)
        self._loop.call_later(TOUCH_SECONDS, self._touch)
        self._loop.run_forever()

    def _sweep(self) -> None:
        with self._lock:
            self._reading.sweep()
            drop = self._reading.reply.settling.due()
        self._dropping = self._loop.run_in_executor(None, drop)  # the disk may make it wait
        self._tell_found()
        self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def _tell_found(self, patience: float = 0.0) -> None:
        with self._lock:
            found = self._session.counts["found"] + (self._passthrough.passed if self._passthrough is not None else 0)
        if found > self._told and hits.add(self._serving.cache.home, found - self._told, patience=patience):
            self._told = found

    def _touch(self) -> None:
        with self._lock:
            answered = self._session.counts.total()
            # Who reads in passthrough asks nothing while it reads.
            in_use = self._passthrough is not None and self._passthrough.open_files > 0
        if in_use or answered != self._answered:
            self._answered = answered
            touch(self._serving.cache.home, self._serving.dataset)
        self._loop.call_later(TOUCH_SECONDS, self._touch)

    # --- the keeper's words ---

    def _heard(self) -> None:
        try:
            packet = self._control.recv(CONTROL_PACKET)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            log.warning("the keeper is gone; serving on without it")
            self._loop.remove_reader(self._control.fileno())
            return
        message: dict[str, Any] = json.loads(packet)
        match message["op"]:
            case "catalogs":
                self._switch([Path(file) for file in message["files"]])
            case "interrupt":
                self._misses.interrupt_passed_on(message["unique"])
            case "finish":
                # The thread that serves may be waiting for a request: only a signal to itself ends that.
                signal.pthread_kill(self._server, signal.SIGUSR1)
            case "status":
                self._tell({"op": "status", "counts": self._counts(), "refused": self._refused()})

    def _switch(self, files: list[Path]) -> None:
        """Answer from other catalogs from the next request on; what is being answered ends before this returns.

        The keeper has opened the new catalog to see that it is whole. A worker that cannot open it ends, and the
        one after it begins with the new: it must not answer from the old one beside the others.
        """
        with self._lock:
            self._session.switch_before_next(files)
        self._tell({"op": "switched"})

    def _counts(self) -> dict[str, int]:
        with self._lock:  # counting goes on in the other thread
            return dict(self._session.counts + self._misses.counts) | {"waiting": self._misses.waiting}

    def _refused(self) -> str:
        """Why there is no passthrough any more; "" = nothing was refused."""
        with self._lock:
            return self._passthrough.refused if self._passthrough is not None else ""

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self._control.send(json.dumps(message).encode())
        except OSError as error:
            log.warning("the keeper does not listen: %s", error)


def run(serving: Serving, device: int, control: socket.socket) -> int:
    """The whole life of a worker; its exit status. Called in the forked child."""
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        Worker(serving, device, control).run()
    except Exception:  # the keeper reads the status; the log says why
        log.exception("worker %d ends", os.getpid())
        return 1
    return 0


def real_rooms(connection: Callable[[CacheConfig], Fetching]) -> Rooms:
    """The catalog and store of this project."""
    from cachefs.catalog import Catalog, changes
    from cachefs.store import Reader

    return Rooms(Catalog.open, changes, Reader, connection)
