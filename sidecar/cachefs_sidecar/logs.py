"""Where the messages of a mount go: into its log, or to stderr where its keeper stays in the foreground."""

from __future__ import annotations

import logging
import os
import sys
import time

from cachefs.errors import MountError
from cachefs_sidecar import mounts, registry
from cachefs_sidecar.fuse import tracing
from cachefs_sidecar.registry import MountSettings

# A log beyond this is put aside when the next keeper opens it.
LOG_BYTES = 10 * 1024 * 1024


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
    for name in ("cachefs.mount", "cachefs.client"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if tracing.wanted() else logging.INFO)
        logger.propagate = False


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
