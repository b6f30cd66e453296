"""Nothing is ever written: every method of fsspec that would, refuses."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.spec import AbstractFileSystem

from cachefs import CacheFileSystem
from cachefs.errors import (
    ReadOnlyError,
)
from tests.filesystems import inprocess_home, local, make, seeded

__all__ = ["inprocess_home", "local", "make", "seeded"]

# The public methods of fsspec that change nothing. Whatever is not here must refuse: a new one fails the test.
READING = """
    cat cat_file cat_ranges checksum clear_instance_cache created current disk_usage download du end_transaction
    exists expand_path find from_dict from_json get get_file get_mapper glob head info invalidate_cache isdir isfile
    lexists listdir ls modified open open_async read_block read_bytes read_text sign size sizes
    start_transaction stat tail to_dict to_json tree ukey unstrip_protocol walk
    _cat _cat_file _cat_ranges _du _exists _expand_path _find _get _get_file _get_kwargs_from_urls
    _get_pyarrow_filesystem _glob _info _isdir _isfile _isfilestore _ls _ls_from_cache _open _parent _process_limits
    _size _sizes _strip_protocol _walk
"""


def mutating_methods() -> list[str]:
    names = {
        name
        for cls in (AbstractFileSystem, AsyncFileSystem)
        for name in dir(cls)
        if inspect.isroutine(getattr(cls, name)) and not name.startswith("__")
    }
    return sorted(names - set(READING.split()))


def test_the_list_of_mutating_methods_is_complete():
    methods = mutating_methods()
    assert {"rm", "pipe_file", "touch", "mv", "_rm_file", "_put", "upload", "rename", "makedirs"} <= set(methods)
    assert all(hasattr(CacheFileSystem, name) for name in READING.split())


@pytest.mark.parametrize("name", mutating_methods())
def test_every_mutating_method_refuses(name: str, local: CacheFileSystem, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"untouched")
    path = str(tmp_path / "file")
    arguments = {"lpath": path, "rpath": path, "path1": path, "path2": path, "path": path, "value": b"x"}
    method = getattr(local, name)
    wanted = method.__code__.co_varnames[1 : method.__code__.co_argcount]

    def call() -> None:
        result = method(**{argument: arguments[argument] for argument in wanted if argument in arguments})
        if asyncio.iscoroutine(result):
            asyncio.run(result)

    with pytest.raises(ReadOnlyError, match="file") as caught:
        call()
    assert caught.value.errno == 30  # EROFS
    assert path in str(caught.value)
    assert Path(path).read_bytes() == b"untouched"


@pytest.mark.parametrize("mode", ["wb", "w", "ab", "xb", "r+b", "rb+", "wt"])
def test_open_for_writing_refuses(mode: str, local: CacheFileSystem, tmp_path: Path):
    path = str(tmp_path / "new")
    with pytest.raises(ReadOnlyError, match="new"):
        local.open(path, mode)
    with pytest.raises(ReadOnlyError):
        asyncio.run(local.open_async(path, mode))
    with pytest.raises(OSError, match="read-only"), fsspec.open(f"cachefs::file://{path}", mode):
        pass
    assert not Path(path).exists()


def test_a_mapper_reads_and_refuses(local: CacheFileSystem, tmp_path: Path):
    (tmp_path / "key").write_bytes(b"value")
    mapper = local.get_mapper(str(tmp_path))
    assert mapper["key"] == b"value"
    assert mapper.getitems(["key"]) == {"key": b"value"}
    assert "none" not in mapper
    with pytest.raises(ReadOnlyError):
        mapper["key"] = b"other"
    with pytest.raises(KeyError) as caught:  # what fsspec's mapper makes of any error here
        del mapper["key"]
    assert isinstance(caught.value.__cause__, ReadOnlyError)
