"""INIT: what the kernel and this mount agree on, once per connection.

The keeper does this before it starts workers, so that a worker that comes later, in place of one that died,
finds the agreement made.
"""

from __future__ import annotations

import errno
import os
import select
import time
from dataclasses import dataclass

from cachefs.errors import MountError
from cachefs_sidecar.fuse import abi, tracing, wire
from cachefs_sidecar.fuse.abi import Init, Opcode

# What is asked for when the kernel offers it:
#   ASYNC_READ           several READs of one file in flight: a cold shard is read ahead while it is consumed.
#   MAX_PAGES, BIG_WRITES  READs of 256 pages; without them 32 pages are the most.
#   DO_READDIRPLUS       a listing brings the attributes along: whoever lists a dataset reads it next, and then every
#                        open and stat is the kernel's own. Not READDIRPLUS_AUTO, which lists without attributes
#                        until it sees a stat: measured on 200,000 files, `find` 1.1 s instead of 1.3 s, but
#                        `find -size` 8.9 s instead of 2.5 s, since listings are kept and each name is then looked up.
#                        Its price is 1.1 KB of the kernel's reclaimable memory for each name that was listed.
#   PARALLEL_DIROPS      lookups in one directory need not wait for each other.
#   NO_OPEN, NO_OPENDIR  open-free mode.
#   EXPLICIT_INVAL_DATA  pages are dropped when we say so, never on a guess from mtime; so not AUTO_INVAL_DATA.
#   HAS_RESEND           requests of a worker that died are delivered again.
#   INIT_EXT             flags above bit 31 exist.
#   PASSTHROUGH          in that mode only.
# Not asked for: CACHE_SYMLINKS (a dataset has no links).
WANTED = (
    Init.ASYNC_READ
    | Init.BIG_WRITES
    | Init.DO_READDIRPLUS
    | Init.PARALLEL_DIROPS
    | Init.MAX_PAGES
    | Init.NO_OPEN_SUPPORT
    | Init.NO_OPENDIR_SUPPORT
    | Init.EXPLICIT_INVAL_DATA
    | Init.INIT_EXT
    | Init.HAS_RESEND
)

# Reads ahead count as background requests, and past this number every further one waits, also those that the cache
# could answer at once. Reads that wait for the origin would fill the default of 12. The number of readers bounds it
# anyway, so it is as good as none. (An unprivileged mount is held to fs.fuse.max_user_bgreq, which depends on memory.)
MAX_BACKGROUND = 16384

# Above this the kernel leaves out reading ahead; three quarters is the kernel's own ratio of the two.
CONGESTION_THRESHOLD = MAX_BACKGROUND * 3 // 4

# Nothing is written; this is the least the kernel accepts, and it keeps request buffers small.
MAX_WRITE = 4096
MAX_PAGES = 256

# The kernel sends INIT as soon as it has mounted; it answers at once or something is badly wrong.
INIT_SECONDS = 10.0


@dataclass(frozen=True)
class Agreement:
    """The protocol's minor version and the flags both sides agreed on."""

    minor: int
    flags: int

    @property
    def open_free(self) -> bool:
        return bool(self.flags & Init.NO_OPEN_SUPPORT)

    @property
    def opendir_free(self) -> bool:
        return bool(self.flags & Init.NO_OPENDIR_SUPPORT)

    @property
    def resend(self) -> bool:
        return bool(self.flags & Init.HAS_RESEND)

    @property
    def passthrough(self) -> bool:
        return bool(self.flags & Init.PASSTHROUGH)


def agree(offer: wire.InitIn, stack_depth: int = 0) -> tuple[Agreement, bytes]:
    """The agreement on an offer, and the body of the reply that says so. Raises MountError: kernel too old.

    stack_depth: how many file systems lie on one another, ours the topmost, when the kernel is to read blobs by itself
    (1: the cache is on a disk, 2: on an overlay of directories); 0 = it is not to.
    """
    if offer.major != abi.MAJOR or offer.minor < abi.OLDEST_MINOR:
        raise MountError(
            f"this kernel speaks FUSE {offer.major}.{offer.minor}; cachefs needs {abi.MAJOR}.{abi.OLDEST_MINOR} "
            "(Linux 5.4) or newer. The fsspec URL works without a mount"
        )
    wanted = WANTED | Init.PASSTHROUGH if stack_depth else WANTED
    agreement = Agreement(min(offer.minor, abi.MINOR), int(offer.flags & wanted))
    reply = wire.init_out(
        minor=agreement.minor,
        max_readahead=offer.max_readahead,
        flags=agreement.flags,
        max_background=MAX_BACKGROUND,
        congestion_threshold=CONGESTION_THRESHOLD,
        max_write=MAX_WRITE,
        max_pages=MAX_PAGES,
        max_stack_depth=stack_depth,
    )
    return agreement, reply


def negotiate(device: int, stack_depth: int = 0) -> Agreement:
    """Answer INIT on a fresh connection. Raises MountError; OSError when the descriptor breaks."""
    buffer = bytearray(64 * 1024)
    deadline = time.monotonic() + INIT_SECONDS
    while True:
        readable, _, _ = select.select([device], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise MountError(f"the kernel did not begin the FUSE protocol within {INIT_SECONDS:g} s")
        try:
            length = os.readv(device, [buffer])
        except InterruptedError:
            continue
        except OSError as error:
            raise MountError(f"the mount ended while it was made ({error.strerror})") from error
        request = wire.decode(memoryview(buffer)[:length])
        if request.opcode != Opcode.INIT:
            raise MountError(f"the kernel began with {request.name} instead of INIT")
        offer = wire.init_in(request.body)
        if offer.major > abi.MAJOR:
            # A newer kernel hears our major version and begins again in it.
            newest = wire.init_out(
                minor=abi.MINOR,
                max_readahead=0,
                flags=0,
                max_background=0,
                congestion_threshold=0,
                max_write=0,
                max_pages=0,
            )
            os.writev(device, [wire.out_header(len(newest), 0, request.unique), newest])
            continue
        try:
            agreement, reply = agree(offer, stack_depth)
        except MountError:
            os.writev(device, [wire.out_header(0, -errno.EPROTO, request.unique)])
            raise
        os.writev(device, [wire.out_header(len(reply), 0, request.unique), reply])
        tracing.agreed(offer, agreement.minor, agreement.flags)
        return agreement
