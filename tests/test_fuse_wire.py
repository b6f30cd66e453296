"""The FUSE wire: layouts as in <linux/fuse.h>, and no input that breaks the decoder."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cachefs_sidecar.fuse import abi, wire
from cachefs_sidecar.fuse.abi import Init, Notify, Opcode, Open
from cachefs_sidecar.fuse.negotiation import MAX_BACKGROUND, agree
from cachefs_sidecar.fuse.wire import Attributes, WireError

HEADER = Path("/usr/include/linux/fuse.h")

FILE = Attributes(node=7, mode=0o100444, links=1, uid=1000, gid=100, size=4097, mtime_ns=1_700_000_000_123_456_789)


def packet(opcode: int, body: bytes = b"", *, unique: int = 2, node: int = 1, extensions: int = 0) -> bytes:
    return struct.pack("=IIQQIIIHH", 40 + len(body), opcode, unique, node, 1, 2, 3, extensions, 0) + body


@pytest.mark.skipif(not HEADER.exists(), reason="no <linux/fuse.h> here (Debian package linux-libc-dev)")
def test_numbers_are_those_of_the_kernel_header() -> None:
    text = HEADER.read_text()
    opcodes = {m[1]: int(m[2]) for m in re.finditer(r"^\tFUSE_(\w+)\s*= (\d+),", text, re.MULTILINE)}
    known = {opcode.name: opcode.value for opcode in Opcode if opcode.name in opcodes}
    assert len(known) > 40
    assert known == {name: opcodes[name] for name in known}
    flags = {
        m[1]: eval(m[2].replace("ULL", ""))
        for m in re.finditer(r"^#define FUSE_(\w+)\s+(\(1(?:ULL)? << \d+\))", text, re.MULTILINE)
    }
    for flag in Init:
        assert flag.name not in flags or flags[flag.name] == flag.value, flag
    answers = {m[1]: 1 << int(m[2]) for m in re.finditer(r"^#define FOPEN_(\w+)\s+\(1 << (\d+)\)", text, re.MULTILINE)}
    assert len(answers) >= 6
    for answer in Open:
        assert answer.name not in answers or answers[answer.name] == answer.value, answer
    codes = {m[1]: int(m[2]) for m in re.finditer(r"FUSE_NOTIFY_(\w+)\s*= (\d+),", text)}
    for code in Notify:
        assert code.name not in codes or codes[code.name] == code.value, code


def test_a_request_is_its_header_and_its_body() -> None:
    raw = packet(Opcode.READ, struct.pack("=QQIIQII", 0, 4096, 131072, 0, 0, 0, 0), unique=10, node=9)
    request = wire.decode(memoryview(raw))
    assert (request.opcode, request.unique, request.node) == (Opcode.READ, 10, 9)
    assert (request.uid, request.gid, request.pid, request.name) == (1, 2, 3, "READ")
    assert wire.read_in(request.body) == (4096, 131072)


def test_extensions_are_no_part_of_the_body() -> None:
    raw = packet(Opcode.LOOKUP, b"name\0" + b"\0" * 3 + b"security", extensions=1)
    assert wire.name_in(wire.decode(memoryview(raw)).body) == b"name"


def test_an_opcode_of_a_newer_kernel_has_a_name_to_log() -> None:
    assert wire.decode(memoryview(packet(4711))).name == "opcode 4711"


def test_layouts() -> None:
    """Sizes and offsets as the C compiler makes them of <linux/fuse.h>."""
    entry = wire.entry_out(FILE, 5)
    assert len(entry) == 128
    assert struct.unpack_from("=QQQQII", entry) == (7, 0, 5, 5, 0, 0)
    node, size, blocks, atime, mtime, ctime = struct.unpack_from("=QQQQQQ", entry, 40)
    assert (node, size, atime, mtime, ctime) == (7, 4097, 1_700_000_000, 1_700_000_000, 1_700_000_000)
    assert blocks == 16  # two blocks of 4 KiB, in units of 512 bytes
    assert struct.unpack_from("=IIIIIIIIII", entry, 88) == (
        *(123_456_789,) * 3,
        0o100444,
        1,
        1000,
        100,
        0,
        4096,
        0,
    )
    attr = wire.attr_out(FILE, 6)
    assert len(attr) == 104
    assert struct.unpack_from("=QII", attr) == (6, 0, 0)
    assert attr[16:] == entry[40:]
    assert struct.unpack_from("=QQQ", wire.no_entry_out(9)) == (0, 0, 9)
    assert len(wire.statfs_out(blocks=1, files=2)) == 80
    assert len(wire.open_out(2)) == 16
    assert wire.xattr_size_out(17) == struct.pack("=II", 17, 0)


def test_times_before_1970() -> None:
    entry = wire.attr_out(FILE._replace(mtime_ns=-1), 0)
    assert struct.unpack_from("=q", entry, 16 + 32)[0] == -1
    assert struct.unpack_from("=I", entry, 16 + 52)[0] == 999_999_999


NAMES = st.binary(min_size=1, max_size=255).filter(lambda n: b"\0" not in n)


@given(name=NAMES, node=st.integers(2, 2**63))
def test_directory_records_are_aligned_and_read_back(name: bytes, node: int) -> None:
    plain = wire.dirent(node, 77, name, directory=True)
    assert len(plain) % 8 == 0
    assert len(plain) >= wire.SMALLEST_DIRENT
    assert_dirent(plain, node, 77, name, 4)


@given(name=NAMES, node=st.integers(2, 2**63), mtime_ns=st.integers(-(2**62), 2**62))
def test_directory_records_with_attributes_begin_as_an_entry(name: bytes, node: int, mtime_ns: int) -> None:
    padded = len(name) + 7 & -8
    record = bytearray(b"?" * (wire.PLUS_BYTES + padded))
    seconds, nanos = divmod(mtime_ns, 10**9)
    times = (seconds, seconds, seconds, nanos, nanos, nanos)
    rest = wire.entry_rest(5), wire.attr_rest(FILE.mode, FILE.links, FILE.uid, FILE.gid)
    pack = wire.PLUS_RECORDS[padded]
    pack(record, 0, node, rest[0], node, FILE.size, 16, *times, rest[1], node, 77, len(name), 8, name)
    assert len(record) >= wire.SMALLEST_DIRENT_PLUS
    assert record[:128] == wire.entry_out(FILE._replace(node=node, mtime_ns=mtime_ns), 5)
    assert_dirent(bytes(record[128:]), node, 77, name, 8)


def assert_dirent(record: bytes, node: int, cookie: int, name: bytes, kind: int) -> None:
    assert struct.unpack_from("=QQII", record) == (node, cookie, len(name), kind)
    assert record[24 : 24 + len(name)] == name
    assert record[24 + len(name) :] == b"\0" * (-len(name) % 8)


def test_notifications() -> None:
    assert wire.notify_resend() == struct.pack("=IiQ", 16, 7, 0)
    assert wire.notify_inval_inode(5) == struct.pack("=IiQQqq", 40, 2, 0, 5, 0, 0)
    assert wire.notify_inval_entry(1, b"ab") == struct.pack("=IiQQII", 35, 3, 0, 1, 2, 0) + b"ab\0"


def test_init_takes_what_is_offered_and_wanted() -> None:
    offered = Init.ASYNC_READ | Init.NO_OPEN_SUPPORT | Init.HAS_RESEND | Init.PASSTHROUGH | Init.INIT_EXT
    body = struct.pack("=IIIIII", 7, 41, 131072, offered & 0xFFFFFFFF, offered >> 32, 0)
    agreement, reply = agree(wire.init_in(body))
    assert agreement.minor == abi.MINOR
    assert agreement.open_free
    assert agreement.resend
    assert not agreement.opendir_free  # not offered
    assert len(reply) == 64
    major, minor, ahead, low, background, _, _, _, pages, _, high = struct.unpack_from("=IIIIHHIIHHI", reply)
    assert (major, minor, ahead, background, pages) == (7, abi.MINOR, 131072, MAX_BACKGROUND, 256)
    assert low | high << 32 == offered & ~Init.PASSTHROUGH


def test_flags_above_31_count_only_when_announced() -> None:
    assert not wire.init_in(struct.pack("=IIIII", 7, 36, 0, 0, 0xFFFFFFFF)).flags
    assert wire.init_in(struct.pack("=IIII", 7, 36, 0, Init.INIT_EXT)).flags == Init.INIT_EXT


DECODERS = [wire.init_in, wire.name_in, wire.read_in, wire.getxattr_in, wire.listxattr_in, wire.interrupt_in]


@given(st.binary(max_size=200))
@example(packet(Opcode.LOOKUP, b"", extensions=65535))
@example(packet(Opcode.GETXATTR, b"\0" * 8))
def test_no_packet_breaks_the_decoder(raw: bytes) -> None:
    decode_everything(raw)


@given(st.binary(max_size=64), st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_no_body_breaks_the_decoder(body: bytes, opcode: int, extensions: int) -> None:
    decode_everything(packet(opcode, body, extensions=extensions))


def decode_everything(raw: bytes) -> None:
    """Raises what a decoder raises besides its own error."""
    try:
        request = wire.decode(memoryview(raw))
    except WireError:
        return
    for decoder in DECODERS:
        for body in (request.body, bytes(request.body)):
            try:
                decoder(body)
            except WireError:
                continue
