"""The service manager's protocol by its messages, without a mount."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from cachefs_sidecar import manager
from cachefs_sidecar.manager import Manager


@pytest.fixture(params=["path", "abstract"])
def listening(request, tmp_path, monkeypatch) -> Iterator[socket.socket]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@cachefs-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0") if request.param == "abstract" else address)
        sock.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        monkeypatch.setenv("FDSTORE", "16")
        yield sock


def test_messages_are_lines_in_one_datagram(listening):
    told = Manager.of_this_process()
    assert told is not None
    told.ready("s3://b at /data")
    assert listening.recv(1000) == b"READY=1\nSTATUS=s3://b at /data"
    told.forget(12)
    assert listening.recv(1000) == b"FDSTOREREMOVE=1\nFDNAME=fuse-12"


def test_descriptors_travel_with_their_name_and_are_not_polled(listening):
    ours, theirs = os.pipe()
    told = Manager.of_this_process()
    assert told is not None
    told.store(12, [ours, theirs])
    data, fds, _, _ = socket.recv_fds(listening, 1000, 10)
    assert data == b"FDSTORE=1\nFDNAME=fuse-12\nFDPOLL=0"
    assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(ours).st_ino] * 2
    for fd in (*fds, ours, theirs):
        os.close(fd)


def test_whoever_hands_on_waits_until_the_manager_knows(listening):
    told = Manager.of_this_process()
    assert told is not None
    handing = threading.Thread(target=told.main_is, args=(34,))
    handing.start()
    assert listening.recv(1000) == b"MAINPID=34"
    data, fds, _, _ = socket.recv_fds(listening, 1000, 10)
    assert data == b"BARRIER=1"
    assert handing.is_alive()
    os.close(fds[0])
    handing.join(60)
    assert not handing.is_alive()


@pytest.mark.parametrize(
    "environ", [{}, {"NOTIFY_SOCKET": "/run/x"}, {"NOTIFY_SOCKET": "/run/x", "FDSTORE": "0"}, {"FDSTORE": "9"}]
)
def test_without_a_store_there_is_no_manager(monkeypatch, environ):
    for name in ("NOTIFY_SOCKET", "FDSTORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert Manager.of_this_process() is None


def test_a_manager_that_is_away_is_no_error(tmp_path, caplog):
    Manager(str(tmp_path / "nobody")).ready("x")
    assert "does not hear READY=1" in caplog.text


def test_what_was_kept_is_found_by_its_name_and_by_its_process_only(tmp_path):
    """In a process of its own: descriptors from 3 on are the protocol's."""
    program = (
        "import os, sys\n"
        "for fd in (3, 4, 5): os.dup2(1, fd)\n"
        "os.environ |= {'LISTEN_PID': str(os.getpid() + int(sys.argv[1])), 'LISTEN_FDS': '3',"
        " 'LISTEN_FDNAMES': 'fuse-7:other.socket:fuse-7'}\n"
        "from cachefs_sidecar import manager\n"
        "print(manager.stored()); manager.release(); print(manager.stored())"
    )
    for off, found in (("0", "{7: [3, 5]}\n{}\n"), ("1", "{}\n{}\n")):
        done = subprocess.run([sys.executable, "-c", program, off], capture_output=True, text=True, check=True)
        assert done.stdout == found
    assert manager.stored() == {}
