"""The main job as users see it: the command mounts real origins, and ordinary tools see what a plain copy has."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from cachefs_sidecar.testbed import S3Server
from tests.command_line import s3, script
from tests.machine import Bucket

pytestmark = pytest.mark.needs_fuse

# A whole second, since S3 has no finer times in its headers: rsync and ls compare them.
MTIME = 1_700_000_000


@contextlib.contextmanager
def mounted(origin: str, folder: Path, home: Path, *options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    script("mount", origin, folder, "--cache-dir", home, *options).ok()
    try:
        yield folder
    finally:
        script("umount", folder).ok()


@pytest.fixture
def keys(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("TEST_KEY", bucket.options["key"])
    monkeypatch.setenv("TEST_SECRET", bucket.options["secret"])
    return s3(bucket.options)


def make_tree(folder: Path) -> dict[str, bytes]:
    """Images, an empty file, odd names, depth, and a file of several blocks; every time a whole second."""
    files = {f"train/n{n % 5:02d}/{n:04d}.jpg": os.urandom(1000 + 997 * n) for n in range(60)}
    files |= {
        "empty": b"",
        "names/with space": b"1",
        "names/caf\u00e9": b"2",
        "names/cafe\u0301": b"3",
        "names/" + "x" * 250: b"4",
        "names/%41?#&=+;": b"5",
        "a/deep/er/tree/of/directories/file": b"6",
        "shards/large.bin": os.urandom(1 << 20) * 19,
    }
    for name, data in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        file.chmod(0o444)
        os.utime(file, (MTIME, MTIME))
    return files


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, timeout=60, check=False, cwd=cwd)
    assert done.returncode == 0, (command, done.stdout.decode(), done.stderr.decode())
    return done.stdout.decode(errors="surrogateescape")


def listing(folder: Path) -> list[str]:
    """`ls -lR` without what an object store does not know: sizes, links and times of directories."""
    lines = run("ls", "-lR", "--time-style=full-iso", folder).replace(str(folder), "").splitlines()
    return [re.sub(r"^(d\S+) .* (\S+)$", r"d \2", line) for line in lines if not line.startswith("total ")]


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_ordinary_tools_see_no_difference(kind, bucket: Bucket, keys, cache_dir: Path, tmp_path: Path):
    files = make_tree(bucket.folder)
    origin, options = (bucket.url, keys) if kind == "s3" else (str(bucket.folder), [])
    plain = tmp_path / "plain"
    run("cp", "-a", bucket.folder, plain)
    with mounted(origin, tmp_path / "mnt", cache_dir, *options) as mnt:
        run("diff", "-r", plain, mnt)
        assert (
            run("rsync", "-rlt", "--checksum", "--dry-run", "--itemize-changes", "--omit-dir-times", f"{plain}/", mnt)
            == ""
        )
        assert sorted(run("find", ".", cwd=mnt).split("\n")) == sorted(run("find", ".", cwd=plain).split("\n"))
        size = ["find", ".", "-type", "f", "-size", "+20k"]
        assert sorted(run(*size, cwd=mnt).split("\n")) == sorted(run(*size, cwd=plain).split("\n"))
        assert listing(mnt) == listing(plain)
        assert run("du", "-sb", "--apparent-size", "--threshold=1", *sorted(files)[:3], cwd=mnt) == run(
            "du", "-sb", "--apparent-size", "--threshold=1", *sorted(files)[:3], cwd=plain
        )
        run("tar", "-cf", tmp_path / "a.tar", ".", cwd=mnt)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    run("tar", "-xf", tmp_path / "a.tar", cwd=unpacked)
    run("diff", "-r", plain, unpacked)


def test_warmed_it_needs_no_origin(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "buckets" / "images"
    folder.mkdir(parents=True)
    files = make_tree(folder)
    with S3Server(folder.parent) as server:
        monkeypatch.setenv("TEST_KEY", server.options["key"])
        monkeypatch.setenv("TEST_SECRET", server.options["secret"])
        keys, options = s3(server.options), server.options
        script("warm", "s3://images", "--cache-dir", cache_dir, *keys).ok()
    with mounted("s3://images", tmp_path / "mnt", cache_dir, *keys) as mnt:
        assert {name: (mnt / name).read_bytes() for name in files} == files
    fs = fsspec.filesystem(
        "cachefs", target_protocol="s3", target_options=options, cache_dir=str(cache_dir), skip_instance_cache=True
    )
    assert {name: fs.cat_file(f"images/{name}") for name in files} == files
    assert sorted(fs.find("images")) == sorted(f"images/{name}" for name in files)


HOSTILE = {
    "a//b": b"no",
    "../x": b"no",
    "dir/../up": b"no",
    "./here": b"no",
    "/lead": b"no",
    "both": b"no: also a directory",
    "both/inside": b"yes",
    "slash/": b"no: content under a trailing slash",
    "marker/": b"",
    "x" * 256: b"no",
    "y" * 255: b"yes",
    "caf\u00e9": b"yes 1",
    "cafe\u0301": b"yes 2",
    "empty": b"",
    "ordinary.jpg": b"yes",
    "back\\slash": b"yes",
    "*?[x]": b"yes",
}


def test_hostile_names_are_served_or_skipped_with_a_reason(cache_dir: Path, tmp_path: Path, monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        endpoint = f"http://127.0.0.1:{port}"
        import botocore.session

        monkeypatch.setenv("TEST_KEY", "hostile-key")
        monkeypatch.setenv("TEST_SECRET", "hostile-secret")
        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="hostile-key",
            aws_secret_access_key="hostile-secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="odd-names")
        for key, data in HOSTILE.items():
            client.put_object(Bucket="odd-names", Key=key, Body=data)
        options = s3({"endpoint_url": endpoint, "client_kwargs": {"region_name": "us-east-1"}})
        with mounted("s3://odd-names", tmp_path / "mnt", cache_dir, *options) as mnt:
            served = {
                str(file.relative_to(mnt)): file.read_bytes() for file in sorted(mnt.rglob("*")) if file.is_file()
            }
            expected = {key: data for key, data in HOSTILE.items() if not data.startswith(b"no") and key != "marker/"}
            assert served == expected
            assert (mnt / "marker").is_dir()
        skipped = script("status", "--skipped", "s3://odd-names", "--cache-dir", cache_dir, *options).ok().out
        for key in (key for key, data in HOSTILE.items() if data.startswith(b"no")):
            assert key in skipped, key
        outside = {path.name for path in tmp_path.iterdir()} - {"cache", "mnt", "runtime"}
        assert not outside, "something escaped"
        assert not list(cache_dir.glob("**/x"))
    finally:
        server.stop()


def test_a_local_origin_with_odd_names(cache_dir: Path, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "new\nline").write_bytes(b"1")
    (source / "tab\there").write_bytes(b"2")
    Path(os.fsdecode(os.fsencode(source) + b"/not-utf8-\xff")).write_bytes(b"3")
    (source / "link").symlink_to("new\nline")
    with mounted(str(source), tmp_path / "mnt", cache_dir) as mnt:
        served = {file.name: file.read_bytes() for file in mnt.iterdir()}
    assert served == {"new\nline": b"1", "tab\there": b"2", "link": b"1"}
    assert "UTF-8" in script("status", "--skipped", str(source), "--cache-dir", cache_dir).ok().out


def test_two_mounts_share_one_cache(bucket: Bucket, keys, cache_dir: Path, tmp_path: Path):
    bucket.put("a/1", b"one")
    bucket.put("b/2", b"two")
    with (
        mounted(f"{bucket.url}/a", tmp_path / "a", cache_dir, *keys) as first,
        mounted(f"{bucket.url}/b", tmp_path / "b", cache_dir, *keys) as second,
        mounted(bucket.url, tmp_path / "all", cache_dir, *keys) as everything,
    ):
        assert (first / "1").read_bytes() == (everything / "a/1").read_bytes() == b"one"
        assert (second / "2").read_bytes() == (everything / "b/2").read_bytes() == b"two"
