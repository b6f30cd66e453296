"""What stays of a keeper in the foreground when another process keeps its mount.

A terminal, a container or a script waits for the process that it started, so that one stays: it passes signals on
to whoever keeps the mount now and ends as that one ends. Each keeper that takes over says so on the lifeline (a
SOCK_SEQPACKET socket, JSON), and the last one says with which status it ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
from collections.abc import Iterator

log = logging.getLogger("cachefs.mount")

MAX_PACKET = 1024


def stand_in(lifeline: socket.socket) -> int:
    """Wait until the mount is gone; the exit status."""
    keeper = -1

    def pass_on(number: int, _: object) -> None:
        if keeper >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(keeper, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the heir, which is our child
    for word in _words(lifeline):
        if "status" in word:
            return word["status"]
        if keeper >= 0:
            os.close(keeper)
            keeper = -1
        with contextlib.suppress(ProcessLookupError):
            keeper = os.pidfd_open(word["pid"])
    log.warning("the keeper was killed; its workers serve on, and `cachefs restart` gives them another")
    return 1


def _words(lifeline: socket.socket) -> Iterator[dict[str, int]]:
    while packet := lifeline.recv(MAX_PACKET):
        yield json.loads(packet)


def tell(lifeline: int, **word: int) -> None:
    """Say it, if there is a lifeline. Whoever stood in may have been killed: then nobody waits for this mount."""
    if lifeline < 0:
        return
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(lifeline)) as sock:
        sock.send(json.dumps(word).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
