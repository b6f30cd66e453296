"""The workers of one mount, as the keeper sees them: forked, replaced when they die, spoken to.

A worker that dies is replaced on its descriptor, and the kernel is told to deliver again what nobody has answered
(RESEND, Linux 6.9); readers notice nothing. On older kernels the dead worker's descriptor is closed instead: the
kernel then fails its requests, reads again by itself where it was reading ahead, and no reader hangs.
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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cachefs_sidecar import mounts
from cachefs_sidecar.fuse import wire, worker

log = logging.getLogger("cachefs.mount")

# A worker that dies within this many seconds of its start makes the next one wait, twice as long each time.
HEALTHY_SECONDS = 10.0
FIRST_PAUSE, LAST_PAUSE = 0.1, 5.0

# Answers of a worker are counts and acknowledgements.
MAX_PACKET = 64 * 1024


@dataclass
class Place:
    """A worker's place: its descriptor stays when the worker changes. due: when the next worker may start."""

    number: int
    device: int
    control: socket.socket | None = None
    pid: int = 0
    pidfd: int = -1
    started: float = 0.0
    restarts: int = 0
    pause: float = 0.0
    due: float = 0.0
    ended: bool = False


Answers = dict[int, dict[str, Any]]


@dataclass
class _Question:
    """Asked of all workers; `waiting` have not answered yet. done: called once, with who has not and the answers."""

    answer: str
    waiting: set[int]
    deadline: float
    done: Callable[[set[int], Answers], None]
    answers: Answers


class Crew:
    """device: the connection's first descriptor, which no worker reads. serving: what a new worker is to serve.

    in_child: what a forked worker must let go of first. resend: whether the kernel can deliver again.
    """

    def __init__(
        self,
        device: int,
        count: int,
        selector: selectors.BaseSelector,
        serving: Callable[[], worker.Serving],
        in_child: Callable[[], None],
        *,
        resend: bool,
    ) -> None:
        self._device = device
        self._selector = selector
        self._serving = serving
        self._in_child = in_child
        self._resend = resend
        self._questions: list[_Question] = []
        self.places = [Place(number, self._clone()) for number in range(count)]

    @property
    def gone(self) -> bool:
        """Whether every worker has ended because the mount is gone."""
        return all(place.ended for place in self.places)

    def start(self) -> None:
        for place in self.places:
            self._fork(place)

    def _clone(self) -> int:
        try:
            return mounts.clone(self._device)
        except OSError as error:
            # Without access to /dev/fuse (a broker passed the descriptor) the workers share one queue.
            log.info("the connection cannot be cloned (%s); the workers share it", error.strerror)
            return os.dup(self._device)

    def _fork(self, place: Place) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
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
        place.control, place.pid, place.started = ours, pid, time.monotonic()
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

    # --- a worker ends ---

    def _ended(self, place: Place) -> None:
        pid, status = place.pid, self._reap(place)
        if status == 0:
            place.ended = True  # the mount is gone
            return
        # SIGKILL is somebody's decision (an operator's, the kernel's when memory is short), no fault of the worker's.
        healthy = status == -signal.SIGKILL or time.monotonic() - place.started > HEALTHY_SECONDS
        pause = 0.0 if healthy else place.pause
        place.pause = FIRST_PAUSE if healthy or not pause else min(LAST_PAUSE, pause * 2)
        place.due = time.monotonic() + pause
        place.restarts += 1
        log.warning("worker %d ended (%s); another takes its place", pid, _why(status))
        self._deliver_again(place)
        for question in self._questions:  # its successor begins with what the others were told
            question.waiting.discard(place.number)
        if pause == 0:
            self._fork(place)

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

    def _deliver_again(self, place: Place) -> None:
        if not self._resend:
            log.warning("this kernel cannot deliver requests again (Linux 6.9 can): those of the worker fail")
            # The clone first: were it the last descriptor, closing it would end the mount.
            fresh = self._clone()
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
        self._questions.append(_Question(answer, asked, time.monotonic() + seconds, done, {}))

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
        for question in self._questions:
            if question.answer == message["op"] and place.number in question.waiting:
                question.waiting.discard(place.number)
                question.answers[place.number] = message
                return

    # --- time ---

    def timeout(self) -> float | None:
        """Seconds until something is due; None = nothing is."""
        times = [place.due for place in self.places if not place.pid and not place.ended]
        times += [question.deadline if question.waiting else 0.0 for question in self._questions]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def look_at_clocks(self) -> None:
        now = time.monotonic()
        for place in self.places:
            if not place.pid and not place.ended and place.due <= now:
                self._fork(place)
        for question in list(self._questions):
            if not question.waiting or question.deadline <= now:
                self._questions.remove(question)
                question.done(question.waiting, question.answers)

    # --- the end ---

    def replace(self, number: int) -> None:
        """Kill a worker that is stuck; another takes its place."""
        place = self.places[number]
        if place.pid:
            os.kill(place.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill whoever still works and close every descriptor."""
        for place in self.places:
            if place.pid:
                os.kill(place.pid, signal.SIGKILL)
                self._reap(place)
            place.ended = True
            if place.device >= 0:
                os.close(place.device)
                place.device = -1


def _why(status: int) -> str:
    return f"status {status}" if status > 0 else signal.Signals(-status).name
