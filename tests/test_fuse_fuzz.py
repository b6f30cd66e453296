"""No request, whatever its bytes, ends a worker, gets another's answer, or is left without one.

FUZZ_SECONDS=600 makes the guided run long.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs_sidecar.fuse import wire
from cachefs_sidecar.fuse.abi import UNIQUE_RESEND, Opcode
from cachefs_sidecar.fuse.negotiation import WANTED
from tests.fuse_fuzz import FILES, Target, Wrong, captured

CAPTURED = captured()

# Values that decoders get wrong: ends of ranges, node ids that exist, sizes that are agreed.
NUMBERS = [0, 1, 2, 3, 7, 8, 255, 256, 4095, 4096, 65536, 2**20, 2**20 + 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


@pytest.fixture(scope="module", params=[int(WANTED), 0], ids=["as agreed", "an older kernel"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    logging.getLogger("cachefs.mount").setLevel(logging.CRITICAL)
    made = Target(tmp_path_factory.mktemp("fuzz"), flags=request.param)
    yield made
    made.close()
    logging.getLogger("cachefs.mount").setLevel(logging.NOTSET)


def header(opcode: int, unique: int, node: int, body: bytes, *, length: int | None = None) -> bytes:
    said = wire.IN_HEADER_BYTES + len(body) if length is None else length
    return struct.pack("=IIQQIIIHH", said, opcode, unique, node, 0, 0, 0, 0, 0) + body


def test_captured_requests_are_answered(target: Target) -> None:
    for packet in CAPTURED:
        target.ask(packet)
    read = [packet for packet in CAPTURED if struct.unpack_from("=I", packet, 4)[0] == Opcode.READ]
    assert sum(len(answer) for packet in read for answer in target.ask(packet)) > 100_000
    assert {struct.unpack_from("=I", packet, 4)[0] for packet in CAPTURED} >= {
        Opcode.LOOKUP, Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.GETATTR, Opcode.OPEN, Opcode.READ, Opcode.RELEASE,
        Opcode.OPENDIR, Opcode.READDIR, Opcode.READDIRPLUS, Opcode.GETXATTR, Opcode.LISTXATTR, Opcode.INTERRUPT,
        Opcode.IOCTL, Opcode.INIT, Opcode.STATFS,
    }  # fmt: skip


@pytest.mark.parametrize("opcode", [*Opcode, 0, 54, 4711, 2**32 - 1])
def test_every_opcode_with_and_without_a_body(target: Target, opcode: int) -> None:
    for node in (0, 1, 2, 5, 999, 2**63, 2**64 - 1):
        for body in (b"", b"\0", bytes(7), bytes(8), bytes(40), bytes(80), b"name\0", b"\xff" * 80, b"x" * 4096):
            target.ask(header(opcode, 10, node, body), header(opcode, 10 | UNIQUE_RESEND, node, body))


def test_packets_that_are_not_as_long_as_they_say(target: Target) -> None:
    for opcode in (Opcode.READ, Opcode.IOCTL, Opcode.GETATTR, Opcode.FORGET, Opcode.INTERRUPT):
        whole = header(opcode, 12, 1, bytes(40))
        for cut in range(1, len(whole)):
            target.ask(whole, whole[:cut])  # what lies behind a short one is the one before it
        for length in (0, 4, 16, 39, 40, 79, 81, 2**32 - 1):
            target.ask(header(opcode, 14, 1, bytes(40), length=length))


def mutated(draw: st.DrawFn, packet: bytes) -> bytes:
    raw = bytearray(packet)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        match draw(st.sampled_from(["byte", "4", "8", "cut", "more", "opcode", "node", "resend"])):
            case "byte" if raw:
                raw[at] = draw(st.integers(0, 255))
            case "4":
                raw[at : at + 4] = struct.pack("=I", draw(st.sampled_from(NUMBERS)) & 0xFFFFFFFF)
            case "8":
                raw[at & ~7 : (at & ~7) + 8] = struct.pack("=Q", draw(st.sampled_from(NUMBERS)))
            case "cut":
                del raw[at:]
            case "more":
                raw[at:at] = draw(st.binary(max_size=64))
            case "opcode":
                raw[4:8] = struct.pack("=I", draw(st.integers(0, 60)))
            case "node":
                raw[16:24] = struct.pack("=Q", draw(st.integers(0, len(FILES) + 3)))
            case "resend" if len(raw) > 15:
                raw[15] ^= 0x80
    if draw(st.integers(0, 3)) and len(raw) >= 4:  # mostly as long as they say: else no decoder sees them
        raw[:4] = struct.pack("=I", len(raw))
    return bytes(raw)


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    return [mutated(draw, draw(st.sampled_from(CAPTURED))) for _ in range(draw(st.integers(1, 4)))]


@given(packets=conversations())
@settings(max_examples=500)
def test_requests_like_the_kernels(target: Target, packets: list[bytes]) -> None:
    target.ask(*packets)


@given(packets=st.lists(st.binary(max_size=200), max_size=3))
@settings(max_examples=200)
def test_any_bytes(target: Target, packets: list[bytes]) -> None:
    target.ask(*packets)


@pytest.mark.parametrize("seconds", [int(os.environ.get("FUZZ_SECONDS", "5"))])
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_a_guided_search_finds_nothing(tmp_path: Path, seconds: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuse_guided", f"-max_total_time={seconds}", "-timeout=20", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Done " in done.stderr  # it ran
    assert len(list(tmp_path.iterdir())) > 10  # and was guided


def test_what_is_wrong_is_seen(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watcher itself."""
    get = header(Opcode.GETATTR, 20, 1, bytes(16))
    write = target.session._write
    monkeypatch.setattr(target.session, "_write", lambda *reply: None)
    with pytest.raises(Wrong, match="0 answers"):
        target.ask(get)
    monkeypatch.setattr(target.session, "_write", lambda head, *rest: write(wire.out_header(0, -5, 18)))
    with pytest.raises(Wrong, match="another number"):
        target.ask(get)
    node = next(n for n, content in target._content.items() if len(content) == 9000)
    read = header(Opcode.READ, 22, node, struct.pack("=QQIIQII", 0, 0, 4096, 0, 0, 0, 0))
    target._content[node] = target._content[node][::-1]
    monkeypatch.setattr(target.session, "_write", write)
    with pytest.raises(Wrong, match="bytes"):
        target.ask(read)
    target._content[node] = target._content[node][::-1]
