"""A coverage-guided search for requests that a session cannot bear: `python -m tests.fuse_guided [FLAGS] [FOLDER...]`.

FLAGS are libFuzzer's: -max_total_time=60, -runs=100000; FOLDER keeps what reached something new, a file is repeated.
An input is a number of packets, each behind its length in two bytes (little-endian). Needs atheris.
"""

from __future__ import annotations

import logging
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["cachefs_sidecar.fuse"]):
    from tests.fuse_fuzz import Target, captured

# An answer to one request may depend on what the one before left behind.
PACKETS_OF_A_SEED = 3


def packed(packets: list[bytes]) -> bytes:
    return b"".join(struct.pack("<H", len(packet)) + packet for packet in packets)


def unpacked(data: bytes) -> list[bytes]:
    packets, at = [], 0
    while at + 2 <= len(data):
        (length,) = struct.unpack_from("<H", data, at)
        packets.append(data[at + 2 : at + 2 + length])
        at += 2 + length
    return packets


def main(flags: list[str]) -> None:
    logging.disable(logging.CRITICAL)  # a line for each refused request would be most of the work
    with tempfile.TemporaryDirectory() as name:
        seeds = Path(name, "seeds")
        seeds.mkdir()
        packets = captured()
        for first in range(0, len(packets), PACKETS_OF_A_SEED):
            (seeds / f"{first}").write_bytes(packed(packets[first : first + PACKETS_OF_A_SEED]))
        target = Target(Path(name))
        folders = [] if any(Path(flag).is_file() for flag in flags) else [str(seeds)]
        atheris.Setup([sys.argv[0], *flags, *folders], lambda data: target.ask(*unpacked(data)))
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
