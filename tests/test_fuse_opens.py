"""The table of open files: what requests that are delivered twice, late or never do to it, and who is killed when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs_sidecar.fuse import files
from cachefs_sidecar.fuse.opens import Backing, Opens

NODE = 7


@pytest.fixture
def table(tmp_path: Path) -> Path:
    Opens.create(tmp_path / "opens", last_id=1)
    return tmp_path / "opens"


@pytest.fixture
def one(table: Path) -> Iterator[Opens]:
    opened = Opens(table)
    yield opened
    opened.close()


@pytest.fixture
def two(table: Path) -> Iterator[Opens]:
    """Another worker's."""
    opened = Opens(table)
    yield opened
    opened.close()


def test_what_one_worker_opens_another_closes(one: Opens, two: Opens) -> None:
    with one.change():
        assert not one.is_open(NODE)
        assert list(one.register(NODE, Backing(2, b"file"))) == []
        assert one.add(10, NODE, again=False) == 1
    with two.change():
        assert two.is_open(NODE)
        assert two.backing(NODE) == Backing(2, b"file")
        assert two.add(12, NODE, again=False) == 1
        assert two.count() == 2
    with two.change():
        assert two.release(10) == []
        assert two.release(10) == []  # delivered again
    with one.change():
        assert one.release(12) == [2]
        assert one.backing(NODE) is None
        assert not one.is_open(NODE)
        assert one.forget_unused() == [2]
        assert one.forget_unused() == []


def test_a_change_happens_as_a_whole(one: Opens, two: Opens) -> None:
    def fail() -> None:
        with one.change():
            one.add(10, NODE, again=False)
            one.register(NODE, Backing(2, b""))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (two.count(), two.backing(NODE)) == (0, None)


def test_an_open_that_is_delivered_again_is_one_open(one: Opens, two: Opens) -> None:
    with one.change():
        assert one.add(10, NODE, again=False) == 1
        one.register(NODE, Backing(2, b""))
    with two.change():
        assert two.add(10, NODE, again=True) == 2
        assert two.count() == 1
    with two.change():
        assert two.release(10) == [2]


def test_a_delivery_that_comes_too_late_opens_nothing(one: Opens, two: Opens) -> None:
    """The first worker read the OPEN and was slow; the second was given it again, answered, and the file was closed."""
    with two.change():
        assert two.add(10, NODE, again=True) == 1
        two.register(NODE, Backing(2, b""))
    with two.change():
        assert two.release(10) == [2]
    with one.change():
        assert one.add(10, NODE, again=False) == 0
        assert not one.is_open(NODE)
        assert one.count() == 0


def test_an_answer_that_is_not_taken_is_withdrawn(one: Opens) -> None:
    """Whoever opened was killed while the request lay with nobody."""
    with one.change():
        tries = one.add(10, NODE, again=False)
        one.register(NODE, Backing(2, b""))
    with one.change():
        assert one.withdraw(10, tries) == [2]
        assert one.count() == 0
        assert one.withdraw(10, tries) == []


def test_an_answer_that_another_worker_gives_is_not_withdrawn(one: Opens, two: Opens) -> None:
    with one.change():
        tries = one.add(10, NODE, again=False)
        one.register(NODE, Backing(2, b""))
    with two.change():
        two.add(10, NODE, again=True)
    with one.change():
        assert one.withdraw(10, tries) == []
        assert one.is_open(NODE)
    with two.change():
        assert two.release(10) == [2]


def test_withdrawn_first_and_answered_by_another_then(one: Opens, two: Opens) -> None:
    with one.change():
        tries = one.add(10, NODE, again=False)
    with one.change():
        assert one.withdraw(10, tries) == []
    with two.change():
        assert two.add(10, NODE, again=True) == 1
        assert two.is_open(NODE)


def test_ids_of_workers_that_were_killed_are_found(one: Opens, two: Opens) -> None:
    with one.change():
        assert list(one.register(NODE, Backing(2, b""))) == []
    with two.change():  # 3 and 4 were given to somebody who could not write them down
        assert list(two.register(8, Backing(5, b""))) == [3, 4]
    with one.change():
        one.add(10, NODE, again=False)
        assert one.release(10) == [2]  # and is killed before it closes 2
    with two.change():
        assert two.forget_unused() == [2]
        assert two.backing(8) == Backing(5, b"")


def test_a_refusal_is_known_to_all_and_said_once(one: Opens, two: Opens) -> None:
    assert two.refused == ""
    with one.change():
        assert one.refuse("no")
    with two.change():
        assert not two.refuse("neither")
    assert two.refused == "no"


DIES = """
import os, signal, sys
from pathlib import Path
from cachefs_sidecar.fuse.opens import Opens
opens = Opens(Path(sys.argv[1]))
with opens.change():
    opens.add(10, 7, again=False)
    print("in it", flush=True)
    signal.pause()
"""


def test_who_is_killed_in_the_middle_of_a_change_changed_nothing(table: Path, one: Opens) -> None:
    child = subprocess.Popen([sys.executable, "-c", DIES, str(table)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"in it\n"
    done = threading.Event()

    def wait_for_it() -> None:
        with one.change():
            assert one.add(12, 7, again=False) == 1
        done.set()

    waiting = threading.Thread(target=wait_for_it)
    waiting.start()
    assert not done.wait(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    child.stdout.close()
    assert done.wait(60)
    waiting.join()
    with one.change():
        assert one.count() == 1


def test_a_file_without_a_name_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "blob"
    file.write_bytes(b"content")
    fd = os.open(file, os.O_RDONLY)
    identity = files.identity(fd, os.fstat(fd))
    file.unlink()
    info = files.look_again(identity, [tmp_path])
    if info is None:
        pytest.skip("this file system, or this user, finds no handles")
    assert info.st_size == 7
    os.utime(fd, ns=(1, 1))
    again = files.look_again(identity, [tmp_path / "missing", tmp_path])
    assert again is not None
    assert again.st_mtime_ns == 1
    os.close(fd)
    assert files.look_again(identity, [tmp_path]) is None
    assert files.look_again(identity[:16], [tmp_path]) is None
    (tmp_path / "other").write_bytes(b"")
    with open(tmp_path / "other", "rb") as other:
        assert files.identity(other.fileno(), os.fstat(other.fileno())) != identity  # though it may have its number
