"""How the process of a keeper is started: with which interpreter, code and environment.

A keeper outlives whoever starts it, and its environment can be read by others (/proc): what may be a credential is
left out, and travels through a pipe or a socket instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cachefs
from cachefs.errors import MountError
from cachefs_sidecar.registry import MountSettings

_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)

# What a service manager says to this one process.
_MANAGER = re.compile(r"NOTIFY_SOCKET|LISTEN_PID|LISTEN_FDS|LISTEN_FDNAMES|FDSTORE|WATCHDOG_\w+")


@dataclass(frozen=True)
class Installation:
    """Code to run. python: the interpreter. path: where it finds cachefs, as PYTHONPATH has it."""

    python: str
    path: str


def this_installation() -> Installation:
    roots = [Path(__file__).resolve().parents[1], Path(cachefs.__file__).resolve().parents[1]]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return Installation(sys.executable, os.pathsep.join(dict.fromkeys(filter(None, [*map(str, roots), *given]))))


def launch(
    installation: Installation,
    arguments: Sequence[str],
    settings: MountSettings,
    fd: int,
    *,
    stdin: int = subprocess.DEVNULL,
    stderr: int | IO[Any] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `python -m cachefs_sidecar.keeper ARGUMENTS` in a session of its own; `fd` is inherited.

    Raises MountError.
    """
    try:
        return subprocess.Popen(
            # -P: the current directory is not a place to import from.
            [installation.python, "-P", "-m", "cachefs_sidecar.keeper", *arguments],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=(fd,),
            env=_environ(installation, settings),
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise MountError(f"the keeper cannot be started with {installation.python} ({error.strerror})") from error


def _environ(installation: Installation, settings: MountSettings) -> dict[str, str]:
    captured = set(settings.session.environ)
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in captured and not _SECRET.search(name) and not _MANAGER.fullmatch(name)
    }
    return kept | {"PYTHONPATH": installation.path}
