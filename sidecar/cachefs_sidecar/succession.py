"""Handing a live mount to another process, as whoever holds it now sees it: `handover` has the words.

The heir is a fresh interpreter, of an installation that may be another. Until it says that it is done, whatever
happens to it (it cannot start, is killed, hangs) is answered by ending what there is of it and going on as before.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from cachefs.errors import MountError
from cachefs_sidecar import handover, registry
from cachefs_sidecar.handover import Estate
from cachefs_sidecar.launching import Installation, launch

# Starting an interpreter and its workers takes half a second; this is for a machine that is starving.
READY_SECONDS = 30.0

# Each further step of the heir is a few system calls.
STEP_SECONDS = 10.0

# A killed process ends at once, but for one that waits for a disk that hangs.
KILL_SECONDS = 2.0


class Incumbent(Protocol):
    """Who serves until the heir does."""

    def close(self) -> list[int]:
        """The pids of those who serve. From now on nobody takes the place of one that ends."""
        ...

    def finish(self, seconds: float, finished: Callable[[], None]) -> None:
        """Let them answer what they have and end, within `seconds`; then `finished`."""
        ...

    def go_on(self) -> None:
        """The heir came to nothing: serve as before, and have delivered again what the heir left."""
        ...


class Succession:
    """One attempt. over: called once with the heir's pid, or 0 and why there is none.

    finish_seconds: how long who serves may take to answer what they have. The devices of the estate are this object's:
    it closes its copies. Raises MountError when it cannot even begin.
    """

    def __init__(
        self,
        installation: Installation,
        estate: Estate,
        incumbent: Incumbent,
        selector: selectors.BaseSelector,
        over: Callable[[int, str], None],
        *,
        finish_seconds: float,
    ) -> None:
        self._estate = estate
        self._incumbent = incumbent
        self._selector = selector
        self._over = over
        self._finish_seconds = finish_seconds
        self._workers: list[int] = []
        self._expected = "ready"
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fd = theirs.fileno()
            try:
                self._process = launch(installation, ["--succeed", str(fd)], estate.settings, fd)
            except MountError:
                self._sock.close()
                for device in estate.devices:
                    os.close(device)
                raise
        self._pidfd = os.pidfd_open(self._process.pid)
        self._deadline = time.monotonic() + READY_SECONDS
        self._selector.register(self._sock, selectors.EVENT_READ, self._heard)
        self._selector.register(self._pidfd, selectors.EVENT_READ, self._process_ended)
        try:
            estate.send(self._sock)
        except ConnectionError:
            pass  # it has ended, and the socket says so
        except OSError as error:
            self.cancel()
            raise MountError(f"the mount cannot be handed over ({error.strerror})") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def timeout(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def look_at_clock(self) -> None:
        if self._deadline <= time.monotonic():
            self.fail("it does not answer")

    def _heard(self) -> None:
        word = handover.hear(self._sock)
        match word.get("op"):
            case None:
                self.fail(self._ended())
            case "failed":
                self.fail(handover.error_in(word))
            case op if op != self._expected:
                self.fail("it does not keep to the protocol")
            case "ready":
                self._expected = "serving"
                self._ready([pid for pid in word.get("workers", ()) if isinstance(pid, int)])
            case "serving":
                self._expected = "done"
                self._deadline = time.monotonic() + self._finish_seconds + STEP_SECONDS
                self._incumbent.finish(self._finish_seconds, self._finished)
            case "done":
                self._end()
                self._over(self.pid, "")

    def _process_ended(self) -> None:
        if select.select([self._sock], [], [], 0)[0]:
            self._heard()  # what it said last comes first
        else:
            self.fail(self._ended())

    def _ready(self, workers: Sequence[int]) -> None:
        # They live as long as their keeper does or wait for its first word, so these are no strangers.
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                self._workers.append(os.pidfd_open(pid))
        self._deadline = time.monotonic() + STEP_SECONDS
        self._say("go", workers=self._incumbent.close())

    def _finished(self) -> None:
        self._deadline = time.monotonic() + STEP_SECONDS
        self._say("yours")

    def _say(self, op: str, **more: Any) -> None:
        with contextlib.suppress(OSError):  # it has ended, and the socket says so
            handover.say(self._sock, op, **more)

    def _ended(self) -> str:
        """How the heir has ended."""
        try:
            status = self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            return "it hung up"
        return f"it ended with {f'status {status}' if status >= 0 else signal.Signals(-status).name}"

    def fail(self, why: str) -> None:
        """End what there is of the heir, and let who served before go on."""
        self.cancel()
        self._over(0, why)

    def cancel(self) -> None:
        self._process.kill()
        self._process.wait()
        for pidfd in self._workers:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        deadline = time.monotonic() + KILL_SECONDS
        for pidfd in self._workers:  # readable when the process has ended: then it reads no further request
            select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
        registry.control_path(Path(self._estate.info.mountpoint), self.pid).unlink(missing_ok=True)
        self._incumbent.go_on()
        self._end()

    def _end(self) -> None:
        for watched in (self._sock, self._pidfd):
            self._selector.unregister(watched)
        self._sock.close()
        for fd in (self._pidfd, *self._workers, *self._estate.devices):
            os.close(fd)
