"""Reading what is stored again: is it still what its key says, and can anybody reach it?"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

from cachefs.digest import BLOCK_SIZE, KEY_BYTES
from cachefs.store.folder import Folder, allocated, digests_of, key_of, remove
from cachefs.store.layout import is_blob_name
from cachefs.store.ledger import Ledger


def check_blob(folder: Folder, key: bytes) -> bool:
    """Compare a blob with its key; sealed when intact, unsealed (so that no ref of it is served) when not.

    Works on a descriptor and needs no lock: should the blob be dropped or replaced meanwhile, it is the old
    content that is judged and marked. Raises OSError when the mark cannot be made; a blob that cannot be read is
    damaged (one bad sector is no reason to give up a disk; a failing write is).
    """
    name = key.hex()
    try:
        fd = os.open(folder.places.blob(name), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        before = os.fstat(fd)
        digests = _read(fd, before.st_size)
        # Whoever writes to the file while it is read changes its mtime, and must not find it sealed over. Another
        # check of the same blob (after a boot two readers want it at once) may have sealed it meanwhile.
        after = os.fstat(fd).st_mtime_ns
        untouched = after in (before.st_mtime_ns, folder.seal)
        if digests is None or not untouched or key_of(digests, before.st_size) != key[:KEY_BYTES]:
            os.utime(fd)
            return False
        if after != folder.seal:
            folder.set_seal(fd)
    finally:
        os.close(fd)
    # The digests beside a large blob can be lost or damaged by themselves. They were just found again.
    if before.st_size > BLOCK_SIZE and folder.read_blocks(name) != digests:
        folder.write_blocks(name, digests)
    return True


def _read(fd: int, size: int) -> list[bytes] | None:
    try:
        return digests_of(fd, size)
    except OSError:
        return None


def sweep_folder(folder: Folder, lock: Callable[[bytes], threading.Lock], ledger: Ledger) -> int:
    """Remove blobs without refs, .blocks without a blob, and refs that can never be served again. Bytes freed."""
    freed = 0
    for entry in folder.blob_entries():
        name = entry.name.removesuffix(".blocks")
        if not is_blob_name(name):
            continue
        with contextlib.suppress(FileNotFoundError):
            if name != entry.name:
                with lock(bytes.fromhex(name)):
                    if folder.stat_blob(name) is None:
                        freed += remove(entry.path)
            elif entry.stat(follow_symlinks=False).st_nlink == 1:
                # Looked at again under the lock: a put links its refs before it lets go.
                with lock(bytes.fromhex(name)):
                    freed += folder.remove_unheld(name)
    for dataset in folder.datasets():
        for entry in folder.ref_entries(dataset):
            with contextlib.suppress(FileNotFoundError):
                info = entry.stat(follow_symlinks=False)
                if _is_lost(folder, entry.path, info):
                    ledger.unlink(folder, dataset, entry.name)
                    freed += allocated(info) if info.st_nlink == 1 else 0
    return freed


def _is_lost(folder: Folder, path: str, info: os.stat_result) -> bool:
    """Whether a ref is unsealed and its content is no blob: `check` seals blobs, so nothing would ever seal it."""
    if info.st_mtime_ns == folder.seal:
        return False
    if info.st_nlink == 1:
        return True
    name = folder.recorded_name(path)  # not key_at: without attributes it would read the whole cache after a boot
    blob = folder.stat_blob(name) if name else None
    return name is not None and (blob is None or blob.st_ino != info.st_ino)
