"""fsspec's own tests of `get`, on a real S3 server and on local storage.

Only those: its other abstract tests write, and this file system refuses to (tests/test_filesystem.py). They seed
through `fs` itself, so here the origin is seeded behind it instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.tests.abstract import AbstractFixtures, AbstractGetTests

from cachefs.client import Connection
from cachefs.config import CacheConfig
from cachefs_sidecar.testbed import stop_fetcher
from tests.machine import Bucket


class Seeded(AbstractFixtures):  # type: ignore[misc]  # fsspec is untyped
    """The scenarios of fsspec, made in `folder`, the directory that the origin serves as `fs_path`."""

    @pytest.fixture
    def folder(self) -> Path:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def shared_cache(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        """One cache for all of them, since each has names of its own, with its fetcher running already."""
        home = tmp_path_factory.mktemp("cache") / "home"
        config = CacheConfig.make(home, min_free=0)
        connection = Connection(config, None)
        connection.status()
        connection.close()
        yield str(home)
        stop_fetcher(home)

    @pytest.fixture
    def seeds(self) -> LocalFileSystem:
        return LocalFileSystem(auto_mkdir=True)

    @pytest.fixture
    def fs_bulk_operations_scenario_0(self, seeds, folder, fs_join, fs_path):
        self._bulk_operations_scenario_0(seeds, fs_join, str(folder))
        return fs_join(fs_path, "source")

    @pytest.fixture
    def fs_glob_edge_cases_files(self, seeds, folder, fs_join, fs_path):
        self._glob_edge_cases_files(seeds, fs_join, str(folder))
        return fs_join(fs_path, "source")

    @pytest.fixture
    def fs_dir_and_file_with_same_name_prefix(self, seeds, folder, fs_join, fs_path):
        self._dir_and_file_with_same_name_prefix(seeds, fs_join, str(folder))
        return fs_join(fs_path, "source")

    @pytest.fixture
    def fs_10_files_with_hashed_names(self, seeds, folder, fs_join, fs_path):
        self._10_files_with_hashed_names(seeds, fs_join, str(folder))
        return fs_join(fs_path, "source")


class GetTests(Seeded, AbstractGetTests):  # type: ignore[misc]
    def test_get_directory_recursive(self, fs, fs_join, fs_path, local_fs, local_join, local_target, folder):
        """The original makes its source through `fs`; otherwise unchanged."""
        source = fs_join(fs_path, "src")
        (folder / "src").mkdir()
        (folder / "src" / "file").touch()
        for repeated in (False, True):
            fs.get(source, local_target, recursive=True)
            assert local_fs.isfile(local_join(local_target, "file"))
            assert local_fs.isfile(local_join(local_target, "src", "file")) == repeated
        local_fs.rm(local_target, recursive=True)
        for _ in range(2):
            fs.get(source + "/", local_target, recursive=True)
            assert local_fs.isfile(local_join(local_target, "file"))
            assert not local_fs.exists(local_join(local_target, "src"))


class TestGetFromS3(GetTests):
    @pytest.fixture
    def folder(self, bucket: Bucket) -> Path:
        return bucket.folder

    @pytest.fixture
    def fs(self, bucket: Bucket, shared_cache: str) -> Any:
        return fsspec.filesystem(
            "cachefs", target_protocol="s3", target_options=bucket.options, cache_dir=shared_cache, min_free="0"
        )

    @pytest.fixture
    def fs_path(self, bucket: Bucket) -> str:
        return bucket.name


class TestGetFromLocal(GetTests):
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "origin"
        folder.mkdir()
        return folder

    @pytest.fixture
    def fs(self, shared_cache: str) -> Any:
        return fsspec.filesystem("cachefs", target_protocol="file", cache_dir=shared_cache, min_free="0")

    @pytest.fixture
    def fs_path(self, folder: Path) -> str:
        return str(folder)
