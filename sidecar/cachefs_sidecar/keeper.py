"""The keeper: the one process per mount that must not die, and so does next to nothing.

It mounts, agrees with the kernel on the protocol, holds every descriptor of the connection, and has workers do the
work (`crew`). Everything a worker needs is imported here before the first fork: its memory is shared, and an upgrade
of the installation under a live mount cannot reach a worker that is forked later.

The loop is one poll over: the workers' ends (pidfds), the workers' words, the control socket, and signals. SIGTERM
(and Ctrl-C in the foreground) unmounts; if files are open, they stay readable until closed, and a second signal ends
at once.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cachefs.client import AsyncConnection
from cachefs.errors import CacheFSError, MountError, to_wire
from cachefs_sidecar import mounts, registry
from cachefs_sidecar.crew import Crew
from cachefs_sidecar.desk import Desk
from cachefs_sidecar.fuse import tracing, worker
from cachefs_sidecar.fuse.negotiation import negotiate
from cachefs_sidecar.registry import MountInfo, MountSettings

log = logging.getLogger("cachefs.mount")

# A log beyond this is put aside when the next keeper opens it.
LOG_BYTES = 10 * 1024 * 1024


class Keeper:
    """log_file: where messages go, for the record; "" = stderr. rooms: other rooms than the real ones, for a test.

    resend: False = do as on a kernel that cannot deliver again.
    """

    def __init__(
        self,
        settings: MountSettings,
        *,
        log_file: str,
        rooms: worker.Rooms | None = None,
        resend: bool = True,
    ) -> None:
        self._settings = settings
        self._log_file = log_file
        self._mountpoint = mounts.resolve(settings.mountpoint)
        self._rooms = rooms or worker.real_rooms(lambda cache: AsyncConnection(cache, settings.session))
        self._resend = resend
        self._selector = selectors.DefaultSelector()
        self._closers = contextlib.ExitStack()
        self._signals = 0
        self._over = False
        self._status = 0

    # --- the beginning ---

    def start(self) -> MountInfo:
        """Mount and start the workers; the mount is usable when this returns. Raises MountError, CatalogError."""
        self._rooms.catalog(self._settings.catalog).close()  # a damaged one is said before anything is mounted
        note = mounts.prepare(self._mountpoint)
        if note:
            log.warning("%s", note)
        settings = self._settings
        with self._closers as closers:
            self._take_signals(closers)
            self._device = mounts.mount(self._mountpoint, source=settings.origin, allow_other=settings.allow_other)
            closers.callback(os.close, self._device)
            closers.callback(self._unmount_quietly)
            agreement = negotiate(self._device)
            if not mounts.raise_read_ahead(self._mountpoint):
                log.info("the kernel reads at most 128 KiB ahead; only root may raise that")
            self._info = self._describe()
            self._desk = Desk(
                Path(self._info.control),
                self._device,
                self._selector,
                self._rooms,
                [settings.catalog],
                self._refreshed,
            )
            closers.callback(self._desk.close)
            closers.callback(lambda: registry.remove(self._info))
            serving = worker.Serving(
                cache=settings.cache,
                dataset=settings.dataset,
                catalogs=self._desk.catalogs,
                agreement=agreement,
                uid=os.getuid() if settings.uid is None else settings.uid,
                gid=os.getgid() if settings.gid is None else settings.gid,
                rooms=self._rooms,
            )
            self._crew = Crew(
                self._device,
                settings.worker_count(),
                self._selector,
                lambda: replace(serving, catalogs=self._desk.catalogs),
                self._let_go,
                resend=agreement.resend and self._resend,
            )
            closers.callback(self._crew.end)
            # What lives now lives on: the collector need not touch (and so copy) the pages shared with the workers.
            gc.collect()
            gc.freeze()
            self._crew.start()
            registry.save(self._info)
            self._closers = closers.pop_all()  # from now on `run` is responsible
        log.info("%s: mounted %s, %d workers", self._mountpoint, settings.origin, settings.worker_count())
        return self._info

    def _unmount_quietly(self) -> None:
        """When the mount could not be made whole, or its keeper must end: nothing dead is left behind."""
        if self._over:
            return  # what is mounted there now is another's
        present = mounts.mounted_at(self._mountpoint)
        if present is not None and present.fstype == mounts.FSTYPE and present.source == self._settings.origin:
            with contextlib.suppress(MountError):
                mounts.unmount(self._mountpoint, lazy=True)

    def _describe(self) -> MountInfo:
        path = registry.folder() / f"{registry.name_of(self._mountpoint)}-{os.getpid()}.sock"
        settings = self._settings
        return MountInfo(
            mountpoint=str(self._mountpoint),
            origin=settings.origin,
            dataset=settings.dataset,
            root=settings.session.root,
            dirs=tuple(str(d) for d in settings.cache.dirs),
            catalog=str(settings.catalog),
            pid=os.getpid(),
            ticks=registry.start_ticks(os.getpid()),
            control=str(path),
            workers=settings.worker_count(),
            started=time.time(),
            log=self._log_file,
            notes=settings.notes,
        )

    def _let_go(self) -> None:
        """In a forked worker: signals as they come, and nothing of the keeper's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # In the foreground Ctrl-C reaches every process; the keeper unmounts, and that ends the workers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._selector.close()
        self._desk.let_go()

    def _refreshed(self, catalog: Path) -> None:
        self._info = replace(self._info, catalog=str(catalog))
        registry.save(self._info)

    # --- the loop ---

    def run(self) -> int:
        """Look after the mount until it is gone; the exit status."""
        with self._closers:
            self._desk.open(self._crew)
            while not self._crew.gone:
                for key, _ in self._selector.select(self._crew.timeout()):
                    # An event handled before may have ended what this one is about, and a new worker may have
                    # its number: only the very same registration counts.
                    if self._selector.get_map().get(key.fd) is key:
                        key.data()
                self._crew.look_at_clocks()
            self._over = True
        log.info("%s: unmounted", self._mountpoint)
        return self._status

    def _take_signals(self, closers: contextlib.ExitStack) -> None:
        """From here on SIGTERM and Ctrl-C wait for the loop: to die of one would leave a dead mount behind."""
        wake, wakened = socket.socketpair()
        for end in (wake, wakened):
            end.setblocking(False)
            closers.enter_context(end)
        for number in (signal.SIGTERM, signal.SIGINT):
            closers.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        signal.set_wakeup_fd(wakened.fileno(), warn_on_full_buffer=False)
        closers.callback(signal.set_wakeup_fd, -1)
        self._selector.register(wake, selectors.EVENT_READ, lambda: self._signalled(wake))

    def _signalled(self, wake: socket.socket) -> None:
        for number in wake.recv(64):
            if number in (signal.SIGTERM, signal.SIGINT):
                self._signals += 1
                self._leave()

    def _leave(self) -> None:
        if self._signals > 1:
            log.warning("%s: ends at once; files that are open fail", self._mountpoint)
            self._status = 1
            self._crew.end()
            return
        try:
            mounts.unmount(self._mountpoint)
        except MountError as error:
            log.warning("%s", error)
            log.warning("taken out of the tree; open files stay readable. A second signal ends at once")
            self._unmount_quietly()


