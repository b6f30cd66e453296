"""Content keys: what a blob is called, and how its bytes are checked.

Version 1 of the definition (docs of the format: ARCHITECTURE.md, "On disk"):
  * the key of content of at most BLOCK_SIZE bytes is XXH3-128 of the content;
  * larger content is cut into blocks of BLOCK_SIZE bytes (the last may be shorter); each block has its own
    XXH3-128, and the key is XXH3-128 of the concatenated 16-byte block digests, seeded with LARGE_SEED so that
    a large object's key cannot equal the key of a small object that consists of those digests.
Digests are 16 bytes in the canonical (big-endian) order of xxHash (https://xxhash.com, "canonical
representation"). XXH3 is fast, not collision resistant: blobs are shared only inside one trust domain.

A tenant's blobs are named by content key and `tenant_tag`, so equal content of two tenants does not meet. It is checked
by its content key all the same: the first KEY_BYTES of the name.

Names are hashed with BLAKE2b instead, because names come from outside and an attacker may choose them.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from xxhash import xxh3_128_digest

KEY_VERSION = 1
KEY_BYTES = 16

# One request to distributed storage is efficient from some MiB up; 8 MiB is also what S3 clients use as part
# size, and a damaged or missing block costs at most this much to fetch again.
BLOCK_SIZE = 8 * 1024 * 1024

LARGE_SEED = 1

TAG_BYTES = 16


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """XXH3-128 of `data`, 16 bytes: a whole small object, or one block of a large one."""
    return xxh3_128_digest(data)


def key_of_blocks(digests: Iterable[bytes]) -> bytes:
    """Content key (16 bytes) of an object larger than BLOCK_SIZE from its block digests in order."""
    return xxh3_128_digest(b"".join(digests), LARGE_SEED)


def content_key(data: bytes | bytearray | memoryview) -> bytes:
    """Content key (16 bytes) of bytes in memory, of any length."""
    if len(data) <= BLOCK_SIZE:
        return digest(data)
    view = memoryview(data)
    return key_of_blocks(digest(view[at : at + BLOCK_SIZE]) for at in range(0, len(view), BLOCK_SIZE))


def tenant_tag(tenant: str) -> bytes:
    """What follows the content key in the names of a tenant's blobs: nothing where there is no tenant."""
    return blake2b(tenant.encode(), digest_size=TAG_BYTES).digest() if tenant else b""


def block_count(size: int) -> int:
    """Number of blocks of an object of `size` bytes (an empty object has none)."""
    return -(-size // BLOCK_SIZE)


def block_range(index: int, size: int) -> tuple[int, int]:
    """(start, stop) in bytes of block `index` of an object of `size` bytes."""
    return index * BLOCK_SIZE, min(size, (index + 1) * BLOCK_SIZE)


def dataset_id(identity: str, root: str) -> str:
    """32 hex characters naming the dataset `root` of the origin `identity` in file names of a cache."""
    return blake2b(f"{identity}\0{root}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def version_ref(path: str, version: str) -> str:
    """32 hex characters: the file name under which version `version` of object `path` is found in a dataset.

    This is what a mount looks up: its catalog knows the version of every entry.
    """
    data = f"v{version}\0{path}".encode("utf-8", "surrogateescape")
    return blake2b(data, digest_size=16).hexdigest()


def snapshot_ref(path: str, snapshot: str) -> str:
    """32 hex characters: the file name under which object `path`, as of `snapshot`, is found in a dataset.

    This is what the fsspec file system looks up: one open() answers a hit, with no catalog and no index.
    """
    data = f"s{snapshot}\0{path}".encode("utf-8", "surrogateescape")
    return blake2b(data, digest_size=16).hexdigest()
