"""What this machine can do: kernel, FUSE, privileges, limits, memory, Python. Looks, and changes nothing."""

from __future__ import annotations

import errno
import os
import platform
import re
import resource
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from cachefs import memory
from cachefs.cli.findings import FAIL, OK, WARN, Finding
from cachefs.config import format_size, runtime_dir
from cachefs.errors import ConfigError
from cachefs.memory import cgroup_limit
from cachefs.mountinfo import mounts

FUSE_DEVICE = "/dev/fuse"

# FUSE_PASSTHROUGH and FUSE_NOTIFY_RESEND came with Linux 6.9; io and readdirplus are older than any kernel in use.
FULL_KERNEL = (6, 9)

# FUSE_DEV_IOC_CLONE, pidfd_open: Linux 5.4 (the oldest long-term kernel of a distribution in use) has them.
OLDEST_KERNEL = (5, 4)

CAP_SYS_ADMIN = 21

# A fetcher holds up to 64 requests at the origin and a socket per reader, of which the largest nodes have hundreds.
FILES_WANTED = 1024

# A mount of a million names takes up to 200 MiB in all its processes, a fetcher at work twice memory.in_flight() at
# most, which are 128 MiB where there is 1 GiB.
MEMORY_WANTED = 1024**3

# statvfs on a mount whose server is stuck does not return; one that is well answers within milliseconds.
ANSWER_SECONDS = 2.0

URL_WORKS = "reading through the fsspec URL works without"


def machine() -> Iterator[Finding]:
    yield from _kernel()
    yield from fuse()
    yield from _stale_mounts()
    yield from _files()
    yield from _memory()
    yield from _python()
    yield from _runtime_dir()


def _kernel() -> Iterator[Finding]:
    release = platform.release()
    version = tuple(int(n) for n in re.findall(r"\d+", release)[:2])
    if version < OLDEST_KERNEL:
        yield Finding(FAIL, "kernel", f"Linux {release}", "the mount needs Linux 5.4 or newer; " + URL_WORKS)
    elif version < FULL_KERNEL:
        yield Finding(
            WARN,
            "kernel",
            f"Linux {release}: no passthrough and no RESEND (both since 6.9)",
            "mounts work; reads under way fail if a mount worker is killed. Linux 6.9 or newer has both",
        )
    else:
        yield Finding(OK, "kernel", f"Linux {release}, FUSE with passthrough and RESEND")


def fuse() -> Iterator[Finding]:
    """Whether this process may mount, and how."""
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        yield _no_device(error)
    else:
        yield Finding(OK, FUSE_DEVICE, "can be opened")
    yield from _privileges()


def _no_device(error: OSError) -> Finding:
    fact = f"cannot be opened ({error.strerror})"
    if error.errno in (errno.ENOENT, errno.ENODEV):
        advice = "load the module (modprobe fuse); a container needs the device (docker run --device /dev/fuse)"
    elif os.geteuid() != 0 and shutil.which("fusermount3"):
        # fusermount3 opens it as root and hands it over; only clones of it are refused, and the workers share one.
        return Finding(
            WARN, FUSE_DEVICE, fact, "cold reads are slower; ask root for access to it (group fuse, or mode 0666)"
        )
    else:
        advice = "allow it (a container: docker run --device /dev/fuse; Kubernetes: a device plugin, or privileged)"
    return Finding(FAIL, FUSE_DEVICE, f"{fact}: no mounts", f"{advice}; {URL_WORKS}")


