"""`python -m cachefs_sidecar.keeper`: how a process becomes a keeper.

--announce FD   mount: settings on stdin, "ready" or an error as JSON on FD.
--succeed FD    take over from the keeper at the other end of the socket FD: see heir. Keepers of other versions ask
                for this too, so it stays as it is.

Or, in the foreground, a process that a service manager or a person started becomes one: `foreground`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cachefs.errors import CacheFSError, to_wire
from cachefs_sidecar import connection, heir, manager, mounts, registry, rescue
from cachefs_sidecar.connection import Connection
from cachefs_sidecar.device import connected
from cachefs_sidecar.keeper import Keeper
from cachefs_sidecar.logs import open_log, set_up_logging
from cachefs_sidecar.manager import Manager
from cachefs_sidecar.registry import MountInfo, MountSettings

log = logging.getLogger("cachefs.mount")


def main() -> None:
    parser = argparse.ArgumentParser(description="Keeps one cachefs mount; started by `cachefs`, not by hand.")
    parser.add_argument("--announce", type=int)
    parser.add_argument("--succeed", type=int)
    options = parser.parse_args()
    if options.succeed is not None:
        sys.exit(heir.succeed(options.succeed))
    os.set_inheritable(options.announce, False)
    packed = sys.stdin.buffer.read()
    if os.fork() != 0:
        os._exit(0)  # whoever started this reaps it; the keeper is init's child
    sys.exit(_keep(packed, options.announce))


def _keep(packed: bytes, announce: int) -> int:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    set_up_logging()
    try:
        settings = registry.decode_settings(packed)
        log_file = open_log(settings)
        keeper = _mounting(settings, log_file)
        keeper.start()
    except CacheFSError as error:
        _announce(announce, {"error": to_wire(error)})
        return 1
    except Exception as error:
        log.exception("the mount could not be made")
        _announce(announce, {"error": to_wire(error)})
        raise
    _announce(announce, {"ready": True})
    return look_after(keeper, settings, lambda again: _mounting(again, log_file))


def _mounting(settings: MountSettings, log_file: str, keeps: Manager | None = None) -> Keeper:
    return Keeper(settings, lambda: connection.mount(settings), log_file=log_file, manager=keeps)


def look_after(keeper: Keeper, settings: MountSettings, make: Callable[[MountSettings], Keeper]) -> int:
    """Run a keeper; `make` another when its mount is lost. The exit status."""
    status = keeper.run()
    while keeper.lost:
        log.warning("%s: requests were lost, which this kernel cannot deliver again: mounted anew", settings.mountpoint)
        keeper = make(replace(settings, catalog=keeper.catalog))
        keeper.start()
        keeper.entrust()
        status = keeper.run()
    return status


def _announce(fd: int, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError), os.fdopen(fd, "wb") as pipe:  # the starter gave up waiting
        pipe.write(json.dumps(message).encode())


# --- in the foreground ------------------------------------------------------------------------------------------


def kept_by_manager(mountpoint: os.PathLike[str]) -> MountInfo | None:
    """The live mount that is there, if the service manager handed its descriptors to this process.

    What it handed of another, or of one that is dead, is let go of.
    """
    held = manager.stored()
    if not held:
        return None
    path = mounts.resolve(mountpoint)
    info = registry.load(path)
    if info is not None and mounts.is_device(path, info.device) and any(map(connected, _all(held))):
        return info
    manager.release()
    return None


def _all(held: dict[int, list[int]]) -> list[int]:
    return [fd for fds in held.values() for fd in fds]


def foreground(settings: MountSettings) -> tuple[Callable[[], int], MountInfo]:
    """Mount, or go on with what the service manager kept; what looks after it, and its record.

    Raises MountError, CatalogError.
    """
    keeps = Manager.of_this_process()
    info = kept_by_manager(settings.mountpoint)
    if info is not None and (info.dataset, info.root) != (settings.dataset, settings.session.root):
        log.warning("%s: another dataset is to be mounted there; %s is taken away", info.mountpoint, info.origin)
        mounts.unmount(mounts.resolve(settings.mountpoint), lazy=True)
        rescue.end([orphan.pid for orphan in rescue.workers_of(info.device)])
        manager.release()
        info = None
    if info is None:
        keeper = _mounting(settings, "", keeps)
        mounted = keeper.start()
    else:
        keeper, mounted = _resume(settings, info, _all(manager.stored()), keeps)
    keeper.entrust()
    manager.release()
    return (lambda: look_after(keeper, settings, lambda again: _mounting(again, "", keeps))), mounted


def _resume(
    settings: MountSettings, info: MountInfo, held: list[int], keeps: Manager | None
) -> tuple[Keeper, MountInfo]:
    def connect() -> Connection:
        return connection.resumed(info, held, settings.worker_count())

    def let_go() -> None:
        for fd in held:  # while a worker had them too, closing them elsewhere would do nothing
            os.close(fd)

    orphans = rescue.workers_of(info.device)  # their keeper was killed alone
    keeper = Keeper(settings, connect, log_file="", manager=keeps, let_go=let_go)
    keeper.rehearse()
    keeper.begin()
    rescue.end([orphan.pid for orphan in orphans])
    return keeper, keeper.take_over()
