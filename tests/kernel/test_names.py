"""Names through a real mount: large directories, what the kernel remembers of them, and what a refresh takes back.

NAMES=1000000 makes the large directory larger.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.machine import pss_bytes
from cachefs.catalog import Builder, Catalog
from cachefs.messages import Entry
from cachefs.mountinfo import mounted_at
from cachefs_sidecar.control import list_mounts, mount_status, refresh_mount, start_mount, stop_mount
from tests.kernel.mounting import Dataset, until

pytestmark = pytest.mark.needs_fuse

NAMES = int(os.environ.get("NAMES", "30000"))

# Requests that what the kernel remembers saves. (Each `ls -l` asks anew whether there are ACLs: GETXATTR.)
ASKING = ("LOOKUP", "GETATTR", "READDIR", "READDIRPLUS", "READ", "OPENDIR")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    dataset = Dataset(tmp_path)
    yield dataset
    if mounted_at(dataset.mountpoint):
        stop_mount(dataset.mountpoint)


def asked() -> Counter[str]:
    (info,) = list_mounts()
    counts = mount_status(info)["counts"]
    return Counter({name: counts.get(name, 0) for name in ASKING})


def folder_of(count: int, file: Path, dataset: Dataset, previous: Path | None = None) -> Path:
    """A catalog of `count` names in one directory, `many`, and one file beside it."""
    before = Catalog.open(previous) if previous else None
    builder = Builder(file, identity="file", root=dataset.root, previous=before)
    builder.add(Entry(f"{dataset.root}/beside", 4, 1, "v"))
    for number in range(count):
        builder.add(Entry(f"{dataset.root}/many/{number:08d}.jpg", number, number * 10**9 + 1, f"{number:032x}"))
    builder.seal().close()
    if before is not None:
        before.close()
    return file


# --- large directories ----------------------------------------------------------------------------------------------


def test_a_large_directory_costs_workers_no_memory_and_the_kernel_gives_its_own_back(data: Dataset) -> None:
    data.catalog = folder_of(NAMES, data.folder / "many.sqlite", data)
    info = start_mount(data.settings(workers=2))
    workers = [worker["pid"] for worker in mount_status(info)["workers"]]
    many = data.mountpoint / "many"
    assert sum(1 for _ in zip(range(2000), os.scandir(many), strict=False)) == 2000  # what SQLite keeps is in memory
    before = [pss_bytes(pid) for pid in workers]

    sizes = {int(entry.name[:8]): entry.stat().st_size for entry in os.scandir(many)}
    assert sizes == {number: number for number in range(NAMES)}
    found = subprocess.run(["find", many, "-type", "f", "-size", "+20000c"], stdout=subprocess.PIPE, check=True)
    assert found.stdout.count(b"\n") == NAMES - 20001
    for number in range(0, NAMES, 7):
        assert not os.path.lexists(many / f"none-{number}")
    after = [pss_bytes(pid) for pid in workers]
    assert max(b - a for a, b in zip(before, after, strict=True)) < 8 << 20, (before, after)

    # The directory is gone: the kernel forgets its names, and says so.
    refresh_mount(info, folder_of(0, data.folder / "none.sqlite", data, data.catalog))
    assert os.listdir(data.mountpoint) == ["beside"]
    until(lambda: mount_status(info)["counts"].get("BATCH_FORGET", 0) + mount_status(info)["counts"].get("FORGET", 0))
    assert max(b - a for a, b in zip(before, map(pss_bytes, workers), strict=True)) < 8 << 20


def test_programs_that_look_through_a_tree_see_what_is_there(data: Dataset) -> None:
    data.write({f"train/n{n % 7:02d}/{n:05d}.jpg": b"%d" % n for n in range(3000)})
    data.write({"val/n00/x.jpg": b"x", "empty/but/for/this": b""})
    data.snapshot()
    start_mount(data.settings())

    def seen(root: Path) -> list[object]:
        def said(*command: str) -> list[str]:
            done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
            return sorted(done.stdout.splitlines())

        below = len(str(root))
        walked = sorted((folder[below:], sorted(dirs), sorted(files)) for folder, dirs, files in os.walk(root))
        listed = [line.split()[4:] for line in said("ls", "-lnR", "--time-style=+%s") if line.startswith("-")]
        return [walked, image_folder(root / "train"), listed, said("find", ".", "-size", "+0", "-name", "*7*")]

    assert seen(data.mountpoint) == seen(data.plain)
    before = asked()
    assert seen(data.mountpoint) == seen(data.plain)
    assert asked() == before  # of a second look the kernel knows everything


def image_folder(root: Path) -> list[tuple[str, int]]:
    """(path below root, class) of each image, found as torchvision's ImageFolder finds them."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    found = []
    for number, name in enumerate(classes):
        for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
            found += [(os.path.join(folder, file)[len(str(root)) :], number) for file in sorted(files)]
    return found


# --- what a refresh takes back --------------------------------------------------------------------------------------


def test_a_refresh_takes_back_exactly_what_changed(data: Dataset) -> None:
    same = {f"same/{n:03d}": b"same %d" % n for n in range(300)}
    data.write(same | {f"other/{n:03d}": b"old %d" % n for n in range(20)} | {"gone/file": b"x"})
    data.snapshot()
    info = start_mount(data.settings())
    mnt = data.mountpoint

    def look_at_what_stays() -> None:
        assert len(os.listdir(mnt / "same")) == 300
        for name, content in same.items():
            assert (mnt / name).stat().st_size == len(content)
            fd = os.open(mnt / name, os.O_RDONLY)
            assert os.read(fd, 100) == content
            os.close(fd)
        assert not os.path.exists(mnt / "same/never")

    def look_at_what_changes() -> dict[str, bytes | None]:
        names = ["other/000", "other/001", "other/new", "new", "gone/file", "other/019"]
        found = {name: (mnt / name).read_bytes() if os.path.exists(mnt / name) else None for name in names}
        return found | {"listing": b" ".join(sorted(os.listdir(os.fsencode(mnt / "other"))))}

    for _ in range(2):
        look_at_what_stays()
        before = look_at_what_changes()
    settled = asked()
    look_at_what_stays()
    assert asked() == settled

    data.write({"other/000": b"another", "other/new": b"new", "new": b"also"})
    (data.plain / "other/001").unlink()
    shutil.rmtree(data.plain / "gone")
    # other/000, other/001, other/new, new, gone, gone/file
    assert refresh_mount(info, data.snapshot("b")) == 6
    settled = asked()
    look_at_what_stays()
    # Of the directory that holds both its times may be asked again, of what is unchanged nothing.
    assert asked() - settled <= Counter({"GETATTR": 1, "LOOKUP": 1})
    after = look_at_what_changes()
    assert after != before
    assert after == {
        "other/000": b"another",
        "other/001": None,
        "other/new": b"new",
        "new": b"also",
        "gone/file": None,
        "other/019": b"old 19",
        "listing": b" ".join(sorted(os.listdir(os.fsencode(data.plain / "other")))),
    }
    asking = asked() - settled
    assert asking["READ"] == 3  # the three new files
    assert 0 < asking["LOOKUP"] <= 8
    assert subprocess.run(["diff", "-r", data.plain, mnt], check=False).returncode == 0
