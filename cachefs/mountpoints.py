"""Which mount a path belongs to: the records that each mount's keeper leaves in the runtime directory, read.

The mounts themselves live in a higher room (`cachefs_sidecar.registry` writes the records). A training process that
gives hints by path needs to know from here which cache and which dataset are behind that path.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachefs.config import runtime_dir


@dataclass(frozen=True)
class Mount:
    """A mount of this user. redacted: what its origin takes besides credentials (protocol, options, environ).

    root: the dataset's, an object path. dirs: the cache's. catalog: the file with the names that it serves.
    """

    mountpoint: str
    origin: str
    dataset: str
    root: str
    dirs: tuple[str, ...]
    alive: bool
    redacted: dict[str, Any] = field(default_factory=dict)
    catalog: str = ""


def records_folder() -> Path:
    """Where keepers write a record for each mount, <name>.json. Raises ConfigError."""
    return runtime_dir() / "mounts"


def mount_of(path: str) -> Mount | None:
    """The mount at or above `path` that is the deepest; None: no mount of this user. Raises ConfigError."""
    path = os.path.abspath(path)
    found = [m for m in _records() if path == m.mountpoint or path.startswith(m.mountpoint.rstrip("/") + "/")]
    deepest = max(found, key=lambda mount: len(mount.mountpoint), default=None)
    return deepest if deepest is not None and os.path.ismount(deepest.mountpoint) else None


def _records() -> list[Mount]:
    mounts = []
    for file in sorted(records_folder().glob("*.json")):
        try:
            raw = json.loads(file.read_text())
            mounts.append(
                Mount(
                    mountpoint=raw["mountpoint"],
                    origin=raw["origin"],
                    dataset=raw["dataset"],
                    root=raw["root"],
                    dirs=tuple(raw["dirs"]),
                    alive=True,
                    redacted=dict(raw["notes"]),
                    catalog=raw["catalog"],
                )
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being written, or of another version
    return mounts
