"""How much memory there is for this process, and what share of it bytes on their way may take.

A container may use less than its machine has: the limit of its control group counts, of whichever version. What
processes of this project hold of the bytes of others is a share of that, so that the number of readers has no say.
CACHEFS_MEMORY sets the whole by hand, for a machine whose memory is meant for something else.
"""

from __future__ import annotations

import os
from pathlib import Path

from cachefs.config import parse_size
from cachefs.digest import BLOCK_SIZE

# The share of objects on their way. The fetcher takes up to twice that, since a block is copied as it passes. More than
# the most fills no network (25 Gbit/s at 50 ms are 156 MB); with less than the least, a single sequential reader is not
# read ahead of.
IN_FLIGHT_PART, IN_FLIGHT_LEAST, IN_FLIGHT_MOST = 16, 8 * BLOCK_SIZE, 32 * BLOCK_SIZE


def usable() -> int:
    """Bytes of memory that this process can count on. Raises ConfigError when CACHEFS_MEMORY is no size."""
    if text := os.environ.get("CACHEFS_MEMORY"):
        return parse_size(text)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = cgroup_limit()
    return total if limit is None else min(total, limit)


def share(part: int, *, least: int, most: int) -> int:
    """One `part`th of the usable memory in bytes, within the bounds."""
    return max(least, min(most, usable() // part))


def in_flight() -> int:
    """Bytes of objects that a fetcher has in memory at most, from the request for them until they are stored."""
    return share(IN_FLIGHT_PART, least=IN_FLIGHT_LEAST, most=IN_FLIGHT_MOST)


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes of memory that this process's control groups allow, the least of all levels; None = no limit."""
    limits = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = top / path.lstrip("/")
        for level in (folder, *folder.parents):
            try:
                text = (level / file).read_text().strip()
            except OSError:
                text = "max"  # the root has no limit, and a container does not see the levels above its own
            if text.isdigit():
                limits.append(int(text))
            if level == top:
                break
    # Version 1 writes "no limit" as the largest multiple of a page below 2**63.
    return min((n for n in limits if n < 2**62), default=None)
