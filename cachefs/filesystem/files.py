"""What `open` returns: a real local file on a hit, else a file whose bytes are asked for where they are read.

Positions are kept here and not in the descriptor, because a descriptor that came from the fetcher shares its
position with the fetcher and with every other reader of those bytes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cachefs.errors import StaleObject

if TYPE_CHECKING:
    from cachefs.client import Located

Need = Callable[[str, int, int], "Located"]

# The most that is asked for in one request. The fetcher brings all of it before it answers, so a read of a whole
# 1 GiB object in one request would start late; four blocks keep its lanes busy.
ASK_AT_MOST = 32 * 1024 * 1024

# Large objects are read in small pieces (parquet footers, tar headers) or by the megabyte; a request costs more
# than 64 KiB of copying.
COLD_BUFFER = 64 * 1024


class CacheFile(io.BufferedReader):
    """A buffered reader that knows its size in bytes, as the files of fsspec do."""

    @property
    def size(self) -> int:
        return self.raw.size if isinstance(self.raw, LocatedFile) else os.fstat(self.fileno()).st_size


def local_file(fd: int, name: str | None) -> CacheFile:
    """A buffered reader of the whole object, which is the file `fd`. Takes the descriptor over."""
    raw = io.FileIO(fd, "rb")
    raw.name = name  # fsspec.open_local and others read the path here
    return CacheFile(raw)


def opened(path: str, located: Located, need: Need) -> CacheFile:
    """A buffered reader of the object that `located` is a part of. Takes the descriptor over."""
    if located.complete:
        return local_file(located.fd, located.file or None)
    return CacheFile(LocatedFile(path, located, need), COLD_BUFFER)


def read_at(fd: int, offset: int, length: int) -> bytes:
    """Bytes [offset, offset+length) of a file; fewer where it ends. Raises OSError."""
    data = os.pread(fd, length, offset)
    if len(data) == length or not data:
        return data
    parts = [data]  # one system call reads at most 2 GiB
    done = len(data)
    while done < length and (data := os.pread(fd, length - done, offset + done)):
        parts.append(data)
        done += len(data)
    return b"".join(parts)


def span(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    """(start, stop) of the bytes that `start` and `end` mean, as fsspec has them: like a slice."""
    begin, stop, _ = slice(start, end).indices(size)
    return begin, max(begin, stop)


def first_need(start: int | None, end: int | None) -> tuple[int, int]:
    """(offset, length) to ask for before the size is known. Length 0 asks for the size of a large object only."""
    if start is not None and end is not None and 0 <= start < end:
        return start, min(end - start, ASK_AT_MOST)
    return 0, 0


class LocatedFile(io.RawIOBase):
    """An object that is not whole on disk: too large to be there yet, or not stored at all.

    path: of the object. located: its first bytes, taken over. need: asks for more. One version of the object is
    read from beginning to end, else StaleObject is raised.
    """

    name = None
    mode = "rb"

    def __init__(self, path: str, located: Located, need: Need) -> None:
        super().__init__()
        self.path = path
        self.size = located.size
        self._located = located
        self._need = need
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}.get(whence)
        if origin is None or origin + offset < 0:
            raise ValueError(f"cannot seek to {offset} from {whence}")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if not view or self._position >= self.size:
            return 0
        located = self._at(self._position, min(len(view), self.size - self._position))
        count = os.preadv(located.fd, [view[: located.stop - self._position]], self._position - located.base)
        if count == 0:
            raise StaleObject(f"{self.path}: ends before byte {self._position} of {self.size}", path=self.path)
        self._position += count
        return count

    def readall(self) -> bytes:
        return self.read_span(self._position, self.size, advance=True)

    def read_span(self, start: int, stop: int, *, advance: bool = False) -> bytes:
        """Bytes [start, stop), which lie within the object."""
        before = self._position
        data = bytearray(max(0, stop - start))
        view = memoryview(data)
        self._position = start
        while view:
            view = view[self.readinto(view) :]
        if not advance:
            self._position = before
        return bytes(data)

    def _at(self, offset: int, length: int) -> Located:
        located = self._located
        if located.start <= offset < located.stop:
            return located
        found = self._need(self.path, offset, min(length, ASK_AT_MOST))
        if found.version != located.version:
            os.close(found.fd)
            raise StaleObject(
                f"{self.path}: was replaced at the origin while it was read, and not all of the old version is "
                "cached; open it again",
                path=self.path,
            )
        os.close(located.fd)
        self._located = found
        return found

    def close(self) -> None:
        if not self.closed:
            os.close(self._located.fd)
        super().close()
