"""The command line against real storage, real fetchers and real mounts."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from cachefs_sidecar.testbed import fetcher_pid, stop_fetcher
from tests.command_line import CommandLine, credentials, s3, script
from tests.conftest import ThrottledBucket
from tests.test_fetcher import wait_until


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A local origin: 20 files in two directories."""
    root = tmp_path / "origin"
    for number in range(20):
        file = root / ("train" if number % 2 else "val") / f"{number:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(5000 + number))
    return root


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    folder = tmp_path / "mnt"
    folder.mkdir()
    return folder


@pytest.fixture
def photos(throttled: ThrottledBucket, monkeypatch: pytest.MonkeyPatch) -> ThrottledBucket:
    """A bucket with 12 objects, whose credentials are in the environment of commands."""
    for number in range(12):
        throttled.put(f"set/{number:02d}.jpg", b"%d" % number * 1000)
    for name, value in credentials(throttled.options).items():
        monkeypatch.setenv(name, value)
    return throttled


# --- help ---------------------------------------------------------------------------------------------------


def test_help_teaches_every_command(cachefs: CommandLine) -> None:
    text = cachefs("--help").ok().out
    commands = re.findall(r"^  (\w+)  +\S", text.split("Commands:")[1], re.MULTILINE)
    wanted = {"mount", "umount", "warm", "status", "verify", "evict", "refresh", "doctor", "demo", "stop"}
    wanted |= {"restart", "hint", "pin", "unpin", "quota", "cluster", "pki", "index", "seal"}
    assert wanted == set(commands)
    assert "Exit codes" in text
    for command in commands:
        own = cachefs(command, "--help").ok().out
        assert f"cachefs {command}" in own.split("Options:")[0].partition("\n")[2], f"no example for {command}"


def test_help_and_version_are_quick_and_import_nothing_heavy() -> None:
    heavy = ("obstore", "fsspec", "rich", "torch", "diskcache", "uvloop", "asyncio", "cachefs.fetcher")
    program = (
        "import sys; from cachefs_sidecar.cli import main; code = main(['--help']);"
        f"print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert re.fullmatch(r"cachefs \d+\.\d+\.\d+\n", script("--version").ok().out)


def test_no_command_shows_help_and_is_an_error(cachefs: CommandLine) -> None:
    outcome = cachefs()
    assert outcome.code == 2
    assert "Commands:" in outcome.out


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "cachefs_sidecar", "--version"], capture_output=True, check=True)
    assert done.stdout.startswith(b"cachefs ")


# --- warm ---------------------------------------------------------------------------------------------------


def test_warm_fetches_every_object_once(cachefs: CommandLine, photos: ThrottledBucket) -> None:
    arguments = ["warm", photos.url, *s3(photos.options)]
    first = cachefs(*arguments, "--json").ok().json
    assert (first["objects"], first["failed"], first["bytes"]) == (12, 0, 12 * 1000 + 2 * 1000)
    again = cachefs(*arguments).ok()
    assert "12 objects" in again.out
    assert again.err == ""
    assert set(photos.reads.values()) == {1}
    assert len(photos.reads) == 12


def test_warm_a_part_of_a_known_dataset_belongs_to_that_dataset(
    cachefs: CommandLine, tree: Path, tmp_path: Path
) -> None:
    cachefs("warm", tree).ok()
    cachefs("evict", tree).ok()
    assert cachefs("warm", tree / "val", "--json").ok().json["objects"] == 10
    (tmp_path / "names").write_text("train\nval/00.jpg\n")
    listed = cachefs("warm", tree, "--list", tmp_path / "names", "--json").ok().json
    assert listed["objects"] == 11  # a directory is all that is below it
    (dataset,) = cachefs("status", "--json").ok().json["datasets"]
    assert dataset["root"] == str(tree)
    (tree / "later").mkdir()
    cachefs("warm", tree / "later").failed(3, "was not there", "cachefs refresh")


def test_warm_a_list_of_every_spelling(cachefs: CommandLine, photos: ThrottledBucket, tmp_path: Path) -> None:
    names = tmp_path / "names"
    names.write_text(f"s3://{photos.name}/set/00.jpg\n{photos.name}/set/01.jpg\n\nset/02.jpg\r\n")
    done = cachefs("warm", photos.url, "--list", names, *s3(photos.options), "--json").ok().json
    assert done["objects"] == 3
    assert photos.reads == {"set/00.jpg": 1, "set/01.jpg": 1, "set/02.jpg": 1}


