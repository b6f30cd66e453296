"""The bytes of the FUSE protocol, and nothing else: no descriptor, no clock, no catalog.

The names and numbers are those of <linux/fuse.h>. What comes from the kernel is decoded by functions that raise
`WireError` for anything they cannot read and never another exception, so that one bad packet costs one error
reply, not a worker. What goes to the kernel is built here too. Everything is in the machine's byte order, as the
kernel writes it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from cachefs_sidecar.fuse.abi import BLOCK, MAJOR, NAME_MAX, S_IFDIR, S_IFREG, UNANSWERED, Init, Notify, opcode_name

Buffer = bytes | bytearray | memoryview


class WireError(ValueError):
    """Bytes from the kernel that do not follow the protocol.

    unique: of the request that they are, if somebody may wait for its answer; 0 = there is none to answer.
    """

    def __init__(self, text: str, unique: int = 0) -> None:
        super().__init__(text)
        self.unique = unique


_IN = struct.Struct("=IIQQIIIHH")  # fuse_in_header
_FIRST_LOOK = struct.Struct("=IIQ")
_WHOLE_READ = struct.Struct("=16xQ8xI4x8xQI")  # header and fuse_read_in
_OUT = struct.Struct("=IiQ")  # fuse_out_header
_INIT_IN = struct.Struct("=IIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHII24x")
_READ_IN = struct.Struct("=QQI")  # the start of fuse_read_in: fh, offset, size
_RELEASE_IN = struct.Struct("=Q")  # the start of fuse_release_in: fh
_XATTR_IN = struct.Struct("=I4x")
_INTERRUPT_IN = struct.Struct("=Q")
_ATTR = "QQQQQQIIIIIIIIII"  # fuse_attr
_ENTRY_HEAD = "QQQQII"  # fuse_entry_out before its attributes
_ENTRY_OUT = struct.Struct("=" + _ENTRY_HEAD + _ATTR)
_ATTR_OUT = struct.Struct("=QI4x" + _ATTR)
_OPEN_OUT = struct.Struct("=QIi")
_STATFS_OUT = struct.Struct("=QQQQQIII28x")
_XATTR_OUT = struct.Struct("=I4x")
_DIRENT = struct.Struct("=QQII")
_DIRENT_PLUS = struct.Struct("=" + _ENTRY_HEAD + _ATTR + "QQII")
_ENTRY_REST = struct.Struct("=" + _ENTRY_HEAD[1:])  # what follows the node
_ATTR_REST = struct.Struct("=IIIIIII")  # what follows the times
_INVAL_INODE = struct.Struct("=Qqq")
_INVAL_ENTRY = struct.Struct("=QII")

IN_HEADER_BYTES = _IN.size
OUT_HEADER_BYTES = _OUT.size

# A READ has at least so many bytes.
READ_BYTES = _WHOLE_READ.size

# fuse_direntplus by the length of its name with its padding (the struct module fills up with NULs), packed into a
# buffer at an offset: node, entry_rest, inode, size, blocks, three times in seconds, their nanoseconds, attr_rest,
# inode, cookie, length of the name, kind, name. What is the same in every record is packed before, because an
# argument costs 30 ns and a listing has millions of them.
PLUS_RECORDS: dict[int, Callable[..., None]] = {
    padded: struct.Struct(f"={'Q'}{_ENTRY_REST.size}s{'QQQqqqIII'}{_ATTR_REST.size}s{'QQII'}{padded}s").pack_into
    for padded in range(8, NAME_MAX + 9, 8)
}

# Bytes of a record before its name.
PLUS_BYTES = _DIRENT_PLUS.size

# The smallest records, for a caller that wants to know how many entries can fit a page at most.
SMALLEST_DIRENT = _DIRENT.size + 8
SMALLEST_DIRENT_PLUS = _DIRENT_PLUS.size + 8


class Request(NamedTuple):
    """One request: whose (uid, gid, pid as the mount's namespaces see them), about which node, and its body."""

    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    body: memoryview

    @property
    def name(self) -> str:
        return opcode_name(self.opcode)


class Attributes(NamedTuple):
    """What stat(2) shows of a node. size in bytes, mtime_ns in nanoseconds since the epoch (it may be negative)."""

    node: int
    mode: int
    links: int
    uid: int
    gid: int
    size: int
    mtime_ns: int


class InitIn(NamedTuple):
    major: int
    minor: int
    max_readahead: int
    flags: int


# --- from the kernel -----------------------------------------------------------------------------------------


def decode(data: memoryview) -> Request:
    """The request in one packet. Its body borrows `data`. Raises WireError."""
    try:
        length, opcode, unique, node, uid, gid, pid, extensions, _ = _IN.unpack_from(data)
    except struct.error as error:
        raise WireError(f"a request of {len(data)} bytes has no header") from error
    if unique == 0:
        # An answer to number 0 would be a notification.
        raise WireError(f"{opcode_name(opcode)} has no number")
    answerable = 0 if opcode in UNANSWERED else unique
    if length != len(data):
        raise WireError(f"{opcode_name(opcode)} says it has {length} bytes and has {len(data)}", answerable)
    # Extensions (security context, supplementary groups) lie behind the body, in units of 8 bytes.
    end = length - extensions * 8
    if end < IN_HEADER_BYTES:
        raise WireError(
            f"{opcode_name(opcode)} of {length} bytes says it has {extensions * 8} bytes of extensions", answerable
        )
    return Request(opcode, unique, node, uid, gid, pid, data[IN_HEADER_BYTES:end])


def first_look(data: bytearray) -> tuple[int, int, int]:
    """(length that it says, opcode, unique) of the packet in a buffer of at least a header's size."""
    return _FIRST_LOOK.unpack_from(data)


def whole_read(data: bytearray) -> tuple[int, int, int, int]:
    """(node, pid, offset, size) of a READ that is known to be whole, in one step: see READ_BYTES."""
    return _WHOLE_READ.unpack_from(data)


def init_in(body: Buffer) -> InitIn:
    """Raises WireError."""
    try:
        major, minor, max_readahead, flags = _INIT_IN.unpack_from(body)
        # Kernels from 7.36 on have 32 more flags behind, announced by INIT_EXT.
        if flags & Init.INIT_EXT and len(body) >= 20:
            flags |= struct.unpack_from("=I", body, 16)[0] << 32
    except struct.error as error:
        raise WireError("INIT is too short") from error
    return InitIn(major, minor, max_readahead, flags)


def name_in(body: Buffer) -> bytes:
    """The file name that is the whole body, without its NUL. Raises WireError."""
    name = bytes(body)
    end = name.find(b"\0")
    if end <= 0:
        raise WireError("a name is empty or has no end")
    return name[:end]


def read_in(body: Buffer) -> tuple[int, int]:
    """(offset, size) in bytes of READ; for READDIR and READDIRPLUS the offset is the cookie. Raises WireError."""
    try:
        _, offset, size = _READ_IN.unpack_from(body)
    except struct.error as error:
        raise WireError("READ is too short") from error
    return offset, size


def release_in(body: Buffer) -> int:
    """The `fh` of what is closed. Raises WireError."""
    try:
        fh: int = _RELEASE_IN.unpack_from(body)[0]
    except struct.error as error:
        raise WireError("RELEASE is too short") from error
    return fh


def getxattr_in(body: Buffer) -> tuple[int, bytes]:
    """(room for the value in bytes, 0 = only its size is asked; attribute name). Raises WireError."""
    return listxattr_in(body), name_in(body[_XATTR_IN.size :])


def listxattr_in(body: Buffer) -> int:
    """Room for the list in bytes, 0 = only its size is asked. Raises WireError."""
    try:
        size: int = _XATTR_IN.unpack_from(body)[0]
    except struct.error as error:
        raise WireError("an extended attribute request is too short") from error
    return size


def interrupt_in(body: Buffer) -> int:
    """`unique` of the request that is to end. Raises WireError."""
    try:
        unique: int = _INTERRUPT_IN.unpack_from(body)[0]
    except struct.error as error:
        raise WireError("INTERRUPT is too short") from error
    return unique


# --- to the kernel -------------------------------------------------------------------------------------------


def out_header(length: int, error: int, unique: int) -> bytes:
    """length: bytes of the payload behind it. error: 0 or a negative errno."""
    return _OUT.pack(OUT_HEADER_BYTES + length, error, unique)


def out_header_into(buffer: bytearray | memoryview, length: int, unique: int) -> None:
    """The header of a successful reply, at the start of `buffer`."""
    _OUT.pack_into(buffer, 0, OUT_HEADER_BYTES + length, 0, unique)


def init_out(
    *,
    minor: int,
    max_readahead: int,
    flags: int,
    max_background: int,
    congestion_threshold: int,
    max_write: int,
    max_pages: int,
    max_stack_depth: int = 0,
) -> bytes:
    low, high = flags & 0xFFFFFFFF, flags >> 32
    nanosecond = 1  # time_gran: times are exact to one nanosecond
    return _INIT_OUT.pack(
        MAJOR,
        minor,
        max_readahead,
        low,
        max_background,
        congestion_threshold,
        max_write,
        nanosecond,
        max_pages,
        0,
        high,
        max_stack_depth,
    )


def _attr(a: Attributes) -> tuple[int, ...]:
    # Seconds travel as the unsigned 64 bits of a signed number: times before 1970 are allowed.
    seconds, nanos = divmod(a.mtime_ns, 1_000_000_000)
    seconds &= 0xFFFFFFFFFFFFFFFF
    blocks = -(-a.size // BLOCK) * (BLOCK // 512)
    return (
        a.node,
        a.size,
        blocks,
        seconds,
        seconds,
        seconds,
        nanos,
        nanos,
        nanos,
        a.mode,
        a.links,
        a.uid,
        a.gid,
        0,
        BLOCK,
        0,
    )


def entry_out(attributes: Attributes, valid: int) -> bytes:
    """A found name, to be remembered for `valid` seconds."""
    return _ENTRY_OUT.pack(attributes.node, 0, valid, valid, 0, 0, *_attr(attributes))


def no_entry_out(valid: int) -> bytes:
    """A name that does not exist, to be remembered as such for `valid` seconds (node 0 says so)."""
    return _ENTRY_OUT.pack(0, 0, valid, 0, 0, 0, *(0,) * 16)


def attr_out(attributes: Attributes, valid: int) -> bytes:
    return _ATTR_OUT.pack(valid, 0, *_attr(attributes))


def open_out(flags: int, fh: int = 0, backing_id: int = 0) -> bytes:
    """fh: what RELEASE will say. backing_id: with Open.PASSTHROUGH."""
    return _OPEN_OUT.pack(fh, flags, backing_id)


def statfs_out(*, blocks: int, files: int) -> bytes:
    """A full file system of `blocks` blocks of BLOCK bytes: like every read-only one, it has no free space."""
    return _STATFS_OUT.pack(blocks, 0, 0, files, 0, BLOCK, NAME_MAX, BLOCK)


def xattr_size_out(size: int) -> bytes:
    return _XATTR_OUT.pack(size)


def dirent(node: int, cookie: int, name: bytes, directory: bool) -> bytes:
    kind = (S_IFDIR if directory else S_IFREG) >> 12
    return _DIRENT.pack(node, cookie, len(name), kind) + name + b"\0" * (-len(name) % 8)


def entry_rest(valid: int) -> bytes:
    """What follows the node in an entry that may be remembered for `valid` seconds. For PLUS_RECORDS."""
    return _ENTRY_REST.pack(0, valid, valid, 0, 0)


def attr_rest(mode: int, links: int, uid: int, gid: int) -> bytes:
    """What follows the times in a node's attributes. For PLUS_RECORDS."""
    return _ATTR_REST.pack(mode, links, uid, gid, 0, BLOCK, 0)


def dirent_plus_dot(node: int, cookie: int, name: bytes) -> bytes:
    """`.` or `..` in a READDIRPLUS page: node 0 tells the kernel that no entry is to be remembered for it."""
    head = (0,) * 22
    return _DIRENT_PLUS.pack(*head, node, cookie, len(name), S_IFDIR >> 12) + name + b"\0" * (-len(name) % 8)


# --- notifications (unique 0, the code in place of the error) -------------------------------------------------


def notify_resend() -> bytes:
    """Deliver again every request that nobody has answered."""
    return _OUT.pack(OUT_HEADER_BYTES, Notify.RESEND, 0)


def notify_inval_inode(node: int) -> bytes:
    """Forget the attributes and all pages of a node (for a directory: its remembered listing)."""
    body = _INVAL_INODE.pack(node, 0, 0)
    return _OUT.pack(OUT_HEADER_BYTES + len(body), Notify.INVAL_INODE, 0) + body


def notify_inval_entry(parent: int, name: bytes) -> bytes:
    """Forget what `name` in `parent` is, or that it does not exist."""
    body = _INVAL_ENTRY.pack(parent, len(name), 0) + name + b"\0"
    return _OUT.pack(OUT_HEADER_BYTES + len(body), Notify.INVAL_ENTRY, 0) + body
