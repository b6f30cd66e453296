"""The trace: every request and flag by its name, in lines that a person can read."""

from __future__ import annotations

import errno
import logging
import struct

import pytest

from cachefs_sidecar.fuse import tracing, wire
from cachefs_sidecar.fuse.abi import UNIQUE_RESEND, Init, Opcode, Open, flag_names
from tests.fuse_fuzz import captured


def request(opcode: int, body: bytes = b"", unique: int = 8) -> wire.Request:
    return wire.Request(opcode, unique, 5, 0, 0, 4711, memoryview(body))


@pytest.mark.parametrize(
    ("of", "answer", "line"),
    [
        (
            request(Opcode.READ, struct.pack("=QQI", 0, 4096, 131072)),
            bytes(4096),
            "READ unique=8 node=5 pid=4711 offset=4096 size=131072 -> 4096 bytes",
        ),
        (
            request(Opcode.READ, struct.pack("=QQI", 0, 0, 10), 8 | UNIQUE_RESEND),
            None,
            "READ unique=8, delivered again node=5 pid=4711 offset=0 size=10 -> waits for the fetcher",
        ),
        (
            request(Opcode.LOOKUP, b"caf\xc3\xa9\0"),
            -errno.ENOENT,
            "LOOKUP unique=8 node=5 pid=4711 name='caf\u00e9' -> ENOENT",
        ),
        (
            request(Opcode.LOOKUP, b""),
            -errno.EINVAL,
            "LOOKUP unique=8 node=5 pid=4711 (a name is empty or has no end) -> EINVAL",
        ),
        (
            request(Opcode.GETXATTR, struct.pack("=II", 100, 0) + b"user.x\0"),
            b"1",
            "GETXATTR unique=8 node=5 pid=4711 name='user.x' room=100 -> 1 bytes",
        ),
        (
            request(Opcode.INTERRUPT, struct.pack("=Q", 6), 7),
            None,
            "INTERRUPT unique=7 node=5 pid=4711 of=6 -> no answer is wanted",
        ),
        (request(4711), -errno.ENOSYS, "opcode 4711 unique=8 node=5 pid=4711 -> ENOSYS"),
    ],
)
def test_a_request_is_a_line(
    caplog: pytest.LogCaptureFixture, of: wire.Request, answer: bytes | int | None, line: str
) -> None:
    with caplog.at_level(logging.DEBUG, "cachefs.mount"):
        tracing.passed(of, answer)
    assert caplog.messages == [line]


def test_a_late_answer_and_the_agreement(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "cachefs.mount"):
        tracing.answered(12, b"abc")
        tracing.answered(14, -errno.ESTALE)
        tracing.agreed(wire.InitIn(7, 45, 131072, Init.ASYNC_READ | Init.HAS_RESEND | 1 << 60), 40, Init.ASYNC_READ)
    assert caplog.messages == [
        "unique=12 -> 3 bytes",
        "unique=14 -> ESTALE",
        "INIT 7.45 max_readahead=131072 flags=ASYNC_READ|HAS_RESEND|0x1000000000000000 -> minor=40 flags=ASYNC_READ",
    ]


def test_flags_have_names() -> None:
    assert flag_names(Open, Open.KEEP_CACHE | Open.CACHE_DIR) == "KEEP_CACHE|CACHE_DIR"
    assert flag_names(Open, 0) == "0"
    assert flag_names(Init, 1 << 63) == hex(1 << 63)


def test_what_a_real_kernel_sends_has_names() -> None:
    for packet in captured():
        line = tracing.describe(wire.decode(memoryview(packet)))
        assert not line.startswith("opcode"), line
        offer = wire.decode(memoryview(packet))
        if offer.opcode == Opcode.INIT:
            assert "0x" not in flag_names(Init, wire.init_in(offer.body).flags)
