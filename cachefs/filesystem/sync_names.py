"""Names, for code that blocks: what is there, and what it is."""

from __future__ import annotations

import os
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from cachefs.errors import ObjectNotFound
from cachefs.filesystem.names import Info, Names, info_of
from cachefs.messages import Entry

if TYPE_CHECKING:
    from cachefs.filesystem.views import View, Views


class SyncNames:
    """The part of CacheFileSystem that describes. fsspec makes `glob`, `walk`, `expand_path`, ... of it."""

    _views: Views
    _names: Names
    _stripped: Any
    _run: Any
    _find: Any

    def info(self, path: Any, **kwargs: Any) -> Info:
        """name, size, type; for files ETag (the version) and mtime. Raises FileNotFoundError."""
        path = self._stripped(path)
        view = self._views.of(path)
        return self._names.info(view, path) or info_of(view.connection.info(path))

    def ls(self, path: Any, detail: bool = True, refresh: bool = False, **kwargs: Any) -> list[Any]:
        path = self._stripped(path)
        view = self._views.of(path)
        infos = None if refresh else self._names.listed(view, path)
        if infos is None:
            entries = _entries(view, path)
            if entries:
                infos = self._names.keep(path, map(info_of, entries))
            else:
                info = self.info(path)
                infos = [info] if info["type"] == "file" else []
        return infos if detail else [info["name"] for info in infos]

    def find(
        self, path: Any, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> Any:
        """All files below `path`; with `withdirs` the directories too, `path` among them."""
        return self._run(self._find(path, maxdepth=maxdepth, withdirs=withdirs, detail=detail))

    def du(
        self, path: Any, total: bool = True, maxdepth: int | None = None, withdirs: bool = False, **kwargs: Any
    ) -> Any:
        found = self.find(path, maxdepth=maxdepth, withdirs=withdirs, detail=True)
        sizes = {name: info["size"] for name, info in found.items()}
        return sum(sizes.values()) if total else sizes

    def exists(self, path: Any, **kwargs: Any) -> bool:
        path = self._stripped(path)
        if self._views.file(path) is not None:
            return True
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def isfile(self, path: Any) -> bool:
        path = self._stripped(path)
        return self._views.file(path) is not None or self._type(path) == "file"

    def isdir(self, path: Any) -> bool:
        path = self._stripped(path)
        return self._views.file(path) is None and self._type(path) == "directory"

    def _type(self, path: str) -> str:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return ""

    def size(self, path: Any) -> int:
        path = self._stripped(path)
        file = self._views.file(path)
        return os.stat(file).st_size if file is not None else int(self.info(path)["size"])

    def modified(self, path: Any) -> Any:
        info = self.info(path)
        if "mtime" not in info:
            raise FileNotFoundError(f"{info['name']}: the origin tells no time of modification")
        return info["mtime"]

    def ukey(self, path: Any) -> str:
        """Differs when the content does: of name, version and size, not of times that origins write differently."""
        info = self.info(path)
        content = f"{info['name']}\0{info.get('ETag', '')}\0{info['size']}"
        return sha256(content.encode("utf-8", "surrogateescape")).hexdigest()

    def checksum(self, path: Any) -> int:
        return int(self.ukey(path), 16)

    def invalidate_cache(self, path: Any = None) -> None:
        """Forget listings (below `path`, or all), and for None serve the snapshot that the cache has now."""
        self._names.forget(None if path is None else self._stripped(path))
        if path is None:
            self._views.reload()


def _entries(view: View, path: str) -> list[Entry]:
    try:
        return view.connection.entries(path)
    except (ObjectNotFound, NotADirectoryError):
        return []
