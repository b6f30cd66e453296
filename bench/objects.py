"""Objects that all take the same room on the disk, so that one knows exactly how many of them a cache holds."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from bench.stage import FILES_PER_FOLDER, Stage
from cachefs.digest import content_key

# Small, so that an epoch of many takes seconds. All take 32 KiB: disks give room in pieces of 4 KiB.
SMALLEST, LARGEST = 28_673, 32_768
MEAN = (SMALLEST + LARGEST) / 2
ON_DISK = 32_768

# In a bucket of their own.
BUCKET = "equals"


def make_objects(
    stage: Stage, count: int, bucket: str = BUCKET, smallest: int = SMALLEST, largest: int = LARGEST
) -> tuple[Path, Path]:
    """`count` of them, made once for all scenarios: the folder that they are in, and their manifest."""
    folder, manifest = stage.storage / bucket, stage.folder / f"{bucket}.json"
    if not manifest.exists():
        dice = random.Random(count)
        keys: dict[str, str] = {}
        for number in range(count):
            name = f"{number // FILES_PER_FOLDER:04d}/{number:08d}.jpg"
            data = dice.randbytes(dice.randint(smallest, largest))
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            keys[name] = content_key(data).hex()
        manifest.write_text(json.dumps(keys))
        os.sync()  # the disk is not still busy with them when the first clock starts
    return folder, manifest
