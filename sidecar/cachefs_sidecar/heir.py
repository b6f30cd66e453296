"""The process that takes a mount over from another keeper, until it is the keeper: see handover for the words.

Until it is told to go, it ends when the keeper does or when anything is not as it should be, and nobody notices.
From then on it knows everything: should the keeper die, it ends the other workers itself and takes over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket

from cachefs.errors import CacheFSError
from cachefs_sidecar import connection, handover
from cachefs_sidecar.handover import Estate
from cachefs_sidecar.keeper import Keeper
from cachefs_sidecar.logs import open_log, set_up_logging
from cachefs_sidecar.manager import Manager

log = logging.getLogger("cachefs.mount")

# For the other workers to end after their keeper was killed, and they were too.
KILL_SECONDS = 5.0


def succeed(fd: int) -> int:
    """fd: the socket to the keeper. The exit status."""
    link = socket.socket(fileno=fd)
    link.set_inheritable(False)
    set_up_logging()
    try:
        estate = handover.receive(link)
        log_file = open_log(estate.settings) if estate.info.log else ""
        keeper = Keeper(
            estate.settings,
            lambda: connection.inherited(estate),
            log_file=log_file,
            manager=Manager(estate.manager) if estate.manager else None,
            lifeline=estate.lifeline,
            let_go=lambda: _let_go(link, estate),
        )
        workers = keeper.rehearse()
    except CacheFSError as error:
        handover.say_failed(link, error)
        return 1
    except Exception as error:
        handover.say_failed(link, error)
        raise
    handover.say(link, "ready", workers=workers)
    word = handover.hear(link)
    if word.get("op") != "go":
        log.warning("the keeper did not hand over; ends")
        return 1
    others = [_pidfd(pid) for pid in word["workers"]]
    keeper.begin()
    _say(link, "serving")
    if handover.hear(link).get("op") != "yours":
        log.warning("the keeper died while it handed over")
        _end(others)
    keeper.take_over()
    _say(link, "done")
    link.close()
    for other in (*others, *estate.held):
        if other >= 0:
            os.close(other)
    return keeper.run()


def _let_go(link: socket.socket, estate: Estate) -> None:
    """In a worker: were these open here too, nobody would notice when the heir or another worker ends."""
    link.close()
    for held in estate.held:
        os.close(held)


def _say(link: socket.socket, op: str) -> None:
    with contextlib.suppress(OSError):  # the keeper is gone: it is read from the next word
        handover.say(link, op)


def _pidfd(pid: int) -> int:
    """-1: it has ended already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


def _end(pidfds: list[int]) -> None:
    for pidfd in filter(lambda fd: fd >= 0, pidfds):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], KILL_SECONDS)
