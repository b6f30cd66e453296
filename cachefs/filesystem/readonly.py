"""Every method of fsspec that would change something says so: cachefs never writes to an origin.

EROFS, as on a read-only mount, so programs that know how to handle one handle the other.
"""

from __future__ import annotations

from typing import Any, NoReturn

from cachefs.errors import ReadOnlyError


def read_only(what: str, path: Any) -> ReadOnlyError:
    """The error for an attempt to `what` the path."""
    if isinstance(path, dict):
        path = list(path)
    shown = ", ".join(map(str, path)) if isinstance(path, (list, tuple)) else str(path)
    return ReadOnlyError(
        f"{shown}: cannot {what}: cachefs is read-only; write to the storage itself, with its own file system",
        path=shown,
    )


class ReadOnly:
    """The mutating half of AbstractFileSystem and AsyncFileSystem."""

    def mkdir(self, path: Any, create_parents: bool = True, **kwargs: Any) -> NoReturn:
        raise read_only("make a directory", path)

    def makedirs(self, path: Any, exist_ok: bool = False) -> NoReturn:
        raise read_only("make a directory", path)

    def makedir(self, path: Any, create_parents: bool = True, **kwargs: Any) -> NoReturn:
        raise read_only("make a directory", path)

    def mkdirs(self, path: Any, exist_ok: bool = False) -> NoReturn:
        raise read_only("make a directory", path)

    def rmdir(self, path: Any) -> NoReturn:
        raise read_only("remove a directory", path)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any) -> NoReturn:
        raise read_only("remove", path)

    def rm_file(self, path: Any) -> NoReturn:
        raise read_only("remove", path)

    def delete(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> NoReturn:
        raise read_only("remove", path)

    def touch(self, path: Any, truncate: bool = True, **kwargs: Any) -> NoReturn:
        raise read_only("touch", path)

    def pipe(self, path: Any, value: Any = None, **kwargs: Any) -> NoReturn:
        raise read_only("write", path)

    def pipe_file(self, path: Any, value: Any, mode: str = "overwrite", **kwargs: Any) -> NoReturn:
        raise read_only("write", path)

    def write_bytes(self, path: Any, value: Any, **kwargs: Any) -> NoReturn:
        raise read_only("write", path)

    def write_text(self, path: Any, value: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise read_only("write", path)

    def put(self, lpath: Any, rpath: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise read_only("put", rpath)

    def put_file(self, lpath: Any, rpath: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise read_only("put", rpath)

    def upload(self, lpath: Any, rpath: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise read_only("put", rpath)

    def copy(self, path1: Any, path2: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise read_only("copy to", path2)

    def cp(self, path1: Any, path2: Any, **kwargs: Any) -> NoReturn:
        raise read_only("copy to", path2)

    def cp_file(self, path1: Any, path2: Any, **kwargs: Any) -> NoReturn:
        raise read_only("copy to", path2)

    def mv(self, path1: Any, path2: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise read_only("move", path1)

    def move(self, path1: Any, path2: Any, **kwargs: Any) -> NoReturn:
        raise read_only("move", path1)

    def rename(self, path1: Any, path2: Any, **kwargs: Any) -> NoReturn:
        raise read_only("move", path1)

    # --- async ---

    async def _mkdir(self, path: Any, create_parents: bool = True, **kwargs: Any) -> NoReturn:
        raise read_only("make a directory", path)

    async def _makedirs(self, path: Any, exist_ok: bool = False) -> NoReturn:
        raise read_only("make a directory", path)

    async def _rm(self, path: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise read_only("remove", path)

    async def _rm_file(self, path: Any, **kwargs: Any) -> NoReturn:
        raise read_only("remove", path)

    async def _pipe(self, path: Any, value: Any = None, *args: Any, **kwargs: Any) -> NoReturn:
        raise read_only("write", path)

    async def _pipe_file(self, path: Any, value: Any, mode: str = "overwrite", **kwargs: Any) -> NoReturn:
        raise read_only("write", path)

    async def _put(self, lpath: Any, rpath: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise read_only("put", rpath)

    async def _put_file(self, lpath: Any, rpath: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise read_only("put", rpath)

    async def _copy(self, path1: Any, path2: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise read_only("copy to", path2)

    async def _cp_file(self, path1: Any, path2: Any, **kwargs: Any) -> NoReturn:
        raise read_only("copy to", path2)

    async def _mv_file(self, path1: Any, path2: Any) -> NoReturn:
        raise read_only("move", path1)
