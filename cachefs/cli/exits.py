"""Exit codes, and how an error reaches the person at the terminal: one or two lines, never a traceback.

Scripts read the code, people read the line. CACHEFS_DEBUG=1 adds the traceback for a report to the developers.
"""

from __future__ import annotations

import os
import sys
import traceback

from cachefs.cli.output import complain
from cachefs.errors import CacheFSError, ConfigError, OriginError, PlanError, UnsupportedOrigin

OK = 0
FAILURES = 1
USAGE = 2
ORIGIN = 3
CACHE = 4
INTERNAL = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

EXIT_CODES = """Exit codes: 0 done; 1 done, but something failed on the way (damaged blobs, objects that were not
warmed, a failed check of doctor, a node of the cluster that does not answer); 2 wrong usage or bad input; 3 the
origin is unreachable, refuses the credentials or has no such object; 4 the cache, its fetcher or the mount point
cannot be used; 70 a defect of cachefs; 130 interrupted with Ctrl-C."""


class Unfinished(Exception):
    """Leave with this exit code; everything has been said. Never leaves the command line."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def code_of(error: CacheFSError) -> int:
    """The exit code for an error of cachefs."""
    if isinstance(error, (ConfigError, PlanError, UnsupportedOrigin)):
        return USAGE
    if isinstance(error, OriginError):
        return ORIGIN
    return CACHE


def report(error: BaseException) -> int:
    """Say what went wrong on stderr; the exit code for it."""
    if debugging():
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, CacheFSError):
        complain(error.message)
        return code_of(error)
    if isinstance(error, OSError) and error.strerror:
        complain(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
        return CACHE
    complain(f"internal error: {type(error).__name__}: {error}")
    complain("please report it, with what the same command prints after: export CACHEFS_DEBUG=1")
    return INTERNAL


def debugging() -> bool:
    return os.environ.get("CACHEFS_DEBUG", "") not in ("", "0")
