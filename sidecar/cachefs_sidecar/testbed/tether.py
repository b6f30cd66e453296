"""A child that dies with its parent, however the parent dies.

The kernel kills the child (PR_SET_PDEATHSIG) when the *thread* that started it ends, so start it from a thread
that lives as long as the child should: the main one. The request is made by a small Python that then becomes
the program: nothing of ours runs between fork and exec, where other threads' locks would be held forever.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO

# 1 is PR_SET_PDEATHSIG, 9 is SIGKILL. A parent that died before the request is noticed by the new parent's pid.
_BECOME = (
    "import ctypes, os, sys; parent = int(sys.argv[1]); ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); "
    "os.getppid() == parent or os._exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


def start_tethered(
    command: Sequence[str],
    *,
    environ: Mapping[str, str] | None = None,
    output: IO[bytes] | int = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` (its first word is an absolute path); its stdout and stderr go to `output`."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=dict(environ) if environ is not None else None,
        pass_fds=tuple(pass_fds),
        process_group=0,  # Ctrl-C is for the program that owns the child; it ends the child when it is done with it
    )
