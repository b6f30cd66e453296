"""SIGTERM and Ctrl-C as events of the keeper's loop, instead of ends of the process."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
from collections.abc import Callable

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


def take(selector: selectors.BaseSelector, closers: contextlib.ExitStack, told: Callable[[], None]) -> None:
    """Until `closers` are closed they wait for the loop: to die of one would leave a dead mount behind."""
    wake, wakened = socket.socketpair()
    for end in (wake, wakened):
        end.setblocking(False)
        closers.enter_context(end)
    for number in _NUMBERS:
        closers.callback(signal.signal, number, signal.signal(number, lambda *_: None))
    signal.set_wakeup_fd(wakened.fileno(), warn_on_full_buffer=False)
    closers.callback(signal.set_wakeup_fd, -1)

    def woken() -> None:
        for number in wake.recv(64):
            if number in _NUMBERS:
                told()

    selector.register(wake, selectors.EVENT_READ, woken)


def let_go() -> None:
    """In a forked worker: signals as they come."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # In the foreground Ctrl-C reaches every process; the keeper unmounts, and that ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
