"""Real mounts for tests: a tree of files, a cache that holds it, its catalog, and ways to mount it.

Run as a program, this is a keeper whose workers ask no fetcher: what is not cached comes from the plain tree, and
names with "hang" in them wait until the file `gate` appears. With `--refuse-after N` the kernel seems to have no
passthrough any more after N files were registered, in whichever process.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cachefs.catalog import Builder, Catalog, changes
from cachefs.client import Located
from cachefs.client.session import Session
from cachefs.config import CacheConfig
from cachefs.digest import dataset_id, version_ref
from cachefs.messages import Entry
from cachefs.store import Reader, Store
from cachefs_sidecar import connection, device, registry, starting
from cachefs_sidecar.fuse import passthrough
from cachefs_sidecar.fuse.worker import Rooms
from cachefs_sidecar.keeper import Keeper
from cachefs_sidecar.logs import set_up_logging
from cachefs_sidecar.registry import MountSettings

# An end "at once" on a machine that does other things too.
AT_ONCE = 20.0


class Dataset:
    """A plain tree in `folder`/plain, and a cache in `folder`/cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plain = folder / "plain"
        self.mountpoint = folder / "mnt"
        for made in (self.plain, self.mountpoint):
            made.mkdir()
        # deadline: longer than AT_ONCE and than a slow machine needs while reads wait, so that none ends by itself.
        self.config = CacheConfig.make([folder / "cache"], min_free=0, idle=1, deadline=100)
        self.root = str(self.plain)
        self.id = dataset_id("file", self.root)
        self.store = Store.open(self.config)
        self.catalog: Path | None = None

    def write(self, files: Mapping[str, bytes], *, cached: bool = True) -> None:
        for name, content in files.items():
            file = self.plain / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            if cached:
                self.store.put(content, links=[(self.id, version_ref(str(file), version(file)))])

    def snapshot(self, name: str = "a") -> Path:
        """A catalog of the tree as it is; of what did not change since the last one, the ids stay."""
        file = self.folder / f"{name}.sqlite"
        previous = Catalog.open(self.catalog) if self.catalog else None
        builder = Builder(file, identity="file", root=self.root, previous=previous)
        for path in sorted(self.plain.rglob("*")):
            info = path.stat()
            if path.is_dir():
                builder.add(Entry(str(path), 0, info.st_mtime_ns, "", directory=True))
            else:
                builder.add(Entry(str(path), info.st_size, info.st_mtime_ns, version(path)))
        builder.seal().close()
        if previous is not None:
            previous.close()
        self.catalog = file
        return file

    def settings(self, **options: Any) -> MountSettings:
        assert self.catalog is not None
        fields: dict[str, Any] = {
            "mountpoint": self.mountpoint,
            "catalog": self.catalog,
            "dataset": self.id,
            "cache": self.config,
            "session": Session("file", {}, {}, root=self.root),
            "origin": f"file://{self.root}",
            **options,
        }
        return MountSettings(**fields)

    def keeper(self, *flags: str, workers: int = 2, **options: Any) -> subprocess.Popen[bytes]:
        """A keeper without a fetcher (see above), as a child; it has mounted when this returns."""
        child = subprocess.Popen(
            [sys.executable, __file__, str(self.folder), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(registry.encode_settings(self.settings(workers=workers, **options)))
        child.stdin.close()
        assert child.stdout.readline() == b"ready\n"
        child.stdout.close()
        return child

    def keeper_in_a_fork(self, **options: Any) -> int:
        """A keeper with the real fetcher in a child of this process, with what a test has patched here; its pid."""
        mounted, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                settings = self.settings(**options)
                keeper = Keeper(settings, lambda: connection.mount(settings), log_file="")
                keeper.start()
                os.write(told, b"1")
                status = keeper.run()
            finally:
                os._exit(status)
        os.close(told)
        assert os.read(mounted, 1) == b"1"
        os.close(mounted)
        return pid


def version(file: Path) -> str:
    info = file.stat()
    return f"{info.st_mtime_ns}-{info.st_size}"


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def drop_pages(file: Path) -> None:
    """Make the kernel ask again for the file's bytes."""
    fd = os.open(file, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


class PlainTree:
    """In place of the fetcher."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def need(self, path: str, **question: Any) -> Located:
        while "hang" in path and not (self.folder / "gate").exists():
            await asyncio.sleep(0.01)
        fd = os.open(path, os.O_RDONLY)
        size = os.fstat(fd).st_size
        return Located(fd, path, size, question["version"], 0, size, 0, False)

    async def close(self) -> None:
        return


def refuse_after(count: int) -> None:
    registered = mmap.mmap(-1, mmap.PAGESIZE)  # shared by all workers
    register = passthrough.register

    def refusing(device: int, fd: int) -> int:
        registered[0] += 1
        if registered[0] > count:
            raise PermissionError(errno.EPERM, "no")
        return register(device, fd)

    passthrough.register = refusing


def main() -> None:
    folder = Path(sys.argv[1])
    set_up_logging()
    if "--refuse-after" in sys.argv:
        refuse_after(int(sys.argv[sys.argv.index("--refuse-after") + 1]))
    rooms = Rooms(Catalog.open, changes, Reader, lambda _: PlainTree(folder))
    settings = registry.decode_settings(sys.stdin.buffer.read())
    resend = "--no-resend" not in sys.argv
    if "--no-clone" in sys.argv:
        device.clone = _refused

    def make(settings: MountSettings) -> Keeper:
        return Keeper(settings, lambda: connection.mount(settings, resend=resend), log_file="", rooms=rooms)

    keeper = make(settings)
    keeper.start()
    print("ready", flush=True)
    sys.exit(starting.look_after(keeper, settings, make))


def _refused(device: int) -> int:
    raise PermissionError(errno.EACCES, "Permission denied")


if __name__ == "__main__":
    main()
