"""Descriptors of a FUSE connection, as the kernel gives them out: /dev/fuse, and further ones of the same connection.

Each has a list of its own of the requests that were read from it and not answered yet. When the last copy of it is
closed, wherever that is, these fail; when the last one of a connection is closed, the mount is dead.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select

log = logging.getLogger("cachefs.mount")

DEVICE = "/dev/fuse"

_FUSE_DEV_IOC_CLONE = 0x8004E500  # _IOR(229, 0, uint32_t)


def clone(device: int) -> int:
    """Another descriptor of the same connection, with requests of its own in flight. Raises OSError."""
    fresh = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fresh, _FUSE_DEV_IOC_CLONE, device.to_bytes(4, "little"))
    except BaseException:
        os.close(fresh)
        raise
    return fresh


def branches(device: int, count: int) -> tuple[list[int], bool]:
    """`count` clones. Where that is not permitted (no access to /dev/fuse, because a broker passed the descriptor),
    descriptors that share one queue with `device`, and True."""
    made: list[int] = []
    try:
        made.extend(clone(device) for _ in range(count))
    except OSError as error:
        log.info("the connection cannot be cloned (%s); its workers share one queue", error.strerror)
        for fd in made:
            os.close(fd)
        return [os.dup(device) for _ in range(count)], True
    return made, False


def connected(device: int) -> bool:
    """Whether a descriptor of a connection leads to a mount: not when that was unmounted or the connection aborted."""
    poll = select.poll()
    poll.register(device, 0)
    return not poll.poll(0)
