"""The ways to read the demo's dataset, each as a user would write it, picklable for spawned loader workers.

A reader is made where it is used: file system clients are created by the first read in each worker.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol


class Reader(Protocol):
    """Names of the dataset, and the bytes of one of them. `caches`: whether a second read should cost nothing."""

    @property
    def title(self) -> str: ...

    @property
    def caches(self) -> bool: ...

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes: ...


@dataclass(frozen=True)
class UrlReader:
    """Through fsspec: protocol and options as given to `fsspec.filesystem`."""

    title: str
    caches: bool
    root: str
    protocol: str
    options: Mapping[str, Any] = field(repr=False)  # credentials are in it

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        return fsspec.filesystem(self.protocol, **self.options)

    def names(self) -> list[str]:
        return [path.removeprefix(f"{self.root}/") for path in self._fs.find(self.root)]

    def read(self, name: str) -> bytes:
        data: bytes = self._fs.cat_file(f"{self.root}/{name}")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_fs"}


@dataclass(frozen=True)
class FileReader:
    """Plain files below a directory: a mount, or the local disk."""

    title: str
    caches: bool
    root: str

    def names(self) -> list[str]:
        below = [os.path.join(folder, file) for folder, _, files in os.walk(self.root) for file in files]
        return [os.path.relpath(path, self.root) for path in below]

    def read(self, name: str) -> bytes:
        with open(os.path.join(self.root, name), "rb") as file:
            return file.read()


class WrongBytes(Exception):
    """What was read is not what is stored at the origin."""


class NoMount(Exception):
    """This machine does not mount; the text says why."""


@contextmanager
def mounted(url: str, mountpoint: Path, cache_dir: Path, options: Mapping[str, Any]) -> Iterator[None]:
    """`cachefs mount URL MOUNTPOINT` for the length of the block. Raises NoMount with the command's own words."""
    # Credentials go where every S3 tool looks for them, and not into arguments that `ps` shows.
    environ = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": options["key"],
        "AWS_SECRET_ACCESS_KEY": options["secret"],
        "AWS_ENDPOINT_URL": options["endpoint_url"],
        "AWS_REGION": options["client_kwargs"]["region_name"],
    }
    mountpoint.mkdir()
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise NoMount(f"/dev/fuse: {error.strerror}") from error
    done = _command("mount", url, str(mountpoint), "--cache-dir", str(cache_dir), environ=environ)
    if done.returncode:
        raise NoMount(_last_line(done))
    try:
        yield
    finally:
        done = _command("umount", str(mountpoint), environ=environ)
        if done.returncode and os.path.ismount(mountpoint):
            raise RuntimeError(f"cachefs umount {mountpoint}: {_last_line(done)}")


def _command(*arguments: str, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cachefs_sidecar", *arguments]
    return subprocess.run(command, env=dict(environ), capture_output=True, text=True, check=False)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"status {done.returncode}"
