"""The workers of one mount, as the keeper sees them: forked, replaced when they die, spoken to.

A worker that dies is replaced on its descriptor, and the kernel is told to deliver again what nobody has answered
(RESEND, Linux 6.9); readers notice nothing. On older kernels the dead worker's descriptor is closed instead: the
kernel then fails its requests, reads again by itself where it was reading ahead, and no reader hangs. Where the
workers share one queue that does not help either, and the connection is `lost`: it must be mounted anew.

When the mount passes to another keeper, the crew of the old one finishes: its workers read nothing more and end when
they have answered what they have. The crew of the new one was forked before and begins when it is told.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cachefs.errors import MountError
from cachefs_sidecar.device import branches
from cachefs_sidecar.fuse import wire, worker
from cachefs_sidecar.questions import Answers, Questions

log = logging.getLogger("cachefs.mount")

# A worker that dies within this many seconds of its start makes the next one wait, twice as long each time.
HEALTHY_SECONDS = 10.0
FIRST_PAUSE, LAST_PAUSE = 0.1, 5.0

# Answers of a worker are counts and acknowledgements.
MAX_PACKET = 64 * 1024


@dataclass
class Place:
    """A worker's place: its descriptor stays when the worker changes. due: when the next worker may start.

    finishing: this worker was told to end. ended: nobody works here any more.
    """

    number: int
    device: int
    control: socket.socket | None = None
    pid: int = 0
    pidfd: int = -1
    started: float = 0.0
    restarts: int = 0
    pause: float = 0.0
    due: float = 0.0
    finishing: bool = False
    ended: bool = False


class Crew:
    """device: the connection's first descriptor, which no worker reads. devices: of it, one for each worker.

    serving: what a new worker is to serve. in_child: what a forked worker must let go of first. resend: whether the
    kernel can deliver again. shared: the devices have one queue. They are this object's from now on.
    """

    def __init__(
        self,
        device: int,
        devices: Sequence[int],
        selector: selectors.BaseSelector,
        serving: Callable[[], worker.Serving],
        in_child: Callable[[], None],
        *,
        resend: bool,
        shared: bool,
    ) -> None:
        self._device = device
        self._selector = selector
        self._serving = serving
        self._in_child = in_child
        self._resend = resend
        self._shared = shared
        self._questions = Questions()
        self.lost = False
        # Set while nobody is replaced, because another keeper's workers are about to serve.
        self._closing = False
        self._finished: Callable[[], None] | None = None
        self._finish_by = 0.0
        self.places = [Place(number, fd) for number, fd in enumerate(devices)]

    @property
    def gone(self) -> bool:
        """Whether every worker has ended because the mount is gone."""
        return not self._closing and all(place.ended for place in self.places)

    @property
    def pids(self) -> list[int]:
        return [place.pid for place in self.places if place.pid]

    # --- they begin ---

    def rehearse(self, seconds: float) -> None:
        """Have all workers ready to begin: each has opened what it serves. Raises MountError when one cannot."""
        for place in self.places:
            self._fork(place)
        deadline = time.monotonic() + seconds
        for place in self.places:
            assert place.control is not None
            place.control.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                ready = place.control.recv(MAX_PACKET)
            except TimeoutError:
                raise MountError(f"a worker was not ready within {seconds:g} s") from None
            finally:
                place.control.settimeout(None)
            if not ready:
                raise MountError("a worker ended before it was ready; the log says why")

    def begin(self) -> None:
        for place in self.places:
            self.tell(place, {"op": "begin"})

    def _replace(self, place: Place) -> None:
        self._fork(place)
        self.tell(place, {"op": "begin"})

    def _fork(self, place: Place) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.set_blocking(place.device, True)  # whoever finished on it left it otherwise
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                ours.close()
                self._let_go(place)
                status = worker.run(self._serving(), place.device, theirs)
            finally:
                os._exit(status)
        theirs.close()
        place.control, place.pid, place.started, place.finishing = ours, pid, time.monotonic(), False
        place.pidfd = os.pidfd_open(pid)
        self._selector.register(place.pidfd, selectors.EVENT_READ, lambda: self._ended(place))
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._heard(place))

    def _let_go(self, own: Place) -> None:
        """In a new worker: while a sibling's descriptor were open here too, closing it elsewhere would do nothing."""
        self._in_child()
        os.close(self._device)
        for place in self.places:
            if place is not own:
                os.close(place.device)
                if place.control is not None:
                    place.control.close()
                if place.pidfd >= 0:
                    os.close(place.pidfd)

    def close_devices(self) -> None:
        """In a forked process that is no worker."""
        for place in self.places:
            os.close(place.device)

    # --- one ends ---

    def _ended(self, place: Place) -> None:
        pid, finishing, status = place.pid, place.finishing, self._reap(place)
        self._questions.ended(place.number)
        if self._closing or (status == 0 and not finishing):
            place.ended = True  # another keeper's worker takes its place, or the mount is gone
            if status != 0 and not self._resend:
                self._deliver_again([place])
            return
        # SIGKILL is somebody's decision (an operator's, the kernel's when memory is short), no fault of the worker's.
        expected = status in (0, -signal.SIGKILL)
        healthy = expected or time.monotonic() - place.started > HEALTHY_SECONDS
        pause = 0.0 if healthy else place.pause
        place.pause = FIRST_PAUSE if healthy or not pause else min(LAST_PAUSE, pause * 2)
        place.due = time.monotonic() + pause
        place.restarts += 1
        log.warning("worker %d ended (%s); another takes its place", pid, _why(status))
        self._deliver_again([place])
        if pause == 0:
            self._replace(place)

    def _reap(self, place: Place) -> int:
        _, status = os.waitpid(place.pid, 0)
        for watched in (place.pidfd, place.control):
            assert watched is not None
            self._selector.unregister(watched)
        os.close(place.pidfd)
        assert place.control is not None
        place.control.close()
        place.control, place.pid, place.pidfd = None, 0, -1
        return os.waitstatus_to_exitcode(status)

    def deliver_again(self) -> None:
        """What anybody has read and not answered, where the kernel can; elsewhere it has failed with its reader."""
        if self._resend:
            self._deliver_again(self.places)

    def _deliver_again(self, places: Sequence[Place]) -> None:
        """What dead workers left unanswered on the descriptors of these places."""
        if not self._resend and self._shared:
            self.lost = True
            return
        if not self._resend:
            log.warning("this kernel cannot deliver requests again (Linux 6.9 can): those of the worker fail")
            for place in places:
                # The branch first: were it the last descriptor, closing it would end the mount.
                (fresh,), _ = branches(self._device, 1)
                os.close(place.device)
                place.device = fresh
            return
        try:
            os.write(self._device, wire.notify_resend())
        except OSError as error:
            # Unmounted meanwhile: nothing is left to deliver.
            if error.errno not in (errno.ENODEV, errno.ENOTCONN, errno.EPERM):
                raise

    # --- words ---

    def tell(self, place: Place, message: dict[str, Any]) -> bool:
        """Send to one worker; False when it cannot hear."""
        if place.control is None:
            return False
        try:
            place.control.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)
        except OSError as error:
            log.warning("worker %d does not listen (%s)", place.pid, error.strerror)
            return False
        return True

    def ask(
        self, message: dict[str, Any], answer: str, seconds: float, done: Callable[[set[int], Answers], None]
    ) -> None:
        """Send to all; `done` when all have answered, or after `seconds`. Later, from `look_at_clocks`."""
        asked = {place.number for place in self.places if self.tell(place, message)}
        self._questions.ask(asked, answer, seconds, done)

    def _heard(self, place: Place) -> None:
        assert place.control is not None
        try:
            packet = place.control.recv(MAX_PACKET, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            # It has ended, and its pidfd says so. Until then the closed socket must not keep the loop awake.
            place.control.shutdown(socket.SHUT_RDWR)
            return
        message: dict[str, Any] = json.loads(packet)
        if message["op"] == "interrupt":
            for other in self.places:
                if other is not place:
                    self.tell(other, message)
            return
        self._questions.heard(place.number, message)

    # --- time ---

    def timeout(self) -> float | None:
        """Seconds until something is due; None = nothing is."""
        times = self._questions.deadlines()
        if not self._closing:
            times += [place.due for place in self.places if not place.pid and not place.ended]
        if self._finished is not None:
            times.append(self._finish_by if self.pids else 0.0)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def look_at_clocks(self) -> None:
        now = time.monotonic()
        for place in self.places:
            if not self._closing and not place.pid and not place.ended and place.due <= now:
                self._replace(place)
        self._questions.look_at_clocks(now)
        if self._finished is not None:
            self._look_at_finish(now)

    # --- the end ---

    def close(self) -> list[int]:
        """From now on nobody is replaced; who serves."""
        self._closing = True
        return self.pids

    def finish(self, seconds: float, finished: Callable[[], None]) -> None:
        """After `close`: let everybody answer what they have and end. Who has not after `seconds` is killed."""
        self._finished, self._finish_by = finished, time.monotonic() + seconds
        for place in self.places:
            # On a shared queue whoever stops reading would stop the other keeper's workers too.
            place.finishing = not self._shared and self.tell(place, {"op": "finish"})
            if not place.finishing:
                self.replace(place.number)

    def _look_at_finish(self, now: float) -> None:
        if self._finish_by <= now:
            for place in self.places:
                if place.pid:
                    os.kill(place.pid, signal.SIGKILL)
            self._finish_by = now + HEALTHY_SECONDS  # their ends are reported as they come
        if not self.pids:
            finished, self._finished = self._finished, None
            assert finished is not None
            finished()

    def go_on(self) -> None:
        """`close` came to nothing: all places are filled again."""
        self._closing, self._finished = False, None
        for place in self.places:
            place.ended, place.due = False, 0.0
            if place.finishing:
                self.replace(place.number)
        self.deliver_again()

    def replace(self, number: int) -> None:
        """Kill a worker that is stuck; another takes its place."""
        place = self.places[number]
        if place.pid:
            os.kill(place.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill whoever still works and close every descriptor."""
        self._closing = False
        for place in self.places:
            if place.pid:
                os.kill(place.pid, signal.SIGKILL)
                self._reap(place)
            place.ended = True
            if place.device >= 0:
                os.close(place.device)
                place.device = -1


def _why(status: int) -> str:
    return f"status {status}" if status > 0 else signal.Signals(-status).name if status else "as it was told"
