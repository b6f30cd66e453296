"""Doctor: what it finds on machines of every kind, and that each complaint says what to do."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import shutil
from importlib import metadata
from pathlib import Path

import pytest

from cachefs import memory
from cachefs.cli import doctor_cache, doctor_machine
from cachefs.cli.findings import FAIL, OK, WARN, Finding
from cachefs.mountinfo import Mounted, mount_of
from cachefs_sidecar.testbed import fetcher_pid
from tests.command_line import CommandLine, credentials, s3, script
from tests.conftest import Bucket


def found(outcome_json: list[dict[str, str]], subject: str) -> list[Finding]:
    return [Finding(**f) for f in outcome_json if f["subject"].startswith(subject)]


# --- the whole ----------------------------------------------------------------------------------------------


def test_doctor_of_this_machine(cache_dir: Path) -> None:
    outcome = script("doctor", "-d", cache_dir)
    assert outcome.code in (0, 1)
    assert outcome.err == ""
    lines = outcome.out.splitlines()
    assert all(line[:6] in ("ok    ", "warn  ", "fail  ", "      ") for line in lines[:-1])
    failed = [line for line in lines if line.startswith("fail")]
    assert outcome.code == bool(failed)
    for number, line in enumerate(lines):
        if line.startswith(("warn", "fail")):
            assert lines[number + 1].startswith("      -> "), f"no advice after {line!r}"
    for subject in ("kernel", "/dev/fuse", "privileges", "open files", "memory", "Python", "libraries", "fetcher"):
        assert any(line[6:].startswith(subject) for line in lines), subject
    assert not cache_dir.exists()


def test_json_has_the_same_findings(cachefs: CommandLine) -> None:
    listed = cachefs("doctor", "--json").json
    assert {"level", "subject", "fact", "advice"} == set(listed[0])
    assert found(listed, "kernel")[0].fact.startswith(f"Linux {platform.release()}")


# --- the machine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "level", "words"),
    [
        ("6.18.4-fc", OK, "RESEND"),
        ("6.9.0", OK, "passthrough"),
        ("6.8.12-generic", WARN, "6.9"),
        ("4.19.0", FAIL, "5.4"),
    ],
)
def test_kernels(monkeypatch: pytest.MonkeyPatch, release: str, level: str, words: str) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    (finding,) = doctor_machine._kernel()
    assert finding.level == level
    assert words in finding.fact + finding.advice


def test_a_machine_without_fuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cachefs: CommandLine) -> None:
    monkeypatch.setattr(doctor_machine, "FUSE_DEVICE", str(tmp_path / "fuse"))
    outcome = cachefs("doctor")
    assert outcome.code == 1
    assert "modprobe fuse" in outcome.out
    assert "fsspec URL works without" in outcome.out
    (tmp_path / "mnt").mkdir()
    cachefs("mount", tmp_path, tmp_path / "mnt").failed(4, "modprobe fuse")


def test_a_device_that_only_fusermount_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert doctor_machine._no_device(refused).level == FAIL
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/fusermount3")
    assert doctor_machine._no_device(refused).level == WARN
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert doctor_machine._no_device(refused).level == FAIL


def test_a_user_without_privileges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (finding,) = doctor_machine._privileges()
    assert (finding.level, "apt install fuse3" in finding.advice) == (FAIL, True)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/fusermount3")
    monkeypatch.setattr(doctor_machine, "_user_allow_other", lambda: False)
    helper, others = doctor_machine._privileges()
    assert (helper.level, others.level) == (OK, WARN)
    assert "user_allow_other" in others.advice


@pytest.mark.parametrize(
    ("error", "words"), [(0, ""), (errno.ENOTCONN, "dead"), (errno.EACCES, ""), (errno.EIO, "Input/output")]
)
def test_mounts_that_are_dead(monkeypatch: pytest.MonkeyPatch, error: int, words: str) -> None:
    mounted = Mounted("0:1", "/", "/data", "fuse.cachefs", "s3://bucket", "ro")
    monkeypatch.setattr(doctor_machine, "mounts", lambda: [mounted])

    def statvfs(_: str) -> None:
        if error:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "statvfs", statvfs)
    (finding,) = doctor_machine._stale_mounts()
    assert words in finding.fact
    assert ("cachefs umount --lazy /data" in finding.advice) == bool(words)


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    (finding,) = doctor_machine._files()
    assert (finding.level, "ulimit -n" in finding.advice) == (WARN, True)


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/pod/container\n", {"pod/memory.max": "1073741824", "pod/container/memory.max": "max"}, 1024**3),
        ("0::/\n", {"memory.max": "536870912\n"}, 512 * 1024**2),
        ("0::/\n", {}, None),
        ("4:cpu,memory:/docker\n1:name=systemd:/\n", {"memory/docker/memory.limit_in_bytes": "4096"}, 4096),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_memory_limits_of_control_groups(tmp_path: Path, own: str, files: dict[str, str], limit: int | None) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.cgroup_limit(tmp_path, tmp_path / "own") == limit


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (doctor_machine, memory):
        monkeypatch.setattr(module, "cgroup_limit", lambda: 256 * 1024**2)
    (finding,) = doctor_machine._memory()
    assert finding.level == WARN
    assert "256.0 MiB" in finding.fact
    assert "on their way take at most 64.0 MiB" in finding.fact


def test_libraries_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["fsspec>=2025.12", "obstore>=0.12", 'torch>=2; extra == "demo"']
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    versions = {"fsspec": "2025.7.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    _, old, missing, _ = doctor_machine._python()
    assert (old.level, old.subject, missing.level, missing.subject) == (FAIL, "fsspec", FAIL, "obstore")
    assert 'pip install "obstore>=0.12"' in missing.advice


def test_a_runtime_directory_that_others_may_write(
    cachefs: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "open"))
    (finding,) = found(cachefs("doctor", "--json").json, "runtime directory")
    assert (finding.level, "CACHEFS_RUNTIME_DIR" in finding.advice) == (FAIL, True)


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fstype", "level"),
    [("ext4", OK), ("xfs", OK), ("nfs4", WARN), ("fuse.s3fs", WARN), ("tmpfs", WARN), ("overlay", WARN),
     ("vfat", FAIL), ("proc", FAIL)],
)  # fmt: skip
def test_file_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fstype: str, level: str) -> None:
    mounted = Mounted("0:1", "/", str(tmp_path), fstype, "disk", "rw")
    monkeypatch.setattr(doctor_cache, "mount_of", lambda _: mounted)
    finding = doctor_cache._kind("cache", tmp_path)
    assert finding.level == level
    assert fstype in finding.fact
    assert bool(finding.advice) == (level != OK)


def test_the_mount_that_a_path_is_on() -> None:
    proc = mount_of(Path("/proc/self/status"))
    assert proc is not None
    assert (proc.mountpoint, proc.fstype) == ("/proc", "proc")
    beside = mount_of(Path("/process"))
    assert beside is not None
    assert beside.mountpoint == "/"


def test_too_little_room(cachefs: CommandLine) -> None:
    no_room = found(cachefs("doctor", "--min-free", "99%", "--json").json, "cache")
    assert any(f.level == WARN and "no room" in f.fact for f in no_room)
    too_large = found(cachefs("doctor", "--min-free", "0", "--size", "900P", "--json").json, "cache")
    assert any(f.level == WARN and "--size" in f.fact for f in too_large)


def test_cache_directories_that_cannot_serve(cachefs: CommandLine, tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/cache")):
        outcome = cachefs("doctor", "-d", bad, "--json")
        assert outcome.code == 1
        assert any(f.level == FAIL for f in found(outcome.json, "cache")), bad
    cache_dir.mkdir()
    (cache_dir / "cachefs.json").write_text(json.dumps({"format": 2}))
    outcome = cachefs("doctor")
    assert outcome.code == 1
    assert "has format 2" in outcome.out


def test_a_cache_in_use(cachefs: CommandLine, tmp_path: Path, cache_dir: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "a").write_bytes(b"1")
    cachefs("warm", origin).ok()
    before = sorted(p for p in cache_dir.rglob("*"))
    listed = cachefs("doctor", "--json").json
    assert any("hard links work" in f.fact for f in found(listed, f"cache {cache_dir}"))
    assert str(fetcher_pid(cache_dir)) in found(listed, "fetcher")[0].fact
    assert sorted(p for p in cache_dir.rglob("*")) == before


# --- the origin ---------------------------------------------------------------------------------------------


def test_origins_that_answer_and_that_do_not(
    bucket: Bucket, cachefs: CommandLine, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    bucket.put("set/a.jpg", b"1")
    for name, value in credentials(bucket.options).items():
        monkeypatch.setenv(name, value)
    options = s3(bucket.options)

    def origin(url: str, *more: str) -> Finding:
        (finding,) = found(cachefs("doctor", url, *options, *more, "--json").json, "origin")
        return finding

    assert origin(f"{bucket.url}/set").level == OK
    missing = origin("s3://no-such-bucket")
    assert (missing.level, "no-such-bucket" in missing.fact) == (FAIL, True)
    nobody = origin(bucket.url, "-o", "endpoint_url=http://127.0.0.1:1", "-o", "retry_timeout:=0.2")
    assert nobody.level == FAIL
    assert "endpoint" in nobody.advice
    monkeypatch.setenv("TEST_SECRET", "a-wrong-secret")
    denied = origin(bucket.url)
    assert denied.level == FAIL
    assert "credentials" in denied.fact + denied.advice
    assert "a-wrong-secret" not in denied.fact
    assert origin("s3x://bucket").level == FAIL
    assert fetcher_pid(cache_dir) is None  # nothing of the cache took part
    assert not cache_dir.exists()


def test_a_local_origin(cachefs: CommandLine, tmp_path: Path) -> None:
    assert found(cachefs("doctor", tmp_path, "--json").json, "origin")[0].level == OK
    assert found(cachefs("doctor", tmp_path / "missing", "--json").json, "origin")[0].level == FAIL
