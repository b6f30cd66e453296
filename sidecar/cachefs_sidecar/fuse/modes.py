"""How bytes get from the cache to readers: the two modes of a mount, which one it has, and why.

Open-free (session.py): the kernel opens files by itself and keeps their pages, which it has from us. Nothing that is in
memory costs a request, and no privilege is needed. Passthrough (passthrough.py): the kernel reads the blobs. Nothing is
in memory twice and nothing cold passes through us, but each open does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cachefs.digest import BLOCK_SIZE
from cachefs.mountinfo import mount_of
from cachefs.store.layout import Places
from cachefs_sidecar.fuse import passthrough
from cachefs_sidecar.fuse.negotiation import Agreement, negotiate
from cachefs_sidecar.fuse.opens import Opens

log = logging.getLogger("cachefs.mount")

AUTO, OPEN_FREE, PASSTHROUGH = "auto", "open-free", "passthrough"


class Io(NamedTuple):
    """mode: OPEN_FREE or PASSTHROUGH. why: in words."""

    mode: str
    why: str


def arrange(
    device: int, asked: str, median_size: int, directories: Sequence[Path], table: Path, *, resend: bool = True
) -> tuple[Agreement, Io]:
    """Agree with the kernel on a fresh connection, in passthrough if that is wanted and can be had.

    asked: AUTO, OPEN_FREE or PASSTHROUGH. median_size: of a file of the dataset, in bytes. directories: of the cache.
    table: where the table of open files is to be; it is made for passthrough. Raises MountError.
    """
    wanted = choice(asked, median_size)
    agreement = negotiate(device, stack_depth(directories) if wanted.mode == PASSTHROUGH else 0)
    if wanted.mode == OPEN_FREE:
        return agreement, wanted
    refused = ""
    if not (agreement.passthrough and agreement.resend and resend):
        refused = "this kernel has no passthrough (Linux 6.9 has)"
    else:
        try:
            Opens.create(table, _try_out(device, directories))
        except OSError as error:
            refused = passthrough.why_refused(error)
    if refused:
        log.warning("open-free, not passthrough: %s", refused)
        return agreement, Io(OPEN_FREE, f"no passthrough: {refused}")
    return agreement, wanted


def choice(asked: str, median_size: int) -> Io:
    """What to try.

    With passthrough an open costs some 100 us that it does not cost without, and a cold byte costs less: it pays for
    files of some MiB and more, which are those that are fetched by block.
    """
    if asked != AUTO:
        return Io(asked, "asked for")
    if median_size > BLOCK_SIZE:
        return Io(PASSTHROUGH, f"half of the files are larger than {BLOCK_SIZE >> 20} MiB")
    return Io(OPEN_FREE, f"half of the files are not larger than {BLOCK_SIZE >> 20} MiB")


def stack_depth(directories: Sequence[Path]) -> int:
    """How many file systems lie on one another, ours the topmost: containers often have an overlay of directories."""
    return 2 if any(_on_overlay(directory) for directory in directories) else 1


def _on_overlay(directory: Path) -> bool:
    mount = mount_of(Path(os.path.realpath(directory)))
    return mount is not None and mount.fstype == "overlay"


def _try_out(device: int, directories: Sequence[Path]) -> int:
    """Register a file of each cache directory for a moment; the last id that the kernel gave. Raises OSError."""
    last = 0
    for directory in directories:
        fd = os.open(Places(directory).marker, os.O_RDONLY | os.O_CLOEXEC)
        try:
            last = passthrough.register(device, fd)
        finally:
            os.close(fd)
        passthrough.unregister(device, last)
    return last
