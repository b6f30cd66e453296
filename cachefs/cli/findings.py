"""What doctor finds: a fact, whether it is good enough, and what to do about it when it is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    """level: OK, WARN (works, but worse) or FAIL (something cannot work). advice: what to do, "" when ok."""

    level: str
    subject: str
    fact: str
    advice: str = ""


class FileSystem(NamedTuple):
    """One line of /proc/self/mountinfo."""

    mountpoint: str
    fstype: str
    source: str
    options: str


def file_systems() -> list[FileSystem]:
    """What is mounted, in order: a later one hides an earlier one of the same mount point."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(tail) < 2:
            continue
        # proc(5): space, tab, newline and backslash are written as \040, \011, \012 and \134.
        mountpoint, source = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), t) for t in (fields[4], tail[1]))
        found.append(FileSystem(mountpoint, tail[0], source, fields[5]))
    return found


def file_system_of(path: Path) -> FileSystem | None:
    """The file system that holds `path` (absolute, without links)."""
    text = str(path)
    best = None
    for mount in file_systems():
        inside = text == mount.mountpoint or text.startswith(mount.mountpoint.rstrip("/") + "/")
        if inside and (best is None or len(mount.mountpoint) >= len(best.mountpoint)):
            best = mount
    return best
