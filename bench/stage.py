"""What scenarios play on: files, an S3 server that serves them, caches, mounts. All of it is taken away again.

Everything lives in one temporary directory, on one disk, and in processes that end with the blocks below: after the
end, after Ctrl-C and after a failure nothing is left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bench import machine
from cachefs.digest import content_key
from cachefs_sidecar.testbed import S3Server, Throttle, fetcher_pid, stop_fetcher
from cachefs_sidecar.testbed.server import s3_options

BUCKET = "photographs"
ROOT = f"{BUCKET}/train"

# One large object, in a bucket of its own.
SHARDS, SHARD = "shards", "shard.bin"

# In which it is made and read from one end to the other, and what a reader of single records reads, in bytes.
STRETCH, RECORD = 1 << 20, 4096

# Bytes of a file, as ImageNet's are (mean 110 KB).
SMALLEST, LARGEST = 60_000, 160_000

FILES_PER_FOLDER = 1000

# Linux waits two seconds after memory was freed before it tells the host (mm/page_reporting.c), and two more when it
# then finds that others were freed meanwhile.
REST_SECONDS = 4.2

RECORDS_IN_STRETCH = 4

# ext4 does not give an inode away for some minutes after it was deleted and looks at each such inode of a block group
# whenever it makes a file there, which costs four times the making. The caches of one round and those of the next must
# not meet there. With this attribute (chattr +T) it puts each folder below into a group of its own, as it does with
# those at the top of a disk, which is where caches are.
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_TOPDIR_FL = 0x80086601, 0x40086602, 0x00020000

# A command that takes longer hangs.
COMMAND_SECONDS = 120.0

# Settings of whoever runs this must not change what it shows.
FOREIGN = ("AWS_", "CACHEFS_", "FSSPEC_", "S3FS_")


class Unusable(Exception):
    """The machine lacks something; the text says what to do."""


@dataclass(frozen=True)
class Mounted:
    """A live mount. pids: the keeper's and its workers'; the fetcher's is asked for when it matters. io: its mode."""

    point: Path
    home: Path
    keeper: int
    workers: list[int]
    io: str

    @property
    def fetcher(self) -> int | None:
        return fetcher_pid(self.home)

    @property
    def cpu_seconds(self) -> float:
        """Of the keeper and the workers so far."""
        return sum(map(machine.cpu_seconds, (self.keeper, *self.workers)))


