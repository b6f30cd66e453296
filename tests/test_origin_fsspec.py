"""Origins other than S3: the local disk, plain web servers, and what goes through fsspec (memory, zip and tar in
S3, sftp)."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import io
import json
import os
import socket
import tarfile
import threading
import zipfile
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import pytest

from cachefs.errors import (
    CacheFSError,
    IsADirectory,
    ObjectNotFound,
    OriginAccessDenied,
    OriginError,
    OriginUnreachable,
    StaleObject,
    UnsupportedOrigin,
)
from cachefs.messages import Entry
from cachefs.origin import Origin, OriginSpec, open_origin, parse_origin
from cachefs.origin.generic_info import entry_of
from tests.conftest import Bucket, ThrottledBucket

TREE = {"a.jpg": b"first", "d/b.jpg": b"second", "d/e/c.jpg": b"third", "d.jpg": b"beside d", "empty": b""}


@contextlib.asynccontextmanager
async def opened(url: str, options: dict[str, Any] | None = None) -> AsyncIterator[tuple[Origin, str]]:
    spec, path = parse_origin(url, options or {})
    origin = open_origin(spec)
    try:
        yield origin, path
    finally:
        await origin.aclose()


async def collect(pages: AsyncIterator[list[Entry]]) -> list[Entry]:
    return [entry async for page in pages for entry in page]


async def assert_serves(origin: Origin, root: str, tree: dict[str, bytes]) -> None:
    """The origin has exactly this tree below root, and serves it in every way."""
    entries = {entry.path: entry for entry in await collect(origin.list_all(root))}
    assert set(entries) == {f"{root}/{name}" for name in tree}
    for name, data in tree.items():
        path = f"{root}/{name}"
        entry = await origin.head(path)
        assert entry == entries[path]
        assert (entry.size, entry.directory) == (len(data), False)
        assert entry.version
        assert await origin.get(path, version=entry.version, limit=100) == (entry, data)
        assert await origin.get_range(path, 1, 3, version=entry.version) == data[1:3] if data else True
        if data:
            assert await origin.get(path, version="", limit=len(data) - 1) == (entry, None)
        with pytest.raises(StaleObject, match="cachefs refresh"):
            await origin.get(path, version="another", limit=100)
    assert (await origin.head(f"{root}/d")).directory
    with pytest.raises(ObjectNotFound):
        await origin.head(f"{root}/none")
    level = {entry.path: entry.directory for entry in await collect(origin.list_level(f"{root}/d"))}
    assert level == {f"{root}/d/e": True, f"{root}/d/b.jpg": False}
    await origin.check(root)


# --- local disk -----------------------------------------------------------------------------------------------


def plant(folder: Path, tree: dict[str, bytes]) -> None:
    for name, data in tree.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


async def test_local(tmp_path: Path) -> None:
    plant(tmp_path, TREE)
    async with opened(str(tmp_path)) as (origin, root):
        await assert_serves(origin, root, TREE)
        assert origin.identity == "file"


async def test_local_listing_is_in_key_order_and_goes_on(tmp_path: Path) -> None:
    names = ["a/x", "a.b", "a/y/z", "a0", "a-", "b", "é", "a/y.z"]
    plant(tmp_path, dict.fromkeys(names, b"1"))
    async with opened(str(tmp_path)) as (origin, root):
        paths = [entry.path for entry in await collect(origin.list_all(root))]
        assert paths == sorted(f"{root}/{name}" for name in names)
        for at, path in enumerate(paths):
            assert [e.path for e in await collect(origin.list_all(root, after=path))] == paths[at + 1 :]


async def test_local_odd_names_links_and_special_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    plant(root, {"new\nline": b"1", "d/x": b"2", "ctl\x01": b"3", "tab\t": b"4"})
    (root / os.fsdecode(b"\xff\xfe")).write_bytes(b"5")
    (root / "link").symlink_to("d/x")
    (root / "dangling").symlink_to("nowhere")
    (root / "self").symlink_to("self")
    (root / "d/up").symlink_to("..")
    (tmp_path / "outside").mkdir()
    plant(tmp_path / "outside", {"y": b"6"})
    (root / "linked").symlink_to("../outside")
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(root / "socket"))
    async with opened(str(root)) as (origin, top):
        entries = await collect(origin.list_all(top))
        names = {entry.path.removeprefix(f"{top}/") for entry in entries}
        assert names == {"new\nline", "d/x", "ctl\x01", "tab\t", os.fsdecode(b"\xff\xfe"), "link", "linked/y"}
        assert (await origin.get(f"{top}/new\nline", version="", limit=10))[1] == b"1"
        assert (await origin.get(f"{top}/link", version="", limit=10))[1] == b"2"


async def test_a_local_directory_removed_while_it_is_listed_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, {"a/x": b"1", "b/x": b"2", "c/x": b"3"})
    real = os.listdir

    def listdir(path: str) -> list[str]:
        if path.endswith("/b"):
            raise FileNotFoundError(2, "gone", path)
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    async with opened(str(tmp_path)) as (origin, root):
        assert [e.path for e in await collect(origin.list_all(root))] == [f"{root}/a/x", f"{root}/c/x"]


async def test_a_local_listing_that_fails_midway_never_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, {f"{name}/{i}": b"1" for name in "ab" for i in range(1500)})
    real = os.listdir

    def listdir(path: str) -> list[str]:
        if path.endswith("/b"):
            raise OSError(116, "Stale file handle", path)
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    async with opened(str(tmp_path)) as (origin, root):
        with pytest.raises(OriginError):
            await collect(origin.list_all(root))


async def test_local_file_rewritten_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"old" * 1000)
    real = os.pread

    def slow(fd: int, count: int, at: int) -> bytes:
        data = real(fd, count, at)
        file.write_bytes(b"new" * 1000)
        os.utime(file, ns=(1, 1))
        return data

    async with opened(str(tmp_path)) as (origin, _):
        version = (await origin.head(str(file))).version
        monkeypatch.setattr(os, "pread", slow)
        with pytest.raises(StaleObject):
            await origin.get(str(file), version=version, limit=10_000)


async def test_local_file_replaced_is_stale(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"old")
    async with opened(str(tmp_path)) as (origin, _):
        version = (await origin.head(str(file))).version
        (tmp_path / "b").write_bytes(b"newer")
        os.replace(tmp_path / "b", file)
        with pytest.raises(StaleObject):
            await origin.get_range(str(file), 0, 1, version=version)


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


async def test_memory(memory: Any) -> None:
    for name, data in TREE.items():
        memory.pipe_file(f"/root/{name}", data)
    async with opened("memory://root") as (origin, root):
        await assert_serves(origin, root, TREE)
        version = (await origin.head("/root/a.jpg")).version
        memory.pipe_file("/root/a.jpg", b"other")
        with pytest.raises(StaleObject):
            await origin.get_range("/root/a.jpg", 0, 2, version=version)
        with pytest.raises(IsADirectory):
            await origin.get("/root/d", version="", limit=10)
        with pytest.raises(ObjectNotFound):
            await collect(origin.list_all("/root/a.jpg"))


async def test_a_file_changed_around_the_read_is_stale(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/a", b"old")
    real = type(memory).cat_file

    def cat_file(self: Any, path: str, **kwargs: Any) -> Any:
        data = real(self, path, **kwargs)
        memory.pipe_file("/a", b"new")
        return data

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    async with opened("memory://a") as (origin, path):
        with pytest.raises(StaleObject):
            await origin.get(path, version="", limit=10)


async def test_passing_failures_are_tried_again(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/a", b"data")
    real = type(memory).cat_file
    left = 2

    def cat_file(self: Any, path: str, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise ConnectionResetError("gone")
        return real(self, path, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    async with opened("memory://a") as (origin, path):
        assert (await origin.get(path, version="", limit=10))[1] == b"data"
    left = 10**9
    async with opened("memory://a", {"retry_timeout": 0.2}) as (origin, path):
        with pytest.raises(OriginUnreachable):
            await origin.get(path, version="", limit=10)


# --- archives in S3 -------------------------------------------------------------------------------------------


def zipped(tree: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in tree.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(tree: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in tree.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


async def test_zip_in_s3(bucket: Bucket) -> None:
    tree = {f"root/{name}": data for name, data in TREE.items()}
    path = bucket.put("x.zip", zipped(tree))
    async with opened(f"zip://root::s3://{path}", {"s3": bucket.options}) as (origin, root):
        assert root == "root"
        await assert_serves(origin, root, TREE)


async def test_a_replaced_archive_is_read_anew(bucket: Bucket) -> None:
    path = bucket.put("x.zip", zipped({"a": b"old" * 100, "same": b"stays"}))
    async with opened(f"zip://::s3://{path}", {"s3": bucket.options}) as (origin, _):
        old, same = await origin.head("a"), await origin.head("same")
        bucket.put("x.zip", zipped({"before": os.urandom(5000), "a": b"new" * 100, "same": b"stays"}))
        with pytest.raises(StaleObject):
            await origin.get("a", version=old.version, limit=10_000)
        assert (await origin.get("a", version="", limit=10_000))[1] == b"new" * 100
        assert (await origin.get("same", version=same.version, limit=10))[1] == b"stays"


async def test_zip_in_s3_with_credentials_of_the_captured_environment(bucket: Bucket) -> None:
    path = bucket.put("x.zip", zipped({"a": b"1"}))
    spec, _ = parse_origin(f"zip://::s3://{path}", {"s3": {"endpoint_url": bucket.endpoint}})
    environ = {"AWS_ACCESS_KEY_ID": bucket.options["key"], "AWS_SECRET_ACCESS_KEY": bucket.options["secret"]}
    origin = open_origin(OriginSpec(spec.protocol, spec.options, environ))
    assert (await origin.get("a", version="", limit=10))[1] == b"1"
    await origin.aclose()


async def test_zip_in_s3_with_wrong_credentials(bucket: Bucket) -> None:
    path = bucket.put("x.zip", zipped({"a": b"1"}))
    async with opened(f"zip://::s3://{path}", {"s3": {**bucket.options, "secret": "SECRET4711"}}) as (origin, _):
        with pytest.raises(OriginAccessDenied) as caught:
            await origin.get("a", version="", limit=10)
    assert "SECRET4711" not in str(caught.value)


async def test_many_reads_of_a_tar_at_once_never_mix(tmp_path: Path) -> None:
    tree = {f"d/{i:03}": os.urandom(3000 + i) for i in range(100)}
    (tmp_path / "x.tar").write_bytes(tarred(tree))
    async with opened(f"tar://::file://{tmp_path}/x.tar") as (origin, _):
        found = await asyncio.gather(*(origin.get(name, version="", limit=10_000) for name in tree))
    assert [data for _, data in found] == list(tree.values())


# --- sftp -----------------------------------------------------------------------------------------------------


async def test_sftp(tmp_path: Path) -> None:
    paramiko = pytest.importorskip("paramiko", reason="fsspec's sftp needs paramiko, which is not installed")
    plant(tmp_path, TREE)
    with sftp_server(paramiko, tmp_path) as port:
        options = {"username": "user", "password": "SECRET4711", "retry_timeout": 1}
        async with opened(f"sftp://127.0.0.1:{port}/root", options) as (origin, root):
            assert root == "/root"
            await assert_serves(origin, root, TREE)
            assert "SECRET4711" not in origin.identity
        async with opened(f"sftp://127.0.0.1:{port}/root", {**options, "password": "wrong"}) as (origin, root):
            with pytest.raises(OriginAccessDenied):
                await origin.head(root)


@contextlib.contextmanager
def sftp_server(paramiko: Any, folder: Path) -> Iterator[int]:
    """An SFTP server in this process that shows `folder` as /root, read-only."""

    class Doors(paramiko.ServerInterface):  # type: ignore[misc]
        def check_auth_password(self, username: str, password: str) -> Any:
            return paramiko.AUTH_SUCCESSFUL if password == "SECRET4711" else paramiko.AUTH_FAILED

        def get_allowed_auths(self, username: str) -> str:
            return "password"

        def check_channel_request(self, kind: str, chanid: int) -> Any:
            return paramiko.OPEN_SUCCEEDED

    def attributes(file: Path) -> Any:
        found = paramiko.SFTPAttributes.from_stat(file.stat())
        found.filename = file.name
        return found

    class Files(paramiko.SFTPServerInterface):  # type: ignore[misc]
        def file(self, path: str) -> Path:
            return folder / path.removeprefix("/root").lstrip("/")

        def list_folder(self, path: str) -> Any:
            return [attributes(file) for file in self.file(path).iterdir()]

        def stat(self, path: str) -> Any:
            try:
                return attributes(self.file(path))
            except OSError as error:
                return paramiko.SFTPServer.convert_errno(error.errno)

        lstat = stat

        def open(self, path: str, flags: int, attr: Any) -> Any:
            handle = paramiko.SFTPHandle(flags)
            handle.readfile = self.file(path).open("rb")
            return handle

    key = paramiko.ECDSAKey.generate()
    listener = socket.create_server(("127.0.0.1", 0))
    transports: list[Any] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                raw, _ = listener.accept()
                transport = paramiko.Transport(raw)
                transport.add_server_key(key)
                transport.set_subsystem_handler("sftp", paramiko.SFTPServer, Files)
                transports.append(transport)
                transport.start_server(server=Doors(), event=threading.Event())

    thread = threading.Thread(target=serve)
    thread.start()
    yield int(listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()
    for transport in transports:
        transport.close()


# --- plain web servers ----------------------------------------------------------------------------------------


class Web(http.server.SimpleHTTPRequestHandler):
    """Python's own server: Last-Modified but no ETag, no ranges, index pages."""

    protocol_version = "HTTP/1.1"
    requests: list[tuple[str, str, str | None]]

    def log_message(self, *args: Any) -> None: ...

    def send_head(self) -> Any:
        self.requests.append((self.command, self.path, self.headers.get("Authorization")))
        return super().send_head()


