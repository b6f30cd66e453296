"""The keeper: the one process per mount that must not die, and so does next to nothing.

It holds every descriptor of the connection (`connection` says where it has them from) and has workers do the work
(`crew`). Everything a worker needs is imported here before the first fork: its memory is shared, and an upgrade of
the installation under a live mount cannot reach a worker that is forked later. Other code comes in one way only:
another process takes over all that is held here (`succession`, and `heir` for its side of it).

The loop is one poll over: the workers' ends (pidfds), the workers' words, the control socket, and signals. SIGTERM
(and Ctrl-C in the foreground) unmounts; if files are open, they stay readable until closed, and a second signal ends
at once. Where a service manager keeps the descriptors, SIGTERM ends the processes only: the next ones go on.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import selectors
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cachefs import memory
from cachefs.client import AsyncConnection
from cachefs.errors import MountError
from cachefs_sidecar import interrupts, mounts, registry, rescue, standin
from cachefs_sidecar.connection import Connection
from cachefs_sidecar.crew import Crew
from cachefs_sidecar.desk import Desk, Over
from cachefs_sidecar.device import branches
from cachefs_sidecar.fuse import worker
from cachefs_sidecar.fuse.opens import Opens
from cachefs_sidecar.fuse.refs import Refs
from cachefs_sidecar.handover import Estate
from cachefs_sidecar.launching import Installation
from cachefs_sidecar.manager import Manager
from cachefs_sidecar.registry import MountInfo, MountSettings
from cachefs_sidecar.succession import Succession

log = logging.getLogger("cachefs.mount")

# Opening a catalog takes milliseconds; this is for a machine that is starving.
REHEARSAL_SECONDS = 20.0

# How long workers that are to end may take over what they have in hand. What is left then is delivered again; where
# the kernel cannot do that, they have as long as a read may take.
FINISH_SECONDS = 2.0


# The share of what the workers know together of the files that were read: 32 bytes each, up to 32 million files.
REFS_PART, REFS_MOST = 64, 1 << 30


class Keeper:
    """connect: comes by the connection, once signals wait for the loop. log_file: for the record; "" = stderr.

    rooms: other rooms than the real ones, for a test. manager: keeps the descriptors too. lifeline: see standin.
    let_go: called in every worker that is forked before `run`.
    """

    def __init__(
        self,
        settings: MountSettings,
        connect: Callable[[], Connection],
        *,
        log_file: str,
        rooms: worker.Rooms | None = None,
        manager: Manager | None = None,
        lifeline: int = -1,
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._log_file = log_file
        self._mountpoint = mounts.resolve(settings.mountpoint)
        self._rooms = rooms or worker.real_rooms(lambda cache: AsyncConnection(cache, settings.session))
        self._manager = manager
        self._lifeline = lifeline
        self._let_go_first = let_go
        self._selector = selectors.DefaultSelector()
        self._closers = contextlib.ExitStack()
        self._succession: Succession | None = None
        # Stays with this process when it is in the foreground and another keeps the mount.
        self._standing_in: socket.socket | None = None
        self._signals = 0
        self._ours = False
        self._left = False
        self._unmounted = False
        self._status = 0

    # --- the beginning ---

    def start(self) -> MountInfo:
        """Connect and serve; the mount is usable when this returns. Raises MountError, CatalogError."""
        self._rooms.catalog(self._settings.catalog).close()  # a damaged one is said before anything is mounted
        self.rehearse()
        self.begin()
        return self.take_over()

    def rehearse(self) -> list[int]:
        """Connect and have the workers ready to begin; their pids. Raises MountError, CatalogError."""
        with self._closers as closers:
            interrupts.take(self._selector, closers, self._leave)
            connection = self._connection = self._connect()
            closers.callback(os.close, connection.fd)
            self._ours = connection.mounted
            closers.callback(self._unmount_quietly)
            self._rooms.catalog(connection.catalogs[0]).close()
            self._info = self._describe(connection)
            closers.callback(os.close, rescue.leave_settings(self._settings, connection.device))
            closers.callback(self._remove_record)
            closers.callback(self._remove_table)
            self._desk = Desk(
                Path(self._info.control),
                connection.fd,
                self._selector,
                self._rooms,
                list(connection.catalogs),
                connection.counts,
                self._refreshed,
                self._hand_over,
            )
            closers.callback(self._desk.close)
            self._crew = self._hire(connection)
            closers.callback(self._crew.end)
            # What lives now lives on: the collector need not touch (and so copy) the pages shared with the workers.
            gc.collect()
            gc.freeze()
            self._crew.rehearse(REHEARSAL_SECONDS)
            self._closers = closers.pop_all()  # from now on `run` is responsible
        return self._crew.pids

    def begin(self) -> None:
        self._crew.begin()

    def take_over(self) -> MountInfo:
        """Nobody else serves: what was left unanswered is delivered to our workers, and the mount is ours."""
        self._crew.deliver_again()
        self._ours = True
        registry.save(self._info)
        standin.tell(self._lifeline, pid=os.getpid())
        log.info(
            "%s: serving %s, %d workers, %s (%s)",
            self._mountpoint,
            self._settings.origin,
            self._info.workers,
            *self._connection.io,
        )
        return self._info

    def entrust(self) -> None:
        """Have the service manager, if there is one, keep the descriptors too."""
        if self._manager is not None:
            self._manager.store(os.getpid(), self._connection.devices)
            self._manager.ready(f"{self._settings.origin} at {self._mountpoint}")

    def _hire(self, connection: Connection) -> Crew:
        settings = self._settings
        with contextlib.closing(self._rooms.catalog(connection.catalogs[0])) as catalog:
            refs = Refs.of(catalog.summary.last_id, memory.share(REFS_PART, least=0, most=REFS_MOST))
        serving = worker.Serving(
            cache=settings.cache,
            dataset=settings.dataset,
            catalogs=self._desk.catalogs,
            agreement=connection.agreement,
            uid=os.getuid() if settings.uid is None else settings.uid,
            gid=os.getgid() if settings.gid is None else settings.gid,
            rooms=self._rooms,
            opens=connection.opens,
            refs=refs,
        )
        return Crew(
            connection.fd,
            connection.devices,
            self._selector,
            lambda: replace(serving, catalogs=self._desk.catalogs),
            self._let_go,
            resend=connection.agreement.resend,
            shared=connection.shared,
        )

    def _describe(self, connection: Connection) -> MountInfo:
        settings = self._settings
        return MountInfo(
            mountpoint=str(self._mountpoint),
            origin=settings.origin,
            dataset=settings.dataset,
            root=settings.session.root,
            dirs=tuple(str(d) for d in settings.cache.dirs),
            catalog=str(connection.catalogs[0]),
            pid=os.getpid(),
            ticks=registry.start_ticks(os.getpid()),
            control=str(registry.control_path(self._mountpoint, os.getpid())),
            workers=len(connection.devices),
            started=connection.started,
            log=self._log_file,
            notes=settings.notes,
            device=connection.device,
            catalogs=tuple(str(file) for file in connection.catalogs),
            minor=connection.agreement.minor,
            flags=connection.agreement.flags,
            io=connection.io.mode,
            io_why=connection.io.why,
            opens=str(connection.opens or ""),
        )

    def _let_go(self) -> None:
        """In a forked worker: nothing of the keeper's."""
        interrupts.let_go()
        self._selector.close()
        self._desk.let_go()
        if self._lifeline >= 0:
            os.close(self._lifeline)
        self._let_go_first()

    def _refreshed(self, catalogs: Sequence[Path]) -> None:
        files = tuple(str(file) for file in catalogs)
        self._info = replace(self._info, catalog=files[0], catalogs=files)
        registry.save(self._info)

    # --- the loop ---

    @property
    def catalog(self) -> Path:
        """What is served."""
        return self._desk.catalogs[0]

    @property
    def lost(self) -> bool:
        """Whether the mount was given up because requests were lost that nobody can deliver again: mount anew."""
        return self._crew.lost

    def run(self) -> int:
        """Look after the mount until it is gone, lost, or another's; the exit status."""
        self._let_go_first = lambda: None
        with self._closers:
            self._desk.open(self._crew)
            while self._ours and not self._crew.gone and not self._crew.lost:
                for key, _ in self._selector.select(self._timeout()):
                    # An event handled before may have ended what this one is about, and a new worker may have
                    # its number: only the very same registration counts.
                    if self._selector.get_map().get(key.fd) is key:
                        key.data()
                self._crew.look_at_clocks()
                if self._succession is not None:
                    self._succession.look_at_clock()
            if self._crew.lost:
                self._unmount_quietly()  # and the last descriptor that is closed here fails what still waits
            self._unmounted, self._ours = self._ours, False
            if self._succession is not None:
                self._succession.cancel()
        if self.lost:
            return 1
        if self._unmounted:
            log.info("%s: unmounted", self._mountpoint)
            if self._manager is not None:
                self._manager.forget(os.getpid())
            standin.tell(self._lifeline, status=self._status)
        elif self._standing_in is not None:
            return standin.stand_in(self._standing_in)
        return self._status

    def _timeout(self) -> float | None:
        times = [self._crew.timeout(), self._succession.timeout() if self._succession is not None else None]
        return min((seconds for seconds in times if seconds is not None), default=None)

    def _leave(self) -> None:
        self._signals += 1
        if self._signals > 1:
            log.warning("%s: ends at once; files that are open fail", self._mountpoint)
            self._status = 1
            self._crew.end()
            return
        if self._manager is not None and mounts.is_device(self._mountpoint, self._info.device):
            if self._succession is not None:
                self._succession.cancel()
                self._succession = None
            log.info("%s: ends, and leaves the mount to the service manager", self._mountpoint)
            self._crew.close()
            self._crew.finish(self._finish_seconds, self._leave_behind)
            return
        try:
            mounts.unmount(self._mountpoint)
        except MountError as error:
            log.warning("%s", error)
            log.warning("taken out of the tree; open files stay readable. A second signal ends at once")
            self._unmount_quietly()

    def _leave_behind(self) -> None:
        self._ours, self._left = False, True

    def _unmount_quietly(self) -> None:
        """When the mount could not be made whole, or its keeper must end: nothing dead is left behind."""
        if self._ours and mounts.is_device(self._mountpoint, self._connection.device):
            with contextlib.suppress(MountError):
                mounts.unmount(self._mountpoint, lazy=True)

    def _remove_table(self) -> None:
        """Of open files: an heir, or whoever goes on, needs it."""
        if self._connection.opens is not None and (self._ours or self._unmounted):
            Opens.remove(self._connection.opens)

    def _remove_record(self) -> None:
        if not self._left:  # else whoever goes on reads it
            registry.remove(self._info)

    # --- another keeper ---

    @property
    def _finish_seconds(self) -> float:
        return FINISH_SECONDS if self._connection.agreement.resend else self._settings.cache.deadline

    def _hand_over(self, installation: Installation, counts: Mapping[str, int], over: Over) -> None:
        """Raises MountError when it cannot even begin; else `over` is called when it is over."""
        connection = self._connection
        if connection.shared and not connection.agreement.resend:
            raise MountError("on this kernel (Linux before 6.9) the queue that its workers share cannot be handed over")
        devices, shared = branches(connection.fd, len(self._crew.places))
        if self._lifeline < 0 and not self._log_file and self._manager is None:
            self._standing_in, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._lifeline = theirs.detach()
        estate = Estate(
            settings=self._settings,
            info=self._info,
            device=connection.fd,
            devices=devices,
            held=[place.device for place in self._crew.places],
            shared=shared,
            counts=counts,
            lifeline=self._lifeline,
            manager=self._manager.address if self._manager is not None else "",
        )
        heir = self._succession = Succession(
            installation,
            estate,
            self._crew,
            self._selector,
            lambda pid, why: self._succeeded(pid, why, over),
            finish_seconds=self._finish_seconds,
        )
        if self._manager is not None:
            # By this process, because the manager listens to its main process only.
            self._manager.store(heir.pid, devices)

    def _succeeded(self, pid: int, why: str, over: Over) -> None:
        heir, self._succession = self._succession, None
        assert heir is not None
        if pid:
            log.info("%s: process %d keeps it from now on", self._mountpoint, pid)
            self._ours = False
            if self._manager is not None:
                self._manager.forget(os.getpid())
                self._manager.main_is(pid)
            if self._standing_in is not None:
                os.close(self._lifeline)  # the heir's is the only one left, and says when it is gone
        else:
            log.warning("%s: no other keeper (%s); this one goes on", self._mountpoint, why)
            registry.save(self._info)  # the other may have written its own
            if self._manager is not None:
                self._manager.forget(heir.pid)
        over(pid, why)


if __name__ == "__main__":
    from cachefs_sidecar.starting import main

    main()