def test_warm_a_list_from_standard_input_with_nul(photos: ThrottledBucket, cache_dir: Path) -> None:
    stdin = b"set/03.jpg\0set/no\nsuch.jpg\0"
    outcome = script("warm", photos.url, "-d", cache_dir, "--list", "-", "-0", *s3(photos.options), stdin=stdin)
    assert outcome.code == 1
    assert "1 failed" in outcome.out
    assert "set/no\\nsuch.jpg" in outcome.said  # one line, whatever is in a name
    assert photos.reads["set/03.jpg"] == 1


def test_a_list_longer_than_a_packet(cachefs: CommandLine, tmp_path: Path) -> None:
    root = tmp_path / "many"
    root.mkdir()
    names = [f"{number:04d}-{'x' * 180}" for number in range(500)]  # 90 KiB of names
    for name in names:
        (root / name).write_bytes(name.encode())
    listing = tmp_path / "names"
    listing.write_text("\n".join(names))
    done = cachefs("warm", root, "--list", listing, "--json").ok().json
    assert (done["objects"], done["failed"]) == (500, 0)


def test_warm_that_cannot_fetch_everything_names_what_and_exits_1(
    cachefs: CommandLine, photos: ThrottledBucket
) -> None:
    warm = ["warm", photos.url, *s3(photos.options)]
    cachefs(*warm).ok()
    cachefs("evict", photos.url, *s3(photos.options)).ok()
    photos.put("set/07.jpg", b"replaced after the listing")
    outcome = cachefs(*warm)
    assert outcome.code == 1
    assert "11 objects" in outcome.out
    assert "set/07.jpg" in outcome.said
    assert "cachefs refresh" in outcome.said
    cachefs("refresh", photos.url, *s3(photos.options)).ok()
    cachefs(*warm).ok()


def test_progress_is_for_terminals_only(tree: Path, cache_dir: Path) -> None:
    command = [str(Path(sysconfig.get_path("scripts")) / "cachefs"), "warm", str(tree), "-d", str(cache_dir)]
    quiet = script(*command[1:])
    assert quiet.ok().err == ""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    seen = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.05)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # EIO: the other end is closed
                break
    out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert b"Warming" in seen
    assert b"20 objects" in out


# --- status -------------------------------------------------------------------------------------------------


def test_status_starts_and_makes_nothing(cachefs: CommandLine, cache_dir: Path) -> None:
    outcome = cachefs("status").ok()
    assert "does not exist yet" in outcome.out
    assert "not running" in outcome.out
    assert not cache_dir.exists()
    assert cachefs("status", "--json").ok().json["fetcher"] == {"running": False}


def test_status_tells_the_same_with_and_without_a_fetcher(cachefs: CommandLine, tree: Path, cache_dir: Path) -> None:
    cachefs("warm", tree, "--size", "2G").ok()
    with_fetcher = cachefs("status", "--json").ok().json
    assert with_fetcher["fetcher"]["pid"] == fetcher_pid(cache_dir)
    assert with_fetcher["fetcher"]["counters"]["origin_requests"] == 20
    assert with_fetcher["cache"]["size"] == 2 * 1024**3
    assert cachefs("stop").ok().out
    without = cachefs("status", "--json").ok().json
    assert without["fetcher"] == {"running": False}
    assert without["cache"]["used"] == with_fetcher["cache"]["used"] >= 20 * 5000
    (dataset,) = without["datasets"]
    assert (dataset["root"], dataset["files"], dataset["skipped"]) == (str(tree), 20, 0)
    assert time.time() - 60 < dataset["last_use"] <= time.time() + 1
    text = cachefs("status").ok().out
    assert str(tree) in text
    assert "20 files" in text