# --- the detached process -------------------------------------------------------------------------------------


def open_log(settings: MountSettings) -> str:
    """Direct stdout and stderr into the mount's log file; its path.

    In the cache's home; where that cannot be written, with the records of mounts.
    """
    name = f"mount-{registry.name_of(mounts.resolve(settings.mountpoint))}.log"
    for folder in (settings.cache.home / "run", registry.folder()):
        file = folder / name
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if file.exists() and file.stat().st_size > LOG_BYTES:
                file.replace(file.with_suffix(".log.1"))
            fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError:
            continue
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
        return str(file)
    raise MountError(f"{registry.folder()}: no log can be written there, nor in {settings.cache.home}/run")


def set_up_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    handler.addFilter(_Bounded())
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if tracing.wanted() else logging.INFO)
    log.propagate = False


class _Bounded(logging.Filter):
    """At most so many lines per period: an origin that is down would fill the disk with one line per read."""

    LINES, SECONDS = 200, 10.0

    def __init__(self) -> None:
        super().__init__()
        self._since = 0.0
        self._lines = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True  # whoever wants a trace wants all of it
        now = time.monotonic()
        if now - self._since > self.SECONDS:
            self._since, self._lines = now, 0
        self._lines += 1
        if self._lines == self.LINES:
            record.msg, record.args = "%s (more lines are left out for some seconds)", (record.getMessage(),)
        return self._lines <= self.LINES


def main() -> None:
    """`python -m cachefs_sidecar.keeper --announce FD`: settings on stdin, "ready" or an error as JSON on FD."""
    parser = argparse.ArgumentParser(description="Keeps one cachefs mount; started by `cachefs mount`.")
    parser.add_argument("--announce", type=int, required=True)
    announce = parser.parse_args().announce
    os.set_inheritable(announce, False)
    packed = sys.stdin.buffer.read()
    if os.fork() != 0:
        os._exit(0)  # whoever started this reaps it; the keeper is init's child
    sys.exit(_keep(packed, announce))


def _keep(packed: bytes, announce: int) -> int:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    set_up_logging()
    try:
        settings = registry.decode_settings(packed)
        keeper = Keeper(settings, log_file=open_log(settings))
        keeper.start()
    except CacheFSError as error:
        _announce(announce, {"error": to_wire(error)})
        return 1
    except Exception as error:
        log.exception("the mount could not be made")
        _announce(announce, {"error": to_wire(error)})
        raise
    _announce(announce, {"ready": True})
    return keeper.run()


def _announce(fd: int, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError), os.fdopen(fd, "wb") as pipe:  # the starter gave up waiting
        pipe.write(json.dumps(message).encode())


if __name__ == "__main__":
    main()