def _privileges() -> Iterator[Finding]:
    status = Path("/proc/self/status").read_text()
    capabilities = int(status.split("CapEff:")[1].split()[0], 16)
    who = f"uid {os.geteuid()}"
    if os.geteuid() == 0 and capabilities >> CAP_SYS_ADMIN & 1:
        yield Finding(OK, "privileges", f"{who} with CAP_SYS_ADMIN: mounts by itself, other users may read")
        return
    if os.geteuid() == 0:
        yield Finding(
            FAIL,
            "privileges",
            f"{who} without CAP_SYS_ADMIN: no mounts",
            f"give it (docker run --cap-add SYS_ADMIN, privileged: true in Kubernetes); {URL_WORKS}",
        )
        return
    helper = shutil.which("fusermount3")
    if helper is None:
        yield Finding(
            FAIL, "privileges", f"{who}, no fusermount3: no mounts", f"apt install fuse3 (as root); {URL_WORKS}"
        )
        return
    yield Finding(OK, "privileges", f"{who}, mounts through {helper}")
    if not _user_allow_other():
        yield Finding(
            WARN,
            "other users",
            "only you can read what you mount",
            "for others too (--allow-other): add the line user_allow_other to /etc/fuse.conf",
        )


def _user_allow_other() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _stale_mounts() -> Iterator[Finding]:
    for mount in mounts():
        if mount.fstype != "fuse.cachefs":
            continue
        state = _state_of(mount.mountpoint)
        if state:
            yield Finding(FAIL, "mount", f"{mount.mountpoint} {state}", f"cachefs umount --lazy {mount.mountpoint}")
        else:
            yield Finding(OK, "mount", f"{mount.mountpoint} answers")


def _state_of(mountpoint: str) -> str:
    """ "" when the mount answers, else what is wrong with it."""
    found: list[str] = []

    def look() -> None:
        try:
            os.statvfs(mountpoint)
            found.append("")
        except OSError as error:
            dead = error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
            found.append(
                "is dead: nobody serves it" if dead else "" if error.errno == errno.EACCES else str(error.strerror)
            )

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return found[0] if found else f"does not answer within {ANSWER_SECONDS:g} s"


def _files() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES_WANTED:
        yield Finding(
            WARN, "open files", f"at most {soft:,}", f"ulimit -n {FILES_WANTED} or more (LimitNOFILE= in systemd)"
        )
    else:
        limit = "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft:,}"
        yield Finding(OK, "open files", limit)


def _memory() -> Iterator[Finding]:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = cgroup_limit()
    usable = total if limit is None else min(total, limit)
    fact = f"{format_size(total)}"
    if limit is not None and limit < total:
        fact += f", this control group may use {format_size(limit)}"
    if hand := os.environ.get("CACHEFS_MEMORY"):
        fact += f", CACHEFS_MEMORY={hand}"
    fact += f"; objects on their way take at most {format_size(memory.in_flight())}"
    if usable < MEMORY_WANTED:
        yield Finding(
            WARN, "memory", fact, "give at least 1 GiB; what the kernel keeps of hot files counts towards the limit too"
        )
    else:
        yield Finding(OK, "memory", fact)


def _python() -> Iterator[Finding]:
    from importlib import metadata

    yield Finding(OK, "Python", f"{platform.python_version()} ({sys.executable})")
    versions = []
    for name, wanted in _requirements():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(FAIL, name, "is not installed", f'pip install "{name}>={wanted}"')
            continue
        if _numbers(found) < _numbers(wanted):
            yield Finding(FAIL, name, f"{found} is too old", f'pip install "{name}>={wanted}"')
        else:
            versions.append(f"{name} {found}")
    yield Finding(OK, "libraries", ", ".join(versions))


def _requirements() -> Iterator[tuple[str, str]]:
    """(name, least version) of what cachefs itself needs, from its own metadata."""
    from importlib import metadata

    try:
        lines = metadata.requires("cachefs-sidecar") or []
    except metadata.PackageNotFoundError:
        return  # run from a source tree that was not installed
    for line in lines:
        match = re.fullmatch(r"([\w.-]+)\s*>=\s*([\w.]+)", line)
        if match is not None:  # those of extras have a marker behind
            yield match[1], match[2]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def _runtime_dir() -> Iterator[Finding]:
    try:
        yield Finding(OK, "runtime directory", str(runtime_dir()))
    except (ConfigError, OSError) as error:
        yield Finding(
            FAIL, "runtime directory", str(error), "set CACHEFS_RUNTIME_DIR to a directory of yours; mounts need one"
        )
