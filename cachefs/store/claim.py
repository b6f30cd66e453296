"""Taking possession of a cache directory: is it ours, of a format we know, and on a file system that will do?

Nothing is written, and nothing in tmp/ removed, before the marker file has been read and understood: a cache of a
future format and a directory full of somebody's files are left exactly as they are.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import uuid
from pathlib import Path

from cachefs.errors import CacheUnusable
from cachefs.store.layout import FORMAT, MARKER, Places, is_name

# What may lie in a directory that becomes a cache: a file system's own, and what a client makes in the home (the
# start lock in run/) before the fetcher that it starts gets here. An interrupted claim leaves the others.
_HARMLESS = frozenset({"lost+found", "run", MARKER + ".new"})
_SKELETON = frozenset({"blobs", "refs", "parts", "tmp"})

# A marker is about 120 bytes. Whatever is much larger was not written by any version of cachefs.
_MARKER_LIMIT = 65536

_CHOOSE = "choose another cache directory (--cache-dir, cache_dir=, CACHEFS_DIR)"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def claim(path: Path, *, home_id: str | None, seal: int, parents: bool = False) -> tuple[str, str]:
    """Make `path` a directory of the cache whose home has `home_id`, or a home (None). Returns (its id, home id).

    parents: create missing directories above it too. Raises CacheUnusable when the directory must not or cannot
    serve as one; OSError when the disk failed or is not there, which is fatal for a home only.
    """
    places = Places(path)
    _make_root(path, parents)
    known = _read_marker(places, home_id)
    if known is None:
        _require_empty(path)
    _make_skeleton(places)
    _clear(places.tmp)
    try:
        _probe(places, seal)
        if home_id is None:
            _probe_socket(places)
    except OSError as error:
        # A full disk still serves what it holds, and a put will say that it is full.
        if known is None or error.errno not in _FULL:
            raise
    return known or _write_marker(places, home_id)


def explain(path: Path, error: OSError) -> CacheUnusable:
    """Why a home cannot be used, for the person who gave it."""
    reason = error.strerror or str(error)
    if error.errno == errno.ENOENT:
        return CacheUnusable(f"{path}: {path.parent} does not exist; create it, or {_CHOOSE}")
    if error.errno == errno.EROFS:
        return CacheUnusable(f"{path}: is on a read-only file system; {_CHOOSE}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return CacheUnusable(f"{path}: not writable for uid {os.geteuid()} ({reason}); {_CHOOSE}")
    if error.errno in _FULL:
        return CacheUnusable(f"{path}: its file system is full ({reason}); make room, or {_CHOOSE}")
    return CacheUnusable(f"{path}: {reason}; check the disk, or {_CHOOSE}")


def _make_root(path: Path, parents: bool) -> None:
    # 0700: names of datasets, and bytes that need credentials at their origin, are the user's own. Who wants to
    # share a cache with a group widens the directory; the blobs themselves are readable (folder.py).
    try:
        if parents:
            os.makedirs(path.parent, mode=0o700, exist_ok=True)
        os.mkdir(path, 0o700)
    except NotADirectoryError:
        raise CacheUnusable(f"{path}: lies below a file; {_CHOOSE}") from None
    except OSError:
        if not os.path.lexists(path):  # mkdir may say EROFS or EACCES also where the directory is there already
            raise
    if not stat.S_ISDIR(os.stat(path).st_mode):
        raise CacheUnusable(f"{path}: is not a directory; {_CHOOSE}")


def _read_marker(places: Places, home_id: str | None) -> tuple[str, str] | None:
    try:
        with open(places.marker, "rb") as file:
            text = file.read(_MARKER_LIMIT)
    except FileNotFoundError:
        return None
    try:
        marker = json.loads(text)
        version = marker["format"]
        if isinstance(version, int) and version > FORMAT:
            raise CacheUnusable(
                f"{places.root}: was written by a newer cachefs (format {version}, this one knows {FORMAT}) and "
                f"is left as it is; use that version, or {_CHOOSE}"
            )
        own, home = marker["id"], marker["home"]
        understood = version == FORMAT and is_name(own) and is_name(home)
    except (ValueError, KeyError, TypeError):
        understood = False
    if not understood:
        raise CacheUnusable(
            f"{places.marker}: cannot be understood, so {places.root} is left as it is; remove the directory if it "
            f"is a cache of yours, or {_CHOOSE}"
        )
    if home != (own if home_id is None else home_id):
        raise CacheUnusable(
            f"{places.root}: belongs to another cache (its home has the id {home}); give that cache's home first, "
            f"or {_CHOOSE}"
        )
    return own, home


def _require_empty(path: Path) -> None:
    strangers = set(os.listdir(path)) - _HARMLESS
    # A claim that was killed leaves the skeleton, empty: the marker comes last, when all probes have passed.
    strangers = {s for s in strangers if s not in _SKELETON or _holds_files(path / s)}
    if strangers:
        some = ", ".join(sorted(strangers)[:3]) + (", ..." if len(strangers) > 3 else "")
        raise CacheUnusable(
            f"{path}: holds other files ({some}) and no {MARKER}; choose an empty directory or a new one"
        )


def _holds_files(folder: Path) -> bool:
    try:
        return any(not name.startswith("probe") for name in os.listdir(folder))
    except NotADirectoryError:
        return True


def _make_skeleton(places: Places) -> None:
    for folder in (places.blobs, places.refs, places.parts, places.tmp):
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)


def _clear(tmp: str) -> None:
    """Reclaim what a killed fetcher was writing. We hold the fetcher's lock: nobody else writes here."""
    with os.scandir(tmp) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)


