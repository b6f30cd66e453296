"""A catalog stays as long as anybody serves it, whatever ended them; see cachefs/catalog/hold.py."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from cachefs.catalog.hold import KEEP, forget_old, hold, put, shared_hold
from cachefs.catalog.staging import remove_abandoned
from cachefs.client import Connection
from cachefs.client.session import Session
from cachefs.config import CacheConfig
from cachefs.filesystem import CacheFileSystem


@pytest.fixture
def catalogs(tmp_path: Path) -> list[Path]:
    """Oldest first; more than are kept."""
    files = [tmp_path / f"{number}.sqlite" for number in range(KEEP + 3)]
    for age, file in enumerate(files):
        file.write_bytes(b"a catalog")
        os.utime(file, (1000 + age, 1000 + age))
    return files


def left(catalogs: list[Path]) -> list[int]:
    return [number for number, file in enumerate(catalogs) if file.exists()]


def test_the_newest_and_the_current_stay(catalogs: list[Path]):
    forget_old(catalogs[0].parent, catalogs[1].name)
    assert left(catalogs) == [1, 4, 5]


def test_what_is_held_stays_until_it_is_released(catalogs: list[Path]):
    one, two = hold(catalogs[0]), hold(catalogs[1])
    assert one is not None
    assert two is not None
    forget_old(catalogs[0].parent, catalogs[-1].name)
    assert left(catalogs) == [0, 1, 3, 4, 5]
    one.release()
    del two
    gc.collect()
    forget_old(catalogs[0].parent, catalogs[-1].name)
    assert left(catalogs) == [3, 4, 5]
    assert hold(catalogs[0]) is None


def test_who_serves_a_file_keeps_its_name_when_another_takes_it(catalogs: list[Path], tmp_path: Path):
    """The lock is on what had the name, and whoever has it opens the name again."""
    held = hold(catalogs[0])
    assert held is not None
    for number in range(2):  # only the first time somebody holds it
        (tmp_path / "new").write_bytes(b"listed again %d" % number)
        put(tmp_path / "new", catalogs[0])
        os.utime(catalogs[0], (1000, 1000))
        forget_old(tmp_path, catalogs[-1].name)
        assert left(catalogs) == [0, 3, 4, 5]
        assert catalogs[0].read_bytes() == b"listed again %d" % number
        assert len(list(tmp_path.glob("*.held"))) == 1
    held.release()
    forget_old(tmp_path, catalogs[-1].name)
    assert left(catalogs) == [3, 4, 5]
    assert sorted(tmp_path.iterdir()) == catalogs[3:]


def test_a_name_that_is_free_is_taken(catalogs: list[Path], tmp_path: Path):
    put(catalogs[0], tmp_path / "free.sqlite")
    put(catalogs[1], catalogs[2])
    assert sorted(tmp_path.iterdir()) == [*catalogs[2:], tmp_path / "free.sqlite"]


def wait_for_ever(ready: int) -> None:
    os.write(ready, b"1")
    signal.pause()


def test_a_fork_holds_too_and_its_death_lets_go(catalogs: list[Path]):
    held = shared_hold(catalogs[0])
    assert shared_hold(catalogs[0]) is held
    ready, told = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=wait_for_ever, args=(told,))
    child.start()
    os.read(ready, 1)
    del held
    gc.collect()
    forget_old(catalogs[0].parent, catalogs[-1].name)
    assert left(catalogs) == [0, 3, 4, 5]
    child.kill()
    child.join()
    forget_old(catalogs[0].parent, catalogs[-1].name)
    assert left(catalogs) == [3, 4, 5]


def test_a_release_counts_for_forks_as_well(catalogs: list[Path]):
    held = hold(catalogs[0])
    assert held is not None
    ready, told = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=wait_for_ever, args=(told,))
    child.start()
    os.read(ready, 1)
    held.release()
    forget_old(catalogs[0].parent, catalogs[-1].name)
    assert left(catalogs) == [3, 4, 5]
    child.kill()
    child.join()


@pytest.mark.parametrize("nothing_new_at_first", [False, True])
def test_a_training_job_keeps_its_snapshot(tmp_path: Path, cache_dir: Path, nothing_new_at_first: bool):
    """Also when a refresh has put the same snapshot under its name meanwhile; a forked process opens it then."""
    root = tmp_path / "origin"
    root.mkdir()
    for name in ("a", "b"):
        (root / name).write_bytes(name.encode())
    connection = Connection(CacheConfig.make(cache_dir), Session("file", {}, {}, root=str(root)))
    connection.make_catalog()
    fs = CacheFileSystem(target_protocol="file", cache_dir=str(cache_dir), skip_instance_cache=True)
    (served,) = (cache_dir / "catalogs").glob("*/*.sqlite")
    before = served.stat().st_ino
    if nothing_new_at_first:
        assert not connection.make_catalog(refresh=True).changed
        assert served.stat().st_ino != before
    for number in range(2 * KEEP):
        (root / f"new{number}").write_bytes(b"")
        connection.make_catalog(refresh=True)
    connection.close()
    assert served.exists()
    assert fs.ls(str(root), detail=False) == [str(root / "a"), str(root / "b")]
    assert fs.cat_file(str(root / "b")) == b"b"
    fs.invalidate_cache()
    assert len(fs.ls(str(root))) == 2 + 2 * KEEP


def test_what_an_interrupted_listing_left_is_removed_in_the_end(tmp_path: Path):
    folder = tmp_path / "catalogs" / "x"
    folder.mkdir(parents=True)
    old, young = folder / "new.sqlite.building", folder / "other.sqlite.building"
    for file in (old, young, folder / "new.sqlite.building-journal", folder / "kept.sqlite"):
        file.write_bytes(b"x")
    for file in folder.glob("[nk]*"):
        os.utime(file, (time.time() - 7200,) * 2)
    remove_abandoned(tmp_path / "catalogs")
    assert sorted(file.name for file in folder.iterdir()) == ["kept.sqlite", "other.sqlite.building"]