class Strange(http.server.BaseHTTPRequestHandler):
    """A server that redirects, signs, and knows neither HEAD nor Last-Modified."""

    protocol_version = "HTTP/1.1"
    etag = '"v1"'

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/object?sig=SECRET4711")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path.startswith("/loop"):
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if not self.path.startswith("/object") and self.path != "/enc%2Foded":
            self.send_error(404)
            return
        if "?" in self.path and not self.path.endswith("sig=SECRET4711"):
            self.send_error(403)
            return
        body = b"0123456789"
        asked = self.headers.get("Range", "")
        if asked:
            start, _, last = asked.removeprefix("bytes=").partition("-")
            part = body[int(start) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(body)}")
            body = part
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", type(self).etag)
        self.end_headers()
        self.wfile.write(body)


class Tagged(Web):
    """As clouds answer: with an ETag."""

    def end_headers(self) -> None:
        self.send_header("ETag", '"tag"')
        super().end_headers()


class Quiet(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle of an answer is part of these tests."""


@contextlib.contextmanager
def serving(handler: Any) -> Iterator[str]:
    server = Quiet(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "root").mkdir()
    plant(tmp_path / "root", TREE)
    Web.requests = []
    with serving(functools.partial(Web, directory=str(tmp_path))) as url:
        yield url


async def test_a_web_server_without_etags_and_ranges(web: str) -> None:
    async with opened(f"{web}/root") as (origin, root):
        entries = {unquote(e.path.removeprefix(f"{root}/")): e for e in await collect(origin.list_all(root))}
        assert set(entries) == set(TREE)
        for name, data in TREE.items():
            entry = entries[name]
            assert entry == await origin.head(f"{root}/{name}")
            assert await origin.get(entry.path, version=entry.version, limit=100) == (entry, data)
            if data:
                assert await origin.get_range(entry.path, 1, 3, version=entry.version) == data[1:3]
        with pytest.raises(ObjectNotFound):
            await origin.get(f"{root}/none", version="", limit=10)
        with pytest.raises(StaleObject):
            await origin.get(f"{root}/a.jpg", version="1-1", limit=10)
        level = {entry.path: entry.directory for entry in await collect(origin.list_level(f"{root}/d"))}
        assert level == {f"{root}/d/e": True, f"{root}/d/b.jpg": False}


async def test_headers_reach_the_server(web: str) -> None:
    async with opened(f"{web}/root", {"headers": {"Authorization": "Bearer T"}}) as (origin, root):
        await origin.get(f"{root}/a.jpg", version="", limit=10)
        await collect(origin.list_level(root))
    assert {authorization for _, _, authorization in Web.requests} == {"Bearer T"}


async def test_signed_urls_ranges_and_redirects() -> None:
    with serving(Strange) as url:
        signed = f"{url}/object?sig=SECRET4711"
        async with opened(signed) as (origin, path):
            assert path == signed
            entry, data = await origin.get(path, version="v1", limit=100)
            assert (entry.size, entry.version, data) == (10, "v1", b"0123456789")
            assert (await origin.head(path)).size == 10
            assert await origin.get_range(path, 3, 6, version="v1") == b"345"
            assert await origin.get(path, version="", limit=9) == (entry, None)
            with pytest.raises(StaleObject) as stale:
                await origin.get(path, version="v2", limit=100)
            with pytest.raises(OriginAccessDenied) as denied:
                await origin.get(f"{url}/object?sig=SECRET4712", version="", limit=100)
            assert "SECRET471" not in f"{stale.value} {denied.value}"
            assert (await origin.get(f"{url}/enc%2Foded", version="", limit=100))[1] == b"0123456789"
        async with opened(f"{url}/moved") as (origin, path):
            assert (await origin.get(path, version="", limit=100))[1] == b"0123456789"
        async with opened(f"{url}/loop?x") as (origin, path):
            with pytest.raises(OriginError, match="redirects without end"):
                await origin.get(path, version="", limit=100)


async def test_an_object_of_a_server_that_knows_no_head() -> None:
    with serving(Strange) as url:
        async with opened(f"{url}/object", {"retry_timeout": 0}) as (origin, path):
            assert (await origin.head(path)).size == 10
            assert await origin.get_range(path, 3, 6, version="v1") == b"345"


async def test_a_web_server_without_an_index_cannot_be_listed() -> None:
    with serving(Strange) as url:
        async with opened(f"{url}/object") as (origin, path):
            with pytest.raises(UnsupportedOrigin, match="plain http cannot be listed"):
                await collect(origin.list_level(path))


# --- clouds, as far as they can be had here -------------------------------------------------------------------


async def test_gs_and_az_read_through_an_endpoint(tmp_path: Path) -> None:
    """The paths and headers of both clouds, against a plain server: no server of theirs runs here."""
    plant(tmp_path, {"bucket/a": b"cloud"})
    Web.requests = []
    with serving(functools.partial(Tagged, directory=str(tmp_path))) as endpoint:
        for url, options in (
            ("gs://bucket/a", {"token": "anon", "endpoint_url": endpoint}),
            ("gs://bucket/a", {"token": "BEARER", "endpoint_url": endpoint}),
            ("az://bucket/a", {"account_name": "x", "anon": True, "endpoint": endpoint}),
            ("abfs://bucket@x.dfs.core.windows.net/a", {"sas_token": "sv=1&sig=abc", "endpoint": endpoint}),
        ):
            async with opened(url, options) as (origin, path):
                entry, data = await origin.get(path, version="tag", limit=10)
                assert (data, entry.version, entry.size) == (b"cloud", "tag", 5)
                with pytest.raises(ObjectNotFound):
                    await origin.get("bucket/none", version="", limit=10)
                with pytest.raises(StaleObject):
                    await origin.get(path, version="other", limit=10)
    assert "Bearer BEARER" in {authorization for _, _, authorization in Web.requests}


async def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.util import find_spec

    if find_spec("gcsfs"):
        pytest.skip("gcsfs is installed here")
    async with opened("gs://bucket/a", {"token": "anon", "endpoint_url": "http://127.0.0.1:9"}) as (origin, _):
        with pytest.raises(UnsupportedOrigin, match="gcsfs"):
            await origin.get("bucket/a//b", version="", limit=10)


# --- what file systems say about their files ------------------------------------------------------------------


MD5_OF_TEST = "098f6bcd4621d373cade4e832627b4f6"


@pytest.mark.parametrize(
    ("info", "version", "mtime_ns"),
    [
        ({"ETag": '"abc"', "LastModified": datetime(2026, 1, 1, tzinfo=UTC)}, "abc", 1767225600 * 10**9),
        ({"mtime": 1767225600.25}, "1767225600250000000-7", 1767225600250000000),
        ({"mtime": datetime(2026, 1, 1, 0, 0, 0, 1)}, "1767225600000001000-7", 1767225600000001000),
        ({"modificationTime": 1767225600250}, "1767225600250000000-7", 1767225600250000000),
        ({"CRC": 255, "date_time": (2026, 1, 1, 0, 0, 0)}, "crc:ff", 1767225600 * 10**9),
        ({"updated": "2026-01-01T00:00:00Z", "generation": "17"}, "17", 1767225600 * 10**9),
        (
            {"kind": "storage#object", "md5Hash": "CY9rzUYh03PK3k6DJie09g==", "etag": "CJ="},
            "098f6bcd4621d373cade4e832627b4f6",
            0,
        ),
        ({}, "0-7", 0),
    ],
)
def test_versions_and_times(info: dict[str, Any], version: str, mtime_ns: int) -> None:
    entry = entry_of({"name": "a", "size": 7, "type": "file", **info})
    assert (entry.version, entry.mtime_ns) == (version, mtime_ns)


def test_directories_have_no_version() -> None:
    assert entry_of({"name": "a/", "size": 0, "type": "directory", "CRC": 0}) == Entry("a", 0, 0, "", directory=True)


def test_every_error_here_crosses_to_the_reader() -> None:
    from cachefs.errors import from_wire, to_wire

    error = StaleObject("x", path="p")
    assert isinstance(from_wire(tuple(json.loads(json.dumps(to_wire(error))))), CacheFSError)


async def test_through_a_throttle_the_archive_costs_no_more_than_it_must(throttled: ThrottledBucket) -> None:
    """Reading a member asks for the archive's version around the read, and never for the whole archive."""
    path = throttled.put("x.zip", zipped({"big": os.urandom(30_000_000), "a": b"1"}))
    async with opened(f"zip://::s3://{path}", {"s3": throttled.options}) as (origin, _):
        assert (await origin.get("a", version="", limit=10))[1] == b"1"
    assert throttled.throttle.traffic().bytes_down < 20_000_000
