"""What is mounted where, as the kernel lists it: no mount is asked, for it may hang or be dead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Mounted(NamedTuple):
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5)).

    device: "major:minor". root: what of the file system is mounted. options: of the mount, as "ro,relatime".
    """

    device: str
    root: str
    mountpoint: str
    fstype: str
    source: str
    options: str


def mounts() -> list[Mounted]:
    """All mounts of this mount namespace; where several lie on one another, the topmost comes last."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(tail) < 2:
            continue
        names = [_unescape(text) for text in (fields[3], fields[4], tail[0], tail[1])]
        found.append(Mounted(fields[2], names[0], names[1], names[2], names[3], fields[5]))
    return found


def _unescape(text: str) -> str:
    r"""mountinfo writes space, tab, newline and backslash as \040, \011, \012 and \134."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mounted_at(mountpoint: Path) -> Mounted | None:
    """What is mounted exactly there, topmost. The path is taken as it is: absolute, without links."""
    for mount in reversed(mounts()):
        if mount.mountpoint == str(mountpoint):
            return mount
    return None


def mount_of(path: Path) -> Mounted | None:
    """The mount that holds `path` (absolute, without links), topmost."""
    text = str(path)
    best = None
    for mount in mounts():
        inside = text == mount.mountpoint or text.startswith(mount.mountpoint.rstrip("/") + "/")
        if inside and (best is None or len(mount.mountpoint) >= len(best.mountpoint)):
            best = mount
    return best
