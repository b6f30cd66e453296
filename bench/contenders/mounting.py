"""A program that serves a mount in the foreground: started, waited for, taken away again."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cachefs_sidecar.testbed.tether import start_tethered

MOUNT_SECONDS = 60.0
END_SECONDS = 10.0


@contextmanager
def served(command: Sequence[str], point: Path, environ: Mapping[str, str]) -> Iterator[int]:
    """Yields the pid of the program once `point` is mounted. Raises RuntimeError with its complaint."""
    point.mkdir(parents=True, exist_ok=True)
    log = point.parent / "log"
    with log.open("ab") as output:
        process = start_tethered(command, environ=environ, output=output)
    try:
        deadline = time.monotonic() + MOUNT_SECONDS
        while not point.is_mount():
            if process.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(errors="replace").strip().splitlines() or ["no word"]
                raise RuntimeError(f"{Path(command[0]).name} does not mount: {lines[-1]}")
            time.sleep(0.005)
        yield process.pid
    finally:
        if point.is_mount():
            unmount(point)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def unmount(point: Path) -> None:
    tool = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    if subprocess.run([*tool, str(point)], capture_output=True, check=False).returncode:
        subprocess.run([*tool, "-l" if os.geteuid() == 0 else "-z", str(point)], capture_output=True, check=False)


def program(name: str) -> str:
    """Where it is; "" when it is not installed."""
    return shutil.which(name) or ""
