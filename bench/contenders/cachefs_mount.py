"""This project's mount: once as it is by default, once with every open passed through to the local file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from bench.contenders.contender import Folder
from cachefs_sidecar.testbed import fetcher_pid, stop_fetcher

COMMAND_SECONDS = 120.0


class Mount(Folder):
    title = "cachefs mount"
    settings = "cachefs mount URL POINT --cache-dir DIR [--size LIMIT]"
    bounded = True
    io = "open-free"

    @contextmanager
    def running(self, environ: Mapping[str, str]) -> Iterator[Sequence[int]]:
        self.point.mkdir(parents=True, exist_ok=True)
        home = self.folder / "cache"
        size = ["--size", str(self.place.limit)] if self.place.limit else []
        how = ["--io", self.io] if knows_io() else []
        url = f"s3://{self.place.root}"
        try:
            mounted = command(environ, "mount", url, str(self.point), "--cache-dir", str(home), "--json", *size, *how)
            keeper = json.loads(mounted)["pid"]
            workers = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
            yield [keeper, *map(int, workers), *filter(None, [fetcher_pid(home)])]
        finally:
            if self.point.is_mount():
                command(environ, "umount", str(self.point))
            stop_fetcher(home)


class Passthrough(Mount):
    title = "cachefs mount, passthrough"
    settings = "cachefs mount --io passthrough, else the same"
    io = "passthrough"

    @classmethod
    def missing(cls) -> str:
        return "" if knows_io() else "this version of `cachefs mount` has no --io"


@cache
def knows_io() -> bool:
    asked = [sys.executable, "-m", "cachefs_sidecar", "mount", "--help"]
    return "--io" in subprocess.run(asked, capture_output=True, text=True, check=False).stdout


def command(environ: Mapping[str, str], *arguments: str) -> str:
    """What `cachefs` prints. Raises RuntimeError with its complaint."""
    words = [sys.executable, "-m", "cachefs_sidecar", *arguments]
    # Apart from Ctrl-C, which is for the bench: what a mount starts outlives it, and only what is whole can be undone.
    with subprocess.Popen(
        words, env=dict(environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            printed, said = process.communicate(timeout=COMMAND_SECONDS)
        except KeyboardInterrupt:
            process.communicate(timeout=COMMAND_SECONDS)
            raise
        except subprocess.TimeoutExpired:
            process.kill()
            raise RuntimeError(f"cachefs {arguments[0]} did not end within {COMMAND_SECONDS:g} s") from None
    if process.returncode:
        raise RuntimeError(f"cachefs {arguments[0]}: {(said or printed).strip()}")
    return printed
