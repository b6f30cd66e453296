"""What passes between the kernel and a worker, a line each, when CACHEFS_DEBUG=fuse is set where a mount is made.

    READ unique=8 node=5 pid=4711 offset=0 size=131072 -> 4096 bytes
    LOOKUP unique=10 node=1 pid=4711 name='cat.jpg' -> ENOENT
    READ unique=12 node=6 pid=4711 offset=0 size=131072 -> waits for the fetcher
    unique=12 -> 110000 bytes

Names of files, sizes and numbers are all that a request has, so nothing here is secret; bytes of files are counted,
not shown.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable

from cachefs_sidecar.fuse import wire
from cachefs_sidecar.fuse.abi import UNANSWERED, UNIQUE_RESEND, Init, Opcode, flag_names
from cachefs_sidecar.fuse.wire import Request

log = logging.getLogger("cachefs.mount")


def wanted() -> bool:
    return os.environ.get("CACHEFS_DEBUG") == "fuse"


def passed(request: Request, answer: bytes | memoryview | int | None) -> None:
    """A request, and what was answered at once; None = nothing yet."""
    if answer is None:
        said = "no answer is wanted" if request.opcode in UNANSWERED else "waits for the fetcher"
    else:
        said = outcome(answer)
    log.debug("%s -> %s", describe(request), said)


def answered(unique: int, answer: bytes | memoryview | int) -> None:
    """What was answered later."""
    log.debug("unique=%s -> %s", _number(unique), outcome(answer))


def agreed(offer: wire.InitIn, minor: int, flags: int) -> None:
    """What INIT came to."""
    log.debug(
        "INIT %d.%d max_readahead=%d flags=%s -> minor=%d flags=%s",
        offer.major,
        offer.minor,
        offer.max_readahead,
        flag_names(Init, offer.flags),
        minor,
        flag_names(Init, flags),
    )


def outcome(answer: bytes | memoryview | int) -> str:
    """answer: the body of a reply, or a negative errno."""
    return errno.errorcode.get(-answer, str(answer)) if isinstance(answer, int) else f"{len(answer)} bytes"


def describe(request: Request) -> str:
    head = f"{request.name} unique={_number(request.unique)} node={request.node} pid={request.pid}"
    details = _DETAILS.get(request.opcode)
    if details is None:
        return head
    try:
        return f"{head} {details(request)}"
    except wire.WireError as error:
        return f"{head} ({error})"


def _number(unique: int) -> str:
    return f"{unique & ~UNIQUE_RESEND}, delivered again" if unique & UNIQUE_RESEND else str(unique)


def _read(request: Request) -> str:
    offset, size = wire.read_in(request.body)
    return f"offset={offset} size={size}"


def _getxattr(request: Request) -> str:
    room, name = wire.getxattr_in(request.body)
    return f"name={_text(name)} room={room}"


def _text(name: bytes) -> str:
    return repr(name.decode("utf-8", "backslashreplace"))


_DETAILS: dict[int, Callable[[Request], str]] = {
    Opcode.LOOKUP: lambda request: f"name={_text(wire.name_in(request.body))}",
    Opcode.READ: _read,
    Opcode.READDIR: _read,
    Opcode.READDIRPLUS: _read,
    Opcode.GETXATTR: _getxattr,
    Opcode.LISTXATTR: lambda request: f"room={wire.listxattr_in(request.body)}",
    Opcode.INTERRUPT: lambda request: f"of={_number(wire.interrupt_in(request.body))}",
}