def test_status_of_a_fetcher_that_hangs(cachefs: CommandLine, tree: Path, cache_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr("cachefs.cli.fetcher.ASK_SECONDS", 0.3)
    cachefs("warm", tree).ok()
    pid = fetcher_pid(cache_dir)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        outcome = cachefs("status")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert outcome.code == 4
    assert str(tree) in outcome.out  # what can be told without it is told
    assert "fetcher" in outcome.said


def test_skipped_objects_are_explained(cachefs: CommandLine, tmp_path: Path) -> None:
    root = tmp_path / "odd"
    root.mkdir()
    (root / "fine").write_bytes(b"1")
    (Path(os.fsdecode(os.fsencode(root) + b"/\xff\xfe"))).write_bytes(b"2")
    cachefs("warm", root).ok()
    (entry,) = cachefs("status", "--skipped", root, "--json").ok().json
    assert "UTF-8" in entry["reason"]
    assert "UTF-8" in cachefs("status", "--skipped", root).ok().out
    assert "1 skipped" in cachefs("status").ok().out


def test_names_cannot_write_to_the_terminal(cachefs: CommandLine, tmp_path: Path) -> None:
    root = tmp_path / "\x1b[31mred\n"
    root.mkdir()
    (root / "a").write_bytes(b"1")
    cachefs("warm", root).ok()
    text = cachefs("status").ok().out
    assert "\x1b" not in text
    assert "\\x1b[31mred\\n" in text


# --- verify, evict, stop ------------------------------------------------------------------------------------


def test_verify_finds_drops_and_reports_damage(cachefs: CommandLine, tree: Path, cache_dir: Path) -> None:
    cachefs("warm", tree).ok()
    assert cachefs("verify", "--json").ok().json["damaged"] == 0
    blob = next(f for f in (cache_dir / "blobs").rglob("*") if f.is_file())
    blob.chmod(0o600)
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    outcome = cachefs("verify")
    assert outcome.code == 1
    assert "1 damaged" in outcome.out
    assert str(tree) in outcome.said  # the object it was
    assert cachefs("verify").ok()
    assert cachefs("warm", tree, "--json").ok().json["objects"] == 20


def test_evict_gives_the_space_back(cachefs: CommandLine, tree: Path) -> None:
    cachefs("warm", tree).ok()
    before = cachefs("status", "--json").ok().json["cache"]["used"]
    part = cachefs("evict", tree / "val", "--json").ok().json
    assert part["bytes_freed"] > 0
    middle = cachefs("status", "--json").ok().json["cache"]["used"]
    assert middle == before - part["bytes_freed"]
    cachefs("evict", tree).ok()
    assert cachefs("status", "--json").ok().json["cache"]["used"] == 0


def test_a_pinned_dataset_is_evicted_only_by_force_and_stays_pinned(cachefs: CommandLine, tree: Path) -> None:
    cachefs("warm", tree, "--pin").ok()
    assert cachefs("status", "--json").ok().json["datasets"][0]["pinned"] is True
    assert ", pinned" in cachefs("status").ok().out
    for part in (tree, tree / "val", tree.parent):
        cachefs("evict", part).failed(2, str(tree), "pinned", "cachefs unpin", "--force")
    assert cachefs("evict", tree / "val", "--force", "--json").ok().json["objects"] == 10
    assert cachefs("pin", tree, "--json").ok().json["changed"] is False
    assert cachefs("unpin", tree, "--json").ok().json == {
        "origin": str(tree), "root": str(tree), "pinned": False, "changed": True
    }  # fmt: skip
    assert "not pinned" in cachefs("unpin", tree).ok().out
    assert "pinned" in cachefs("pin", tree).ok().out
    cachefs("stop").ok()
    cachefs("evict", tree).failed(2, "pinned")
    cachefs("unpin", tree).ok()
    assert cachefs("evict", tree, "--json").ok().json["objects"] == 10


def test_a_list_of_a_new_dataset_is_pinned_too(cachefs: CommandLine, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("val/00.jpg\n")
    cachefs("warm", tree, "--list", tmp_path / "names", "--pin").ok()
    assert cachefs("status", "--json").ok().json["datasets"][0]["pinned"] is True


@pytest.mark.needs_fuse
def test_a_mount_is_pinned_by_its_path(cachefs: CommandLine, tree: Path, mnt: Path) -> None:
    cachefs("mount", tree, mnt).ok()
    assert cachefs("pin", mnt, "--json").ok().json["root"] == str(tree)
    cachefs("pin", mnt, "-d", tree).failed(2, "--cache-dir")
    cachefs("unpin", mnt).ok()
    cachefs("umount", mnt).ok()


def test_evict_of_what_is_not_cached_says_what_is(cachefs: CommandLine, photos: ThrottledBucket) -> None:
    cachefs("warm", photos.url, *s3(photos.options)).ok()
    outcome = cachefs("evict", photos.url, "-o", "endpoint_url=http://other:9000")
    outcome.failed(2, "knows no such dataset", photos.name, "endpoint")


def test_stop_ends_a_fetcher_of_another_version(
    cachefs: CommandLine, tree: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cachefs("warm", tree).ok()
    pid = fetcher_pid(cache_dir)
    assert pid is not None
    monkeypatch.setattr("cachefs.client.session.PROTOCOL", 999)
    assert f"fetcher {pid} has ended" in cachefs("stop").ok().out
    assert fetcher_pid(cache_dir) is None


def test_stop_ends_the_fetcher_and_says_when_there_is_none(cachefs: CommandLine, tree: Path, cache_dir: Path) -> None:
    assert "no fetcher is running" in cachefs("stop").ok().out
    cachefs("warm", tree).ok()
    assert fetcher_pid(cache_dir) is not None
    cachefs("stop").ok()
    assert fetcher_pid(cache_dir) is None


def test_other_settings_than_the_running_fetcher_has_are_remarked_upon(cachefs: CommandLine, tree: Path) -> None:
    cachefs("warm", tree, "--size", "1G").ok()
    outcome = cachefs("warm", tree, "--size", "2G", "--min-free", "5%").ok()
    assert "--min-free 0" in outcome.said
    assert "cachefs stop" in outcome.said
    assert cachefs("status", "--json").ok().json["cache"]["size"] == 2 * 1024**3  # a size is taken at once
    cachefs("stop").ok()
    assert cachefs("status", "--json").ok().json["cache"]["size"] == 2 * 1024**3  # and remembered


def test_looking_at_a_cache_does_not_set_its_size(
    cachefs: CommandLine, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cachefs("warm", tree, "--size", "1G").ok()
    monkeypatch.setenv("CACHEFS_SIZE", "3G")
    assert cachefs("status", "--json").ok().json["cache"]["size"] == 1024**3


# --- mount --------------------------------------------------------------------------------------------------


@pytest.mark.needs_fuse
def test_mount_returns_when_it_is_usable_and_umount_when_it_is_gone(
    cachefs: CommandLine, photos: ThrottledBucket, cache_dir: Path, mnt: Path
) -> None:
    outcome = script("mount", photos.url, mnt, "-d", cache_dir, *s3(photos.options)).ok()
    assert outcome.out.count("\n") == 1
    assert "12 files" in outcome.out
    assert (mnt / "set" / "03.jpg").read_bytes() == b"3" * 1000
    (mounted,) = cachefs("status", "--json").ok().json["mounts"]
    assert mounted["mountpoint"] == str(mnt)
    assert all(worker["answers"] for worker in mounted["workers"])
    assert str(mnt) in cachefs("status").ok().out
    assert script("umount", mnt).ok()
    assert not os.path.ismount(mnt)
    assert cachefs("status", "--json").ok().json["mounts"] == []


@pytest.mark.needs_fuse
def test_mount_with_a_catalog_needs_no_origin(cachefs: CommandLine, photos: ThrottledBucket, mnt: Path) -> None:
    arguments = [photos.url, str(mnt), *s3(photos.options)]
    cachefs("mount", *arguments).ok()
    cachefs("warm", photos.url, *s3(photos.options)).ok()
    cachefs("umount", mnt).ok()
    asked = photos.throttle.traffic().requests
    started = time.monotonic()
    done = cachefs("mount", *arguments, "--json").ok().json
    assert time.monotonic() - started < 20.0  # it takes 0.3 s on an idle core, and many times that on a busy one
    assert done["files"] == 12
    assert (mnt / "set" / "11.jpg").read_bytes() == b"11" * 1000
    assert photos.throttle.traffic().requests == asked
    cachefs("umount", mnt).ok()


@pytest.mark.needs_fuse
def test_mount_point_is_looked_at_before_the_origin_is_listed(
    cachefs: CommandLine, photos: ThrottledBucket, tmp_path: Path
) -> None:
    cachefs("mount", photos.url, tmp_path / "missing", *s3(photos.options)).failed(4, "does not exist")
    assert photos.throttle.traffic().requests == {}


@pytest.mark.needs_fuse
def test_refresh_of_a_mount_needs_neither_url_nor_credentials(
    cachefs: CommandLine, photos: ThrottledBucket, mnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cachefs("mount", photos.url, mnt, *s3(photos.options)).ok()
    photos.put("set/00.jpg", b"new content")
    photos.put("set/new.jpg", b"new name")
    monkeypatch.delenv("TEST_SECRET")
    outcome = cachefs("refresh", mnt, "--json").ok()
    (done,) = outcome.json
    assert done["changed"]
    assert done["mounts"] == [{"mountpoint": str(mnt), "changed": 2}]
    assert (mnt / "set" / "00.jpg").read_bytes() == b"new content"
    assert (mnt / "set" / "new.jpg").read_bytes() == b"new name"
    assert "nothing changed" in cachefs("refresh", mnt).ok().out
    cachefs("umount", mnt).ok()


@pytest.mark.needs_fuse
def test_refresh_of_an_origin_reaches_its_mounts(cachefs: CommandLine, tree: Path, mnt: Path, tmp_path: Path) -> None:
    second = tmp_path / "mnt2"
    second.mkdir()
    cachefs("mount", tree, mnt).ok()
    cachefs("mount", tree, second, "--workers", "1").ok()  # two mounts share one cache
    (tree / "val" / "00.jpg").write_bytes(b"changed")
    text = cachefs("refresh", tree).ok().out
    assert f"{mnt}: 1 name changed" in text
    assert f"{second}: 1 name changed" in text
    assert (mnt / "val" / "00.jpg").read_bytes() == (second / "val" / "00.jpg").read_bytes() == b"changed"
    cachefs("umount", mnt).ok()
    cachefs("umount", second).ok()


@pytest.mark.needs_fuse
def test_umount_of_a_mount_in_use_says_by_whom_and_lazily_it_goes(cachefs: CommandLine, tree: Path, mnt: Path) -> None:
    cachefs("mount", tree, mnt).ok()
    with open(mnt / "val" / "00.jpg", "rb") as file:
        cachefs("umount", mnt).failed(4, f"pid {os.getpid()}", "--lazy")
        cachefs("umount", "--lazy", mnt).ok()
        assert not os.path.ismount(mnt)
        assert file.read() == (tree / "val" / "00.jpg").read_bytes()


@pytest.mark.needs_fuse
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_foreground_stays_and_unmounts_when_told(number: int, tree: Path, cache_dir: Path, mnt: Path) -> None:
    command = [str(Path(sysconfig.get_path("scripts")) / "cachefs"), "mount", str(tree), str(mnt), "--foreground"]
    process = subprocess.Popen([*command, "-d", str(cache_dir)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert str(mnt) in process.stdout.readline().decode()
    assert (mnt / "val" / "00.jpg").read_bytes() == (tree / "val" / "00.jpg").read_bytes()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert b"Traceback" not in err
    assert not os.path.ismount(mnt)


# --- interrupted ---------------------------------------------------------------------------------------------


def test_ctrl_c_ends_a_warm_cleanly_and_keeps_what_was_done(photos: ThrottledBucket, cache_dir: Path) -> None:
    photos.throttle.delay(5.0, "*/set/*")  # it is to be still at it when the signal arrives
    command = [str(Path(sysconfig.get_path("scripts")) / "cachefs"), "warm", photos.url, "-d", str(cache_dir)]
    process = subprocess.Popen(
        [*command, *s3(photos.options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    wait_until(lambda: photos.reads != {}, 60)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().startswith("cachefs: interrupted")
    photos.throttle.heal()
    assert script(*command[1:], *s3(photos.options), "--json").ok().json["objects"] == 12


def test_a_reader_that_stops_early_is_no_error(tree: Path, cache_dir: Path) -> None:
    script("warm", tree, "-d", cache_dir).ok()
    name = str(Path(sysconfig.get_path("scripts")) / "cachefs")
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "{name}" status --json -d "{cache_dir}" | true'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    stop_fetcher(cache_dir)