def _write_marker(places: Places, home_id: str | None) -> tuple[str, str]:
    own = uuid.uuid4().hex
    home = own if home_id is None else home_id
    new = places.marker + ".new"
    # The one file that is synced: without it every blob would be lost to the next start.
    with open(new, "w") as file:
        json.dump({"format": FORMAT, "id": own, "home": home}, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(new, places.marker)
    folder = os.open(places.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return own, home


def _probe(places: Places, seal: int) -> None:
    """Do once what every put does; raises CacheUnusable for what this file system cannot do."""
    written, linked, renamed = places.tmp + "probe", places.refs + "probe", places.blobs + "probe"
    _remove(linked, renamed)
    try:
        with open(written, "xb") as file:
            file.write(b"probe")
            file.flush()
            os.utime(file.fileno(), ns=(seal, seal))
        if os.stat(written).st_mtime_ns != seal:
            raise CacheUnusable(f"{places.root}: its file system does not keep modification times; {_CHOOSE}")
        try:
            os.link(written, linked)
            links = os.stat(written).st_nlink
        except OSError as error:
            if error.errno in (*_FULL, errno.EIO):
                raise
            links = 1
        if links != 2:
            raise CacheUnusable(
                f"{places.root}: its file system has no hard links, or blobs/, refs/ and tmp/ are on several file "
                f"systems; use ext4, xfs, btrfs or tmpfs, or {_CHOOSE}"
            )
        os.rename(linked, renamed)
    finally:
        _remove(written, linked, renamed)


def _remove(*files: str) -> None:
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)


def _probe_socket(places: Places) -> None:
    """The fetcher listens in the home. Through a descriptor, as a socket address holds only 107 bytes."""
    run = places.root / "run"
    with contextlib.suppress(FileExistsError):
        os.mkdir(run, 0o700)
    folder = os.open(run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            _remove(f"{run}/probe")
            sock.bind(f"/proc/self/fd/{folder}/probe")
    except OSError as error:
        if error.errno in (*_FULL, errno.EIO, errno.EROFS, errno.EACCES):
            raise
        raise CacheUnusable(f"{run}: no Unix sockets on this file system ({error.strerror}); {_CHOOSE}") from error
    finally:
        _remove(f"{run}/probe")
        os.close(folder)
