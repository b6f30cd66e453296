"""What a user gets wrong is said in one or two lines with what to do, a meaningful code, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs_sidecar.testbed import stop_fetcher
from tests.command_line import CommandLine, credentials, s3, script
from tests.conftest import Bucket

SECRET = "do-not-show-this-to-anybody"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "origin"
    root.mkdir()
    (root / "a.jpg").write_bytes(b"a" * 1000)
    return root


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    folder = tmp_path / "mnt"
    folder.mkdir()
    return folder


# --- usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["wram", "x"], ["wram", "warm"]),
        (["warm"], ["ORIGIN"]),
        (["warm", "x", "--colour"], ["--colour"]),
        (["warm", ""], ["ORIGIN is empty"]),
        (["warm", "x", "--size", "12Q"], ["12Q", "200G"]),
        (["warm", "x", "--size", "-1G"], ["-1G"]),
        (["warm", "x", "--min-free", "120%"], ["120%", "99%"]),
        (["warm", "x", "--cache-dir", ""], ["--cache-dir", "empty"]),
        (["warm", "x", "-d", "/tmp/one", "-d", "/tmp/one"], ["twice"]),
        (["warm", "x", "-0"], ["--list"]),
        (["warm", "x", "--list", "/no/such/list"], ["/no/such/list", "No such file"]),
        (["warm", "x", "-o", "endpoint"], ["KEY=VALUE"]),
        (["warm", "x", "-o", "=5"], ["KEY=VALUE"]),
        (["warm", "x", "-o", "a..b=5"], ["KEY=VALUE"]),
        (["warm", "x", "-o", "a=5", "-o", "a.b=5"], ["a.b", "plain value"]),
        (["warm", "x", "-o", "port:=twenty"], ["port", "JSON"]),
        (["warm", "x", "-o", "secret=@/no/such/file"], ["secret", "/no/such/file"]),
        (["warm", "x", "-o", "secret=@env:NO_SUCH_VARIABLE"], ["secret", "NO_SUCH_VARIABLE"]),
        (["doctor", "-o", "key=@env:HOME"], ["ORIGIN"]),
        (["warm", "s3x://bucket"], ["s3x://", "s3://"]),
        (["warm", "cachefs://bucket"], ["is a cache"]),
        (["mount", "s3://bucket", "/mnt", "--workers", "0"], ["--workers"]),
        (["evict", "s3://bucket"], ["knows no such dataset", "cachefs status"]),
        (["refresh", "s3://bucket"], ["knows no such dataset"]),
        (["pin", "s3://bucket"], ["knows no such dataset", "cachefs status"]),
        (["unpin", "s3://bucket"], ["knows no such dataset"]),
        (["pin", ""], ["ORIGIN is empty"]),
        (["pin"], ["ORIGIN"]),
        (["status", "--skipped", "s3://bucket"], ["knows no such dataset"]),
    ],
)
def test_usage(cachefs: CommandLine, cache_dir: Path, arguments: list[str], words: list[str]) -> None:
    cachefs(*arguments).failed(2, *words)
    assert not cache_dir.exists()


def test_options_from_files_and_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cachefs.cli.options import origin_options

    (tmp_path / "secret").write_text("from file\n")
    monkeypatch.setenv("FROM", "environment")
    given = [
        f"secret=@{tmp_path}/secret", "key=@env:FROM", "anon=False", "port:=22", "user=@@home", "url=a=b",
        "client_kwargs.region_name=eu", "client_kwargs.config.s3:={\"x\": 1}",
    ]  # fmt: skip
    assert origin_options(given) == {
        "secret": "from file",
        "key": "environment",
        "anon": False,
        "port": 22,
        "user": "@home",
        "url": "a=b",
        "client_kwargs": {"region_name": "eu", "config": {"s3": {"x": 1}}},
    }


def test_secrets_on_the_command_line_are_remarked_upon_and_never_repeated(cachefs: CommandLine) -> None:
    options = ["-o", f"secret={SECRET}", "-o", "key=abcdef", "-o", "anon=true", "-o", "token=anon"]
    outcome = cachefs("evict", "s3://bucket", *options)
    assert outcome.err.count("warning") == 1
    assert "secret, key: " in outcome.err
    assert "@FILE" in outcome.err
    assert SECRET not in outcome.said
    assert SECRET not in cachefs("evict", "s3://bucket", "-o", f"{SECRET}").said  # forgot KEY=
    assert SECRET not in cachefs("evict", f"s3://user:{SECRET}@bucket/x?signature={SECRET}").said


def test_lists_that_are_no_lists(cachefs: CommandLine, tree: Path, tmp_path: Path) -> None:
    listing = tmp_path / "names"
    listing.write_bytes(b"\xff\xfe\n")
    cachefs("warm", tree, "--list", listing).failed(2, "name 1", "UTF-8")
    listing.write_bytes(b"a.jpg\0b.jpg\0")
    cachefs("warm", tree, "--list", listing).failed(2, "-0")
    listing.write_bytes(b"no-such.jpg\na.jpg\n")
    outcome = cachefs("warm", tree, "--list", listing)
    assert outcome.code == 1
    assert "no-such.jpg" in outcome.said
    cachefs("warm", tree).ok()
    many = [f"no-such-{number:05d}-{'x' * 100}.jpg" for number in range(2000)]  # more than a packet holds
    listing.write_text("\n".join([*many, "a.jpg"]))
    done = cachefs("warm", tree, "--list", listing, "--json")
    assert (done.code, done.json["objects"], done.json["failed"]) == (1, 1, 2000)
    assert "1,990 more" in cachefs("warm", tree, "--list", listing).said


def test_what_is_pinned_is_a_whole_dataset(cachefs: CommandLine, tree: Path) -> None:
    cachefs("warm", tree).ok()
    cachefs("pin", tree / "a.jpg").failed(2, "is part of the dataset", str(tree))
    cachefs("pin", tree.parent).failed(2, "holds", str(tree))
    cachefs("pin", "/proc").failed(4, "not a mount of cachefs")
    assert cachefs("status", "--json").ok().json["datasets"][0]["pinned"] is False


def test_defects_of_ours_are_one_line_too(cachefs: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("cachefs.cli.verify.cache_config", broken)
    outcome = cachefs("verify").failed(70, "internal error", "CACHEFS_DEBUG=1")
    assert "Traceback" not in outcome.err
    monkeypatch.setenv("CACHEFS_DEBUG", "1")
    assert "Traceback" in cachefs("verify").err


# --- the origin ---------------------------------------------------------------------------------------------


def test_wrong_credentials_are_said_as_such_and_not_printed(
    bucket: Bucket, cachefs: CommandLine, mnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("a.jpg", b"a")
    monkeypatch.setenv("TEST_KEY", bucket.options["key"])
    monkeypatch.setenv("TEST_SECRET", SECRET)
    for command in (["warm", bucket.url], ["mount", bucket.url, str(mnt)]):
        outcome = cachefs(*command, *s3(bucket.options)).failed(3)
        assert "credentials" in outcome.err
        assert "not found" not in outcome.err.lower()
        assert SECRET not in outcome.said
    assert not os.path.ismount(mnt)


def test_credentials_are_in_no_process_list_file_or_log(
    bucket: Bucket, cachefs: CommandLine, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket.put("a.jpg", b"a")
    secret = bucket.options["secret"]
    file = tmp_path / "secret"
    file.write_text(secret)
    options = [o.replace("@env:TEST_SECRET", f"@{file}") for o in s3(bucket.options)]
    monkeypatch.setenv("TEST_KEY", bucket.options["key"])
    cachefs("warm", bucket.url, *options).ok()
    holders = [p for p in (*cache_dir.rglob("*"), *(tmp_path / "runtime").rglob("*")) if _contains(p, secret.encode())]
    assert holders == []
    cachefs("stop").ok()


def _contains(file: Path, text: bytes) -> bool:
    return file.is_file() and text in file.read_bytes()


def test_a_bucket_and_a_prefix_that_do_not_exist(
    bucket: Bucket, cachefs: CommandLine, mnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("set/a.jpg", b"a")
    for name, value in credentials(bucket.options).items():
        monkeypatch.setenv(name, value)
    cachefs("mount", "s3://no-such-bucket", mnt, *s3(bucket.options)).failed(3, "no-such-bucket")
    cachefs("warm", bucket.url + "/no/such", *s3(bucket.options)).failed(3, "no/such")
    cachefs("warm", bucket.url + "/set/a.jpg", *s3(bucket.options)).failed(2, "not a directory")


def test_an_endpoint_where_nothing_answers(bucket: Bucket, cachefs: CommandLine, monkeypatch) -> None:
    options = {**bucket.options, "endpoint_url": "http://127.0.0.1:1"}
    for name, value in credentials(options).items():
        monkeypatch.setenv(name, value)
    cachefs("warm", bucket.url, *s3(options), "-o", "retry_timeout:=0.2").failed(3, "http://127.0.0.1:1", "endpoint")


def test_local_origins_that_are_not_there(cachefs: CommandLine, tree: Path, mnt: Path) -> None:
    cachefs("mount", tree / "nothing", mnt).failed(3, "nothing")
    cachefs("mount", tree / "a.jpg", mnt).failed(2, "not a directory")


# --- the mount point ----------------------------------------------------------------------------------------


@pytest.mark.needs_fuse
def test_mount_points_that_cannot_be_used(cachefs: CommandLine, tree: Path, tmp_path: Path, mnt: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    cachefs("mount", tree, tmp_path / "missing").failed(4, "missing", "does not exist", "mkdir")
    cachefs("mount", tree, file).failed(4, "is a file")
    cachefs("mount", tree, full).failed(4, "not empty")
    cachefs("mount", tree, tmp_path).failed(4, "cache directory")
    cachefs("mount", tree, tree).failed(4, "origin")
    cachefs("mount", tree, "/proc").failed(4, "already a mount")
    cachefs("umount", mnt).failed(4, "nothing is mounted")
    cachefs("umount", "/proc").failed(4, "not one of cachefs")
    cachefs("refresh", "/proc").failed(4, "not a mount of cachefs")
    assert (full / "something").exists()


@pytest.mark.needs_fuse
def test_a_mount_point_that_is_mounted_already(cachefs: CommandLine, tree: Path, mnt: Path) -> None:
    cachefs("mount", tree, mnt).ok()
    cachefs("mount", tree, mnt).failed(4, "already a mount", "cachefs umount")
    assert (mnt / "a.jpg").read_bytes() == b"a" * 1000
    cachefs("umount", mnt).ok()


# --- the cache ----------------------------------------------------------------------------------------------


def test_a_cache_directory_that_is_a_file(cachefs: CommandLine, tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    for command in (["warm", str(tree)], ["verify"], ["stop"], ["status"]):
        cachefs(*command, "-d", file).failed(4, "not a directory", "--cache-dir")
        cachefs(*command, "-d", file / "below").failed(4, "not a directory", "--cache-dir")
    assert file.read_text() == "precious"


def test_a_cache_directory_full_of_something_else(cachefs: CommandLine, tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1").write_text("precious")
    cachefs("warm", tree, "-d", other).failed(4, "chapter1", "choose")
    assert (other / "chapter1").read_text() == "precious"


@pytest.mark.needs_fuse
def test_a_cache_of_a_future_format_is_refused_and_untouched(
    cachefs: CommandLine, tree: Path, cache_dir: Path, mnt: Path
) -> None:
    cachefs("warm", tree).ok()
    cachefs("stop").ok()
    marker = cache_dir / "cachefs.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 2}))
    before = {p: p.stat().st_mtime_ns for p in cache_dir.rglob("*") if p.is_file() and "run" not in p.parts}
    for command in (["warm", str(tree)], ["mount", str(tree), str(mnt)], ["verify"], ["evict", str(tree)]):
        cachefs(*command).failed(4, "newer cachefs", "format 2")
    assert before == {p: p.stat().st_mtime_ns for p in cache_dir.rglob("*") if p.is_file() and "run" not in p.parts}


def test_a_damaged_catalog_is_listed_again_and_said_once(cachefs: CommandLine, tree: Path, cache_dir: Path) -> None:
    cachefs("warm", tree).ok()
    (catalog,) = (cache_dir / "catalogs").rglob("*.sqlite")
    catalog.chmod(0o600)
    catalog.write_bytes(catalog.read_bytes()[:100])
    assert "cannot be used" in cachefs("status").ok().out
    assert cachefs("warm", tree).ok().said.count("was damaged") == 1
    assert cachefs("warm", tree).ok().err == ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB. Only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield folder
    stop_fetcher(folder / "cache")
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.needs_root
def test_a_cache_on_a_read_only_file_system(cachefs: CommandLine, tree: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    cachefs("warm", tree, "-d", small_disk / "cache").failed(4, "cache", "--cache-dir")
    doctor = cachefs("doctor", "-d", small_disk / "cache")
    assert doctor.code == 1
    assert "not writable" in doctor.out


@pytest.mark.needs_root
def test_a_disk_that_is_full_keeps_nothing_but_fails_nothing(
    cachefs: CommandLine, tree: Path, small_disk: Path
) -> None:
    for number in range(6):
        (tree / f"{number}.jpg").write_bytes(os.urandom(600_000))
    done = cachefs("warm", tree, "-d", small_disk / "cache", "--json").ok().json
    assert done["failed"] == 0
    assert cachefs("status", "-d", small_disk / "cache", "--json").ok().json["cache"]["used"] < 2 * 1024**2


@pytest.mark.needs_root
def test_a_cache_of_another_user(tree: Path, tmp_path: Path) -> None:
    """Root without its right to ignore permissions is a user like any other, and can still run what is installed."""
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 65534, 65534)
    plain = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    for command in (["status"], ["warm", str(tree)], ["verify"], ["stop"]):
        script(*command, "-d", theirs, wrapper=plain).failed(4, str(theirs), "ermission")
