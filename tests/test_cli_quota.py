"""`cachefs quota`, and what `cachefs status` says of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from cachefs.digest import content_key
from tests.command_line import CommandLine


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A local origin: 20 files, each of which takes 8 KiB."""
    root = tmp_path / "origin"
    root.mkdir()
    for number in range(20):
        (root / f"{number:02d}.jpg").write_bytes(b"%d" % number * 3000)
    return root


def dataset(cachefs: CommandLine) -> dict[str, object]:
    found: dict[str, object] = cachefs("status", "--json").ok().json["datasets"][0]
    return found


def test_a_quota_is_set_shown_and_taken_away(cachefs: CommandLine, tree: Path) -> None:
    cachefs("warm", tree).ok()
    assert (dataset(cachefs)["quota"], dataset(cachefs)["used"]) == (None, None)
    used = sum(-(-file.stat().st_size // 4096) * 4096 for file in tree.iterdir())
    assert cachefs("quota", tree, "1G", "--json").ok().json == {
        "quota": 1 << 30, "origin": str(tree), "used": used, "dropped": 0, "freed": 0, "changed": True, "pinned": []
    }  # fmt: skip
    for _ in range(2):  # with a fetcher, then without
        assert (dataset(cachefs)["quota"], dataset(cachefs)["used"]) == (1 << 30, used)
        assert "KiB of a quota of 1.0 GiB" in cachefs("status").ok().out
        cachefs("stop").ok()
    out = cachefs("quota", tree, "40K").ok().out
    assert "of 40.0 KiB used" in out
    assert "objects dropped" in out
    assert int(str(dataset(cachefs)["used"])) <= 40 << 10
    assert "no quota any more" in cachefs("quota", tree, "none").ok().out
    assert "has no quota\n" in cachefs("quota", tree, "none").ok().out
    assert (dataset(cachefs)["quota"], dataset(cachefs)["used"]) == (None, None)


def test_a_quota_below_what_a_pinned_dataset_takes_says_so(cachefs: CommandLine, tree: Path) -> None:
    cachefs("warm", tree, "--pin").ok()
    out = cachefs("quota", tree, "16K").ok().out
    assert "pinned" in out
    assert "cachefs unpin" in out
    assert cachefs("quota", tree, "16K", "--json").ok().json["dropped"] == 0
    cachefs("unpin", tree).ok()
    assert cachefs("quota", tree, "16K", "--json").ok().json["used"] <= 16 << 10


@pytest.mark.needs_fuse
def test_a_mount_is_bounded_by_its_path(cachefs: CommandLine, tree: Path, tmp_path: Path) -> None:
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    cachefs("mount", tree, mnt).ok()
    try:
        cachefs("quota", mnt, "40K").ok()
        assert {file.name: file.read_bytes() for file in mnt.iterdir()} == {
            file.name: file.read_bytes() for file in tree.iterdir()
        }
        assert 30 << 10 < int(str(dataset(cachefs)["used"])) <= 40 << 10
    finally:
        cachefs("umount", mnt).ok()


@pytest.mark.needs_fuse
def test_a_tenants_datasets_are_bounded_together(
    cachefs: CommandLine, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by a mount and one by its environment; a file of the mount tells its content key, as any."""
    other, mnt = tmp_path / "other", tmp_path / "mnt"
    for folder in (other, mnt):
        folder.mkdir()
    (other / "a.jpg").write_bytes(bytes(10_000))
    assert cachefs("quota", "--tenant", "vision", "40K", "--json").ok().json["used"] == 0
    cachefs("mount", tree, mnt, "--tenant", "vision").ok()
    try:
        contents = {file.name: file.read_bytes() for file in mnt.iterdir()}
        assert contents == {file.name: file.read_bytes() for file in tree.iterdir()}
        keys = {name: os.getxattr(mnt / name, "user.cachefs.digest").decode() for name in cached(mnt)}
        assert keys == {name: content_key(contents[name]).hex() for name in keys}
        assert len(keys) >= 4
        cachefs("restart", mnt).ok()
        assert (mnt / "00.jpg").read_bytes() == contents["00.jpg"]
    finally:
        cachefs("umount", mnt).ok()
    cachefs("warm", other, "--tenant", "audio").ok()
    monkeypatch.setenv("CACHEFS_TENANT", "vision")
    cachefs("warm", other).failed(2, "tenant audio, not of vision")
    cachefs("evict", other).ok()  # whose it is matters only to who reads it
    status = cachefs("status", "--json").ok().json
    assert {d["root"]: d["tenant"] for d in status["datasets"]} == {str(tree): "vision", str(other): "audio"}
    vision = next(t for t in status["tenants"] if t["name"] == "vision")
    assert vision["quota"] == 40 << 10
    assert 30 << 10 < vision["used"] <= 40 << 10
    assert next(t for t in status["tenants"] if t["name"] == "audio") == {"name": "audio", "quota": None, "used": None}
    out = cachefs("status").ok().out
    assert re.search(r"vision +\S+ KiB of a quota of 40.0 KiB", out)
    assert "audio" in out
    assert "of 4.0 KiB used" in cachefs("quota", "--tenant", "vision", "4K").ok().out
    cachefs("quota", "--tenant", "vision", "none").ok()
    assert "KiB of a quota" not in cachefs("status").ok().out


def cached(mnt: Path) -> list[str]:
    return [file.name for file in mnt.iterdir() if os.getxattr(file, "user.cachefs.cached") == b"1"]


def test_what_is_no_quota_is_one_line(cachefs: CommandLine, tree: Path) -> None:
    cachefs("quota", tree, "1G").failed(2, "knows no such dataset")
    cachefs("warm", tree).ok()
    cachefs("quota", tree).failed(2, "SIZE")
    cachefs("quota", tree, "lots").failed(2, "lots")
    cachefs("quota", tree / "00.jpg", "1G").failed(2, "is part of the dataset")
    cachefs("quota", tree, "1G", "--tenant", "a").failed(2, "--tenant NAME and SIZE")
    cachefs("quota", "--tenant", "../x", "1G").failed(2, "../x")
    cachefs("quota", "--tenant", "", "1G").failed(2, "--tenant")
    assert dataset(cachefs)["quota"] is None
