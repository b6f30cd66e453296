"""How a keeper comes by the connection that it looks after: it mounts, or somebody passes it on.

Whoever passes it on is the keeper before (`handover`), or a service manager that kept the descriptors while no
process was left (`manager`). The kernel says INIT once only, so what was agreed on then is passed on too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cachefs.catalog import Catalog
from cachefs.errors import MountError
from cachefs.mountinfo import mounted_at
from cachefs_sidecar import mounts, registry
from cachefs_sidecar.device import branches
from cachefs_sidecar.fuse import modes
from cachefs_sidecar.fuse.abi import Init
from cachefs_sidecar.fuse.negotiation import Agreement
from cachefs_sidecar.fuse.opens import Opens
from cachefs_sidecar.handover import Estate
from cachefs_sidecar.registry import MountInfo, MountSettings

log = logging.getLogger("cachefs.mount")


@dataclass(frozen=True)
class Connection:
    """fd: no worker reads it. devices: one for each worker. shared: they have one queue, else one each.

    device: of the mount, as mountinfo writes it. catalogs: what is served, newest first. counts: of keepers before.
    mounted: by this process, which then must not leave it behind when it fails. started: in seconds since the epoch.
    io: how bytes get to readers. opens: the table of open files where that is passthrough.
    """

    agreement: Agreement
    fd: int
    devices: Sequence[int]
    shared: bool
    device: str
    catalogs: Sequence[Path]
    started: float
    io: modes.Io
    opens: Path | None
    mounted: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)


def mount(settings: MountSettings, *, resend: bool = True) -> Connection:
    """A new one. resend: False = as on a kernel that cannot deliver again, for a test. Raises MountError."""
    point = mounts.resolve(settings.mountpoint)
    note = mounts.prepare(point)
    if note:
        log.warning("%s", note)
    with contextlib.closing(Catalog.open(settings.catalog)) as catalog:
        median_size = catalog.summary.median_size
    fd = mounts.mount(point, source=settings.origin, allow_other=settings.allow_other)
    table = registry.opens_path(point, os.getpid())
    try:
        agreement, io = modes.arrange(fd, settings.io, median_size, settings.cache.dirs, table, resend=resend)
        if not resend:
            agreement = replace(agreement, flags=agreement.flags & ~Init.HAS_RESEND)
        if not mounts.raise_read_ahead(point):
            log.info("the kernel reads at most 128 KiB ahead; only root may raise that")
        present = mounted_at(point)
        if present is None:
            raise MountError(f"{point}: was unmounted as soon as it was mounted")
        devices, shared = branches(fd, settings.worker_count())
    except BaseException:
        with contextlib.suppress(MountError):
            mounts.unmount(point, lazy=True)
        os.close(fd)
        Opens.remove(table)
        raise
    return Connection(
        agreement,
        fd,
        devices,
        shared,
        present.device,
        [settings.catalog],
        started=time.time(),
        io=io,
        opens=table if io.mode == modes.PASSTHROUGH else None,
        mounted=True,
    )


def inherited(estate: Estate) -> Connection:
    """From the keeper before."""
    return _passed_on(estate.info, estate.device, estate.devices, estate.shared, estate.counts)


def resumed(info: MountInfo, held: Sequence[int], workers: int) -> Connection:
    """From whoever held descriptors of it, with the record that the last keeper left."""
    (fd,), _ = branches(held[0], 1)
    return _passed_on(info, fd, *branches(fd, workers), {})


def _passed_on(info: MountInfo, fd: int, devices: Sequence[int], shared: bool, counts: Mapping[str, int]) -> Connection:
    return Connection(
        Agreement(info.minor, info.flags),
        fd,
        devices,
        shared,
        info.device,
        [Path(file) for file in info.catalogs],
        started=info.started,
        io=modes.Io(info.io, info.io_why),
        opens=Path(info.opens) if info.opens else None,
        counts=counts,
    )
