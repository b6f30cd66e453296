"""Messages between a command and its own processes: a length of four bytes, then so many."""

from __future__ import annotations

import asyncio
import struct

_LENGTH = struct.Struct(">I")

# A task or an answer is about a thousand objects; S3 keys are at most 1 KiB each, local paths 4.
MOST = 64 * 1024 * 1024


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """None at the end, also in the middle of a message: then the other process died."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return None if length > MOST else await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def write_frame(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(_LENGTH.pack(len(data)) + data)
