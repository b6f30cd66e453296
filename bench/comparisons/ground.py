"""What contenders meet on: datasets at an origin behind a shaped line, and a folder for each on the same disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench.contenders import Contender, Place
from bench.contenders.formats import Format
from bench.plan import Plan
from bench.stage import Stage, unmount_below
from cachefs.digest import content_key
from cachefs_sidecar.testbed import Throttle, make_photographs

BUCKET = "images"

# Storage in another region, as in the demonstration: a round trip, and what one connection gives.
LATENCY = 0.02
PER_CONNECTION = 20 * 1024 * 1024


@dataclass(frozen=True)
class Dataset:
    """files: the folder behind the origin. manifest: a file, name -> content key (hex). bytes: of all."""

    bucket: str
    prefix: str
    files: Path
    manifest: Path

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(json.loads(self.manifest.read_bytes()))

    @cached_property
    def bytes(self) -> int:
        return sum((self.files / name).stat().st_size for name in self.names)


@dataclass(frozen=True)
class Ground:
    """One comparison's. What it starts ends with the stage's block; datasets stay for the next comparison."""

    stage: Stage
    plan: Plan

    @cached_property
    def line(self) -> Throttle:
        """The way to the origin. Its account is the truth about what was read there."""
        throttle = Throttle(
            self.stage.server.port, latency=LATENCY, bandwidth_per_connection=PER_CONNECTION, mend_ranges=True
        )
        return self.stage.stack.enter_context(throttle)

    @property
    def shape(self) -> str:
        return (
            f"origin: S3 server (rclone) on this machine behind a line of {LATENCY * 1000:.0f} ms per request "
            f"and {PER_CONNECTION >> 20} MiB/s per connection"
        )

    @cached_property
    def home(self) -> str:
        """For what libraries leave behind. Its path is short: sockets lie in it, whose paths have 107 bytes at most."""
        return self.stage.stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True))

    @property
    def environ(self) -> dict[str, str]:
        """For whatever reads: no settings but these, and no home but one that is taken away."""
        return self.stage.environ | {
            "HOME": self.home,
            "TMPDIR": self.home,
            "LITDATA_DISABLE_VERSION_CHECK": "1",
            "DISABLE_LITDATA_ENHANCED_LOGGING": "1",
            "OMP_NUM_THREADS": "1",
        }

    def prepare(self, contender: type[Contender], dataset: Dataset) -> None:
        """Have the dataset in the contender's form. Before the server runs: it believes the folders that it has read.

        Raises RuntimeError.
        """
        target = self.stage.storage / dataset.bucket / _prefix(contender, dataset)
        if issubclass(contender, Format) and not target.exists():
            self._convert(f"{contender.__module__}:{contender.__name__}", dataset.files, target)

    def _convert(self, contender: str, files: Path, target: Path) -> None:
        unfinished = self.stage.folder / f"unfinished-{target.name}"
        words = [sys.executable, "-m", "bench.contenders.convert", contender, str(files), str(unfinished)]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(words, cwd=root, env=self.environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"converting: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
        unfinished.rename(target)

    def place(self, contender: type[Contender], dataset: Dataset, limit: int = 0) -> Place:
        """A place of its own, empty. limit: bytes of its cache."""
        places = self.stage.folder / "places"
        places.mkdir(exist_ok=True)
        options = self.stage.server.options
        return Place(
            folder=tempfile.mkdtemp(prefix=f"{contender.form}-", dir=places),
            source=str(self.stage.storage / dataset.bucket),
            endpoint=self.line.endpoint,
            key=options["key"],
            secret=options["secret"],
            bucket=dataset.bucket,
            prefix=_prefix(contender, dataset),
            limit=limit,
        )

    def clear(self) -> None:
        """Take all places away."""
        places = self.stage.folder / "places"
        unmount_below(places)
        shutil.rmtree(places, ignore_errors=True)

    # --- datasets ---

    def photographs(self) -> Dataset:
        """Real JPEGs of 60 to 160 KB."""
        files, manifest = self._room("train")
        if not manifest.exists():
            made = make_photographs(files, self.plan.photographs)
            self._write(manifest, {photograph.name: photograph.key.hex() for photograph in made})
        return Dataset(BUCKET, "train", files, manifest)

    def blobs(self, prefix: str, count: int, size: int) -> Dataset:
        """`count` files of `size` random bytes."""
        files, manifest = self._room(prefix)
        if not manifest.exists():
            dice = random.Random(prefix)
            keys: dict[str, str] = {}
            for number in range(count):
                name = f"{number // 1000:03d}/{number:06d}.bin"
                data = dice.randbytes(size)
                (files / name).parent.mkdir(parents=True, exist_ok=True)
                (files / name).write_bytes(data)
                keys[name] = content_key(data).hex()
            self._write(manifest, keys)
        return Dataset(BUCKET, prefix, files, manifest)

    def _room(self, prefix: str) -> tuple[Path, Path]:
        files = self.stage.storage / BUCKET / prefix
        files.mkdir(parents=True, exist_ok=True)
        return files, self.stage.folder / f"{prefix}.json"

    def _write(self, manifest: Path, keys: Mapping[str, str]) -> None:
        manifest.write_text(json.dumps(keys))
        os.sync()  # the disk is not still busy with them when the first clock starts


def _prefix(contender: type[Contender], dataset: Dataset) -> str:
    """Where the dataset is in the contender's form."""
    return f"{contender.form}-{dataset.prefix}" if issubclass(contender, Format) else dataset.prefix


def forget_pages(contender: Contender) -> None:
    """Take what a contender keeps out of the page cache: what it reads next comes from the disk."""
    os.sync()  # pages that are not yet on the disk stay
    for folder in contender.kept_in():
        for file in folder.rglob("*"):
            if file.is_file() and not file.is_symlink():
                fd = os.open(file, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