@dataclass(frozen=True)
class Stage:
    """folder: temporary, on the disk that is measured. step: called with what was just done."""

    folder: Path
    stack: ExitStack = field(repr=False)
    step: Callable[[str], None] = field(repr=False, default=lambda _: None)

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    @property
    def manifest(self) -> Path:
        """name -> content key (hex) of every file below ROOT."""
        return self.folder / "manifest.json"

    @cached_property
    def server(self) -> S3Server:
        """The S3 server, which has read every directory once: that is not what is measured."""
        return self.stack.enter_context(S3Server(self.storage, dir_cache=3600))

    def throttle(self, latency: float) -> Throttle:
        return self.stack.enter_context(Throttle(self.server.port, latency=latency))

    def s3(self, port: int | None = None) -> dict[str, Any]:
        """Options for s3fs and cachefs. port: of a throttle before the server."""
        options = self.server.options
        return s3_options(f"http://127.0.0.1:{port or self.server.port}", options["key"], options["secret"])

    @property
    def environ(self) -> dict[str, str]:
        """For everything that is started: no settings but these."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        return own | {
            "CACHEFS_MIN_FREE": "0",  # room was looked for at the start
            "CACHEFS_RUNTIME_DIR": str(self.folder / "runtime"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_files(self, count: int) -> None:
        """`count` files as large as training images are, of bytes that do not compress, the same in every run."""
        dice = random.Random(count)
        keys: dict[str, str] = {}
        for number in range(count):
            name = f"{number // FILES_PER_FOLDER:04d}/{number:08d}.jpg"
            data = dice.randbytes(dice.randint(SMALLEST, LARGEST))
            file = self.storage / ROOT / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            keys[name] = content_key(data).hex()
        self.manifest.write_text(json.dumps(keys))
        os.sync()  # the disk is not still busy with them when the first clock starts

    def make_shard(self, size: int) -> tuple[Path, Path]:
        """A large object of bytes that do not compress, the same in every run. Two manifests of it, which name pieces
        by where they begin: of all its stretches, and of some thousand records."""
        dice = random.Random(size)
        file = self.storage / SHARDS / SHARD
        file.parent.mkdir(parents=True, exist_ok=True)
        stretches: dict[str, str] = {}
        records: dict[str, str] = {}
        with file.open("wb") as out:
            for start in range(0, size, STRETCH):
                data = dice.randbytes(min(STRETCH, size - start))
                out.write(data)
                stretches[str(start)] = content_key(data).hex()
                for at in sorted(dice.sample(range(0, len(data), RECORD), RECORDS_IN_STRETCH)):
                    records[str(start + at)] = content_key(data[at : at + RECORD]).hex()
        os.sync()
        manifests = self.folder / "stretches.json", self.folder / "records.json"
        for manifest, keys in zip(manifests, (stretches, records), strict=True):
            manifest.write_text(json.dumps(keys))
        return manifests

    @staticmethod
    def rest() -> None:
        """Wait until nothing was freed for a while; called before what is in memory is dropped for a turn.

        A virtual machine gives free memory back to its host some seconds after it was freed (free page reporting), and
        who touches it next waits for the host: 1 GiB from the disk at 800 MB/s instead of 2,100. Turns that last as
        long as that, one after another, have it always hit the same contender. What is dropped after a rest stays with
        the machine for the turn that follows.
        """
        time.sleep(REST_SECONDS)

    def forget_pages(self) -> None:
        """Take the files out of the page cache: who reads them next, reads them from the disk."""
        for file in self._files():
            forget_pages(file)

    def forget_below(self, *folders: Path) -> None:
        """The same for everything below some folders, of a cache or of a mount."""
        for folder in folders:
            for at, _, names in os.walk(folder):
                for name in names:
                    forget_pages(Path(at, name))

    def write_again(self) -> None:
        """The same files with the same bytes and times, just written."""
        for file in self._files():
            info, data = file.stat(), file.read_bytes()
            forget_pages(file)
            with file.open("r+b") as out:
                out.write(data)
            os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
        os.sync()

    def _files(self) -> Iterator[Path]:
        return (file for file in (self.storage / ROOT).rglob("*") if file.is_file())

    # --- ways to read, for bench.reader ---

    def way(self, kind: str, **details: Any) -> dict[str, Any]:
        return {"kind": kind, "manifest": str(self.manifest), **details}

    def native(self) -> dict[str, Any]:
        return self.way("files", root=str(self.storage / ROOT))

    def obstore(self, port: int, readers: int) -> dict[str, Any]:
        options = {
            "bucket": BUCKET,
            "prefix": ROOT.partition("/")[2],
            "config": {
                "endpoint": f"http://127.0.0.1:{port}",
                "access_key_id": self.server.options["key"],
                "secret_access_key": self.server.options["secret"],
                "region": "us-east-1",
                "virtual_hosted_style_request": False,
            },
        }
        return self.way("obstore", options=options, readers=readers)

    # --- caches and mounts ---

    @contextmanager
    def cache(self) -> Iterator[Path]:
        """The home of a cache that is not yet made; its fetcher ends with the block.

        Its files stay until the end, else the next cache would meet their inodes: see FS_TOPDIR_FL.
        """
        home = Path(tempfile.mkdtemp(prefix="cache-", dir=self.folder))
        try:
            yield home
        finally:
            stop_fetcher(home)

    @contextmanager
    def mounted(
        self, url: str, home: Path, port: int | None = None, *, io: str = "auto", options: Sequence[str] = ()
    ) -> Iterator[Mounted]:
        """`cachefs mount URL`, by the real command. port: of a throttle before the server. io: the mode asked
        for. options: further ones.
        """
        point = Path(tempfile.mkdtemp(prefix="mount-", dir=self.folder))
        try:
            told = json.loads(self.command(*self.mount_command(url, point, home), "--io", io, *options, port=port))
            workers = [int(pid) for pid in _children(told["pid"])]
            yield Mounted(point, home, told["pid"], workers, told["io"])
        finally:
            if point.is_mount():
                self.command("umount", str(point), port=port)
            point.rmdir()

    def mount_command(self, url: str, point: Path, home: Path) -> list[str]:
        return ["mount", url, str(point), "--cache-dir", str(home), "--json"]

    def command(self, *arguments: str, port: int | None = None) -> str:
        """What `cachefs` prints. Credentials go where every S3 tool looks for them. Raises RuntimeError."""
        options = self.s3(port)
        environ = {
            **self.environ,
            "AWS_ACCESS_KEY_ID": options["key"],
            "AWS_SECRET_ACCESS_KEY": options["secret"],
            "AWS_ENDPOINT_URL": options["endpoint_url"],
            "AWS_REGION": options["client_kwargs"]["region_name"],
        }
        with subprocess.Popen(
            [sys.executable, "-m", "cachefs_sidecar", *arguments],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C is for us
        ) as command:
            try:
                printed, said = command.communicate(timeout=COMMAND_SECONDS)
            except KeyboardInterrupt:
                # What it starts outlives it: only what is whole can be taken away again.
                command.communicate(timeout=COMMAND_SECONDS)
                raise
            except subprocess.TimeoutExpired:
                command.kill()
                raise RuntimeError(f"cachefs {arguments[0]} did not end within {COMMAND_SECONDS:g} s") from None
        if command.returncode:
            raise RuntimeError(f"cachefs {arguments[0]}: {(said or printed).strip()}")
        return printed


@contextmanager
def stage(parent: Path | None, needed: int, step: Callable[[str], None]) -> Iterator[Stage]:
    """A stage in a temporary directory below `parent`. needed: bytes. Raises Unusable."""
    parent = parent or Path(tempfile.gettempdir())
    _require(parent, needed)
    folder = Path(tempfile.mkdtemp(prefix="cachefs-bench-", dir=parent))
    _spread(folder)
    try:
        with ExitStack() as stack:
            yield Stage(folder, stack, step)
    finally:
        unmount_below(folder)
        while folder.exists():
            with contextlib.suppress(FileNotFoundError):  # a daemon that ends still removes what it kept there
                shutil.rmtree(folder)


@contextmanager
def part(whole: Stage) -> Iterator[Stage]:
    """The stage for one scenario: what it starts ends with it."""
    with ExitStack() as stack:
        yield replace(whole, stack=stack)


def unmount_below(folder: Path) -> None:
    """Whatever a command that was cut short left mounted there: removing the folder must not reach through it."""
    for row in Path("/proc/self/mounts").read_text().splitlines():
        point = row.split()[1]
        if point.startswith(f"{folder}/"):
            tool = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
            subprocess.run([*tool, point], check=True)


def forget_pages(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _spread(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flags = struct.unpack("l", fcntl.ioctl(fd, FS_IOC_GETFLAGS, struct.pack("l", 0)))[0]
        with contextlib.suppress(OSError):  # a file system without the attribute
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", flags | FS_TOPDIR_FL))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)


def _require(parent: Path, needed: int) -> None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise Unusable(f"/dev/fuse: {error.strerror}; `cachefs doctor` says what to do about it") from error
    if machine.file_system(parent) in ("tmpfs", "ramfs"):
        raise Unusable(f"{parent}: is in memory; name a directory on the disk to measure with --folder")
    if (free := shutil.disk_usage(parent).free) < needed:
        raise Unusable(f"{parent}: {needed >> 20} MiB are needed and {free >> 20} free; name another with --folder")


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def credentials(options: Mapping[str, Any]) -> dict[str, Any]:
    """fsspec options of a cachefs file system for the stage's server."""
    return {"target_protocol": "s3", "target_options": dict(options)}
