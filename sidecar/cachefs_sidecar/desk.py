"""The keeper's desk: what commands ask of a live mount over its Unix socket.

One JSON packet each way on a SOCK_SEQPACKET socket of mode 0600, from the same user or root only. A request is
answered when the workers have answered; the keeper's loop goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cachefs.catalog.hold import hold
from cachefs.errors import CacheFSError, MountError, to_wire
from cachefs.packets import peer_uid
from cachefs_sidecar import registry
from cachefs_sidecar.crew import Crew
from cachefs_sidecar.fuse import invalidation
from cachefs_sidecar.fuse.tree import GENERATIONS
from cachefs_sidecar.fuse.worker import Rooms
from cachefs_sidecar.launching import Installation
from cachefs_sidecar.questions import Answers

log = logging.getLogger("cachefs.mount")

# A worker that does not take a new catalog in this time is stuck (on a disk that hangs) and is replaced.
SWITCH_SECONDS = 10.0

# How long a status waits for a worker's counts.
STATUS_SECONDS = 2.0

# Requests are a path at most.
MAX_PACKET = 64 * 1024


# Called with the pid of the keeper that follows, or 0 and why none does.
Over = Callable[[int, str], None]


class Desk:
    """catalogs: what is served, newest first; a refresh changes it. counts: of the keepers before.

    refreshed: called with what is served from then on. hand_over: begins it, with the installation to run and what
    has been counted.
    """

    def __init__(
        self,
        path: Path,
        device: int,
        selector: selectors.BaseSelector,
        rooms: Rooms,
        catalogs: list[Path],
        counts: Mapping[str, int],
        refreshed: Callable[[Sequence[Path]], None],
        hand_over: Callable[[Installation, Mapping[str, int], Over], None],
    ) -> None:
        self._path = path
        self._device = device
        self._selector = selector
        self._rooms = rooms
        self.catalogs = catalogs
        self._holds = {file: hold(file) for file in catalogs}
        self._counts = counts
        self._refreshed = refreshed
        self._hand_over = hand_over
        # A refresh or a restart is under way: the next one waits for its end.
        self._changing = False
        self._waiting: deque[tuple[socket.socket, dict[str, Any]]] = deque()
        self._crew: Crew | None = None
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        old = os.umask(0o177)
        try:
            with registry.short_address(path) as address:
                self._listener.bind(address)
        finally:
            os.umask(old)
        self._listener.setblocking(False)  # the keeper waits nowhere but in its loop
        self._listener.listen(16)  # commands of one user

    def open(self, crew: Crew) -> None:
        """Begin to answer."""
        self._crew = crew
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def let_go(self) -> None:
        """In a forked process: the socket is the keeper's."""
        self._listener.close()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return  # it went away before it was let in
        if peer_uid(client) not in (os.geteuid(), 0):
            client.close()
            return
        self._selector.register(client, selectors.EVENT_READ, lambda: self._asked(client))

    def _asked(self, client: socket.socket) -> None:
        self._selector.unregister(client)
        try:
            packet = client.recv(MAX_PACKET, socket.MSG_DONTWAIT)
            if not packet:
                client.close()
                return
            request: dict[str, Any] = json.loads(packet)
            match request["op"]:
                case "status":
                    self._status(client)
                case "refresh" | "restart":
                    self._waiting.append((client, request))
                    self._change()
                case other:
                    raise MountError(f"unknown request {other!r}: is this command of another version of cachefs?")
        except (CacheFSError, OSError, ValueError, KeyError, TypeError) as error:
            _reply(client, {"error": to_wire(error)})

    def _change(self) -> None:
        """Begin with what has waited longest, unless something is under way."""
        while self._waiting and not self._changing:
            client, request = self._waiting.popleft()
            try:
                if request["op"] == "refresh":
                    self._refresh(client, Path(request["catalog"]))
                else:
                    self._restart(client, Installation(request["python"], request["path"]))
            except (CacheFSError, OSError, KeyError, TypeError) as error:
                _reply(client, {"error": to_wire(error)})

    def _changed(self) -> None:
        self._changing = False
        self._change()

    # --- status ---

    def _status(self, client: socket.socket) -> None:
        assert self._crew is not None
        self._crew.ask({"op": "status"}, "status", STATUS_SECONDS, lambda _, answers: self._report(client, answers))

    def _report(self, client: socket.socket, answers: Answers) -> None:
        assert self._crew is not None
        totals = self._totals(answers)
        workers = [
            {"pid": place.pid, "restarts": place.restarts, "answers": place.number in answers}
            for place in self._crew.places
        ]
        refused = next((answer["refused"] for answer in answers.values() if answer["refused"]), "")
        report = {"catalog": str(self.catalogs[0]), "pid": os.getpid(), "workers": workers, "counts": totals}
        _reply(client, report | {"refused": refused})

    def _totals(self, answers: Answers) -> dict[str, int]:
        totals = dict(self._counts)
        for answer in answers.values():
            for name, count in answer["counts"].items():
                totals[name] = totals.get(name, 0) + count
        return totals

    # --- restart ---

    def _restart(self, client: socket.socket, installation: Installation) -> None:
        assert self._crew is not None
        self._changing = True
        self._crew.ask(
            {"op": "status"}, "status", STATUS_SECONDS, lambda _, answers: self._counted(client, installation, answers)
        )

    def _counted(self, client: socket.socket, installation: Installation, answers: Answers) -> None:
        def over(pid: int, why: str) -> None:
            if pid:
                _reply(client, {"pid": pid})
            else:
                _reply(client, {"error": to_wire(MountError(f"its new keeper came to nothing: {why}"))})
                self._changed()

        totals = self._totals(answers)
        totals.pop("waiting", None)  # these will be asked for again
        try:
            self._hand_over(installation, totals, over)
        except (CacheFSError, OSError) as error:
            _reply(client, {"error": to_wire(error)})
            self._changed()

    # --- refresh ---

    def _refresh(self, client: socket.socket, catalog: Path) -> None:
        """All workers go over to the catalog; then the kernel forgets what changed; then the client hears."""
        assert self._crew is not None
        held = self._holds.get(catalog) or hold(catalog)
        self._rooms.catalog(catalog).close()  # a damaged one is refused here, before any worker hears of it
        old = self.catalogs[0]
        self.catalogs = [catalog, *(c for c in self.catalogs if c != catalog)][:GENERATIONS]
        self._holds[catalog] = held
        for file in self._holds.keys() - self.catalogs:
            if (dropped := self._holds.pop(file)) is not None:
                dropped.release()
        self._changing = True
        self._crew.ask(
            {"op": "catalogs", "files": [str(c) for c in self.catalogs]},
            "switched",
            SWITCH_SECONDS,
            lambda silent, _: self._switched(client, silent, old),
        )

    def _switched(self, client: socket.socket, silent: set[int], old: Path) -> None:
        assert self._crew is not None
        for number in silent:
            log.warning("worker %d does not take the new catalog", self._crew.places[number].pid)
            self._crew.replace(number)
        self._refreshed(self.catalogs)
        # In a process of its own, because telling the kernel may wait for a worker: see fuse/invalidation.py.
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.set_wakeup_fd(-1)
                self._crew.close_devices()
                status = self._compare_and_tell(client, old, self.catalogs[0])
            finally:
                os._exit(status)
        client.close()
        pidfd = os.pidfd_open(pid)
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._told(pid, pidfd))

    def _compare_and_tell(self, client: socket.socket, old: Path, new: Path) -> int:
        try:
            with (
                contextlib.closing(self._rooms.catalog(old)) as before,
                contextlib.closing(self._rooms.catalog(new)) as after,
            ):
                changed = invalidation.invalidate(self._device, self._rooms.changes(before, after))
        except (CacheFSError, OSError) as error:
            log.exception("the kernel may remember names of the snapshot before")
            _reply(client, {"error": to_wire(error)})
            return 1
        log.info("refreshed to %s, %d names changed", new.name, changed)
        _reply(client, {"changed": changed})
        return 0

    def _told(self, pid: int, pidfd: int) -> None:
        os.waitpid(pid, 0)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        # Its client has heard before: the next change waits until here all the same.
        self._changed()


def _reply(client: socket.socket, answer: dict[str, Any]) -> None:
    with client:
        try:
            client.send(json.dumps(answer).encode(), socket.MSG_DONTWAIT)
        except OSError as error:
            log.info("a command went away before its answer (%s)", error.strerror)
