"""Mount points: looking at them, mounting, unmounting.

Root mounts with mount(2); anybody else through `fusermount3`, which is setuid root and hands back the descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

from cachefs.errors import MountError
from cachefs.mountinfo import mounted_at
from cachefs_sidecar.device import DEVICE

FSTYPE = "fuse.cachefs"

_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MNT_DETACH = 2

# 1 MiB per READ, the kernel's own limit (256 pages).
_MAX_READ = 1024 * 1024

# A mount that is served answers within milliseconds.
ANSWER_SECONDS = 2.0

# What the kernel reads ahead, in KiB: two READs of the most that one may have (1 MiB), so that two workers read for a
# sequential reader of a large file. 1 GiB from end to end, page cache dropped: 512 KiB ahead 930 MB/s, 1 MiB 1,550,
# 2 MiB 2,030, 4 MiB 2,200, local file 1,970 (medians of five, in turns). No more than 2, because it costs whoever maps
# a file and reads here and there: the kernel reads around such faults. FUSE starts with 128, of which a 160 KB image
# needs two READs. Only root may set it.
READ_AHEAD_KIB = 2048


def is_device(mountpoint: Path, device: str) -> bool:
    """Whether that very mount is the topmost there: the same place may have been mounted again."""
    present = mounted_at(mountpoint)
    return present is not None and present.device == device


def resolve(mountpoint: str | os.PathLike[str]) -> Path:
    """The mount point as mountinfo writes it: links resolved.

    A mount itself is not looked at: a dead one answers nothing but errors, and one that nobody serves not at all.
    """
    path = Path(os.path.abspath(os.path.expanduser(mountpoint)))
    place = Path(os.path.realpath(path.parent)) / path.name
    if mounted_at(place) is None and place.is_symlink():
        return Path(os.path.realpath(place))
    return place


def prepare(mountpoint: Path) -> str:
    """See that something can be mounted there; a dead cachefs mount is taken away (the answer says so, else "").

    Raises MountError: missing, not a directory, not empty, already a mount, not permitted.
    """
    note = ""
    present = mounted_at(mountpoint)
    if present is not None:
        if not (present.fstype.startswith("fuse") and is_dead(mountpoint)):
            hint = "; `cachefs umount` unmounts it" if present.fstype == FSTYPE else ""
            raise MountError(f"{mountpoint}: is already a mount of {present.source} ({present.fstype}){hint}")
        if present.fstype != FSTYPE:
            raise MountError(f"{mountpoint}: is a dead mount of {present.source} ({present.fstype}); unmount it first")
        unmount(mountpoint, lazy=True)
        note = f"{mountpoint}: replaced a dead mount of {present.source} that an earlier run left behind"
    try:
        names = os.listdir(mountpoint)
    except FileNotFoundError:
        raise MountError(f"{mountpoint}: does not exist; create it first (mkdir -p)") from None
    except NotADirectoryError:
        raise MountError(f"{mountpoint}: is a file; a mount needs an empty directory") from None
    except OSError as error:
        raise MountError(f"{mountpoint}: cannot be used ({error.strerror})") from error
    if names:
        raise MountError(
            f"{mountpoint}: is not empty ({names[0]!r}{', ...' if len(names) > 1 else ''}); "
            "a mount would hide what is in it, choose an empty directory"
        )
    return note


def is_dead(mountpoint: Path) -> bool:
    """Whether nobody can serve the FUSE mount there any more.

    statvfs(2), because the kernel always passes it on; attributes it would remember for years. One that does not
    answer is not dead: its descriptors are held somewhere, and somebody may serve them yet.
    """
    numbers: list[int | None] = []

    def ask() -> None:
        try:
            os.statvfs(mountpoint)
        except OSError as error:
            numbers.append(error.errno)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    return bool(numbers) and numbers[0] in (errno.ENOTCONN, errno.ECONNABORTED)


def mount(mountpoint: Path, *, source: str, allow_other: bool | None) -> int:
    """Mount, read-only, and return the connection's descriptor. `source` is what `mount` and `df` show.

    allow_other: whether other users may enter; None = yes for root, else no. Raises MountError.
    """
    if not os.path.exists(DEVICE):
        raise MountError(
            f"{DEVICE} does not exist: load the kernel module (modprobe fuse), or give the container the device "
            "(docker run --device /dev/fuse)"
        )
    if os.geteuid() == 0:
        return _mount_as_root(mountpoint, source, allow_other is not False)
    return _mount_through_fusermount(mountpoint, source, bool(allow_other))


def _mount_as_root(mountpoint: Path, source: str, allow_other: bool) -> int:
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(
            f"{DEVICE}: cannot be opened ({error.strerror}); a container needs the device (--device /dev/fuse)"
        ) from error
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions,max_read={_MAX_READ}"
    if allow_other:
        options += ",allow_other"
    result = _libc().mount(
        os.fsencode(source),
        os.fsencode(mountpoint),
        FSTYPE.encode(),
        _MS_RDONLY | _MS_NOSUID | _MS_NODEV,
        options.encode(),
    )
    if result != 0:
        number = ctypes.get_errno()
        os.close(device)
        hint = ""
        if number in (errno.EPERM, errno.EACCES):
            hint = "; mounting needs CAP_SYS_ADMIN (docker run --cap-add SYS_ADMIN, privileged: true in Kubernetes)"
        elif number == errno.ENODEV:
            hint = "; this kernel has no FUSE (modprobe fuse)"
        raise MountError(f"{mountpoint}: cannot be mounted ({os.strerror(number)}){hint}")
    return device


def _mount_through_fusermount(mountpoint: Path, source: str, allow_other: bool) -> int:
    if allow_other and not user_allow_other():
        raise MountError(
            "allow_other: only root may let other users into a mount, "
            "unless /etc/fuse.conf has the line user_allow_other"
        )
    options = ["ro", "nosuid", "nodev", "default_permissions", f"max_read={_MAX_READ}", "subtype=cachefs"]
    # fusermount3 splits at commas and takes a backslash before one as part of the name.
    options.append("fsname=" + source.replace("\\", "\\\\").replace(",", "\\,"))
    if allow_other:
        options.append("allow_other")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [_fusermount(), "-o", ",".join(options), "--", str(mountpoint)],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,  # it only mounts; it hangs when the mount point lies in a dead network file system
            check=False,
        )
        if done.returncode != 0:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"
            hint = ""
            if "not permitted" in reason:
                hint = "; fusermount3 must be setuid root, and a container must be allowed to mount (CAP_SYS_ADMIN)"
            raise MountError(f"{mountpoint}: cannot be mounted: {reason}{hint}")
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise MountError(f"{mountpoint}: fusermount3 mounted but passed no descriptor")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount. lazy: take it out of the tree now; it ends once its last user is gone.

    Raises MountError; its errno is EBUSY when the mount is in use.
    """
    if os.geteuid() == 0:
        if _libc().umount2(os.fsencode(mountpoint), _MNT_DETACH if lazy else 0) != 0:
            raise _unmount_error(mountpoint, ctypes.get_errno())
        return
    command = [_fusermount(), "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        busy = "busy" in done.stderr
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        if busy:
            raise _unmount_error(mountpoint, errno.EBUSY)
        raise MountError(f"{mountpoint}: cannot be unmounted: {reason[0]}")


def _unmount_error(mountpoint: Path, number: int) -> MountError:
    if number == errno.EBUSY:
        users = users_of(mountpoint)
        by = " by " + ", ".join(users) if users else ""
        error = MountError(f"{mountpoint}: is in use{by}; end that first, or unmount lazily (--lazy)")
    elif number == errno.EINVAL:
        error = MountError(f"{mountpoint}: is not a mount point")
    else:
        error = MountError(f"{mountpoint}: cannot be unmounted ({os.strerror(number)})")
    error.errno = number
    return error


def users_of(mountpoint: Path, limit: int = 5) -> list[str]:
    """Some of the processes that have something open below, as "name (pid 12)"; only those we may look into."""
    found: list[str] = []
    prefix = f"{mountpoint}/"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if len(found) == limit:
            break
        if any(target == str(mountpoint) or target.startswith(prefix) for target in _opened(pid)):
            try:
                name = Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                continue  # it ended meanwhile
            found.append(f"{name} (pid {pid})")
    return found


def _opened(pid: str) -> list[str]:
    targets = []
    links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root"]
    try:
        links += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return []  # not ours to look into, or gone
    for link in links:
        try:
            targets.append(os.readlink(link))
        except OSError:
            continue
    return targets


def raise_read_ahead(mountpoint: Path) -> bool:
    """Let the kernel read 1 MiB ahead. False where that is not ours to set: reads are then smaller, not wrong."""
    present = mounted_at(mountpoint)
    if present is None:
        return False
    try:
        Path(f"/sys/class/bdi/{present.device}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))
    except OSError:
        return False
    return True


def user_allow_other() -> bool:
    """Whether /etc/fuse.conf lets users who are not root mount with allow_other."""
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _fusermount() -> str:
    found = shutil.which("fusermount3")
    if found is None:
        raise MountError(
            "fusermount3 is missing: to mount without root, install the Debian/Ubuntu package fuse3 "
            "(apt install fuse3). "
            "The fsspec URL works without a mount"
        )
    return found


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
