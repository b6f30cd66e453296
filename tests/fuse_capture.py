"""Requests as a real kernel makes them: `python -m tests.fuse_capture` writes tests/fuse_requests.txt anew.

The dataset of tests/fuse_fuzz.py is mounted, programs use it, and what the kernel says is written down on its way to
the session. Needs root and /dev/fuse. Nothing in a request but names, sizes and the numbers of processes.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from cachefs_sidecar import mounts
from cachefs_sidecar.fuse import abi, wire
from cachefs_sidecar.fuse.abi import Opcode
from cachefs_sidecar.fuse.negotiation import WANTED, agree
from cachefs_sidecar.fuse.session import REQUEST_BYTES
from tests.fuse_fuzz import CAPTURED, Target

# One of a kind of request with so many bytes says as much as a hundred.
OF_A_KIND = 4


def answer(device: int, target: Target, flags: int, packets: list[bytes]) -> None:
    """Until the mount is gone. flags: of INIT, as if the kernel had no others."""
    while True:
        try:
            packet = os.read(device, REQUEST_BYTES)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                continue
            return
        packets.append(packet)
        request = wire.decode(memoryview(packet))
        if request.opcode == Opcode.INIT:
            offer = wire.init_in(request.body)
            _, reply = agree(offer._replace(flags=offer.flags & flags))
            replies = [wire.out_header(len(reply), 0, request.unique) + reply]
        elif request.opcode == Opcode.READ and target.hangs(request.node):
            replies = []
        elif request.opcode == Opcode.INTERRUPT:
            replies = [wire.out_header(0, -errno.EINTR, wire.interrupt_in(request.body))]
        else:
            replies = target.ask(packet)
        for reply in replies:
            with contextlib.suppress(OSError):
                os.write(device, reply)


def use(point: Path) -> None:
    """As programs do."""
    for command in (
        "ls -laR . ; find . -type f -size +1 ; cat a.jpg cold.jpg folder/* ; df . ; stat nothing",
        "touch a.jpg new ; mkdir d ; rm a.jpg ; rmdir folder ; mv a.jpg b.jpg ; ln a.jpg c ; ln -s a.jpg c ; mkfifo f",
        "chmod 600 a.jpg ; truncate -s 1 a.jpg ; python3 -c 'open(\"a.jpg\")'",
    ):
        subprocess.run(["sh", "-c", command], cwd=point, capture_output=True, check=False)
    names = ("user.cachefs.version", "security.selinux")
    for name in names:
        with contextlib.suppress(OSError):
            os.getxattr(point / "a.jpg", name)
        with contextlib.suppress(OSError):
            os.setxattr(point / "a.jpg", name, b"x")
    os.listxattr(point / "a.jpg")
    with open(point / "folder/b.jpg", "rb") as file:
        os.lseek(file.fileno(), 0, os.SEEK_DATA)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            assert len(bytes(view)) == 70_000
    with open(point / "hang", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        view.madvise(mmap.MADV_RANDOM)  # no read-ahead: a single page is waited for, and the wait is interrupted
        reader = os.fork()
        if reader == 0:
            os._exit(view[0])
        time.sleep(0.5)
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)
    Path("/proc/sys/vm/drop_caches").write_text("2")  # FORGET


def capture(flags: int) -> list[bytes]:
    packets: list[bytes] = []
    with tempfile.TemporaryDirectory() as name:
        target = Target(Path(name), flags=flags)
        point = Path(name, "mnt")
        point.mkdir()
        device = mounts.mount(point, source="capture", allow_other=False)
        thread = threading.Thread(target=answer, args=(device, target, flags, packets))
        thread.start()
        try:
            # Ours is read-only, and the kernel itself refuses to change anything.
            subprocess.run(["mount", "-i", "-o", "remount,rw", point], check=True)
            use(point)
        finally:
            mounts.unmount(point, lazy=True)
            thread.join(10)
            os.close(device)
            target.close()
    return packets


def main() -> None:
    packets = capture(int(WANTED)) + capture(0)
    kept: list[str] = []
    kinds: dict[tuple[int, int], int] = {}
    for packet in packets:
        (opcode,) = struct.unpack_from("=I", packet, 4)
        kind = (opcode, len(packet))
        kinds[kind] = kinds.get(kind, 0) + 1
        if kinds[kind] <= OF_A_KIND:
            kept.append(f"{abi.opcode_name(opcode)} {packet.hex()}")
    kernel = os.uname().release.partition("-")[0]
    CAPTURED.write_text(f"# Requests of Linux {kernel}, little-endian; made by python -m tests.fuse_capture\n")
    with CAPTURED.open("a") as file:
        file.writelines(f"{line}\n" for line in kept)
    print(f"{CAPTURED}: {len(kept)} of {len(packets)} requests")


if __name__ == "__main__":
    if shutil.which("find") is None or os.geteuid() != 0:
        sys.exit("needs root and findutils")
    main()
