"""What is asked of a worker, and what it answers: MessagePack, whatever carries it.

Both ends may be of different versions of cachefs (a cluster of workers is started apart from the command), so each
message begins with the version of this page, and another one is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from cachefs.batch.reach import Reach
from cachefs.errors import CacheFSError, ConfigError, FetcherError, from_wire, to_wire
from cachefs.messages import Entry

VERSION = 1

# A task: what an origin gives in some seconds, so that a lost one costs little and handing it out costs nothing.
OBJECTS = 1000
BYTES = 1 << 30

# MessagePack holds no larger number with a sign, and a catalog takes none.
_MAX = 2**63 - 1

# (path, class name of the error, message): what could not be done.
Failure = tuple[str, str, str]


class ListNames(msgspec.Struct, frozen=True, tag=True):
    """The objects below `folder` after the object path `after`, some `most` of them. Answered with Names."""

    reach: Reach
    folder: bytes
    after: bytes
    most: int


# An Entry whose texts are bytes: a name at an origin need not be UTF-8, and is then reported as skipped.
Name = tuple[bytes, int, int, bytes, bool]


class Names(msgspec.Struct, frozen=True, tag=True):
    """more: there may be others after the last of these."""

    names: list[Name]
    more: bool


class HashObjects(msgspec.Struct, frozen=True, tag=True):
    """objects: (number, path, size, version). Answered with Keys."""

    reach: Reach
    objects: list[tuple[int, str, int, str]]


class Keys(msgspec.Struct, frozen=True, tag=True):
    """keys: (number, content key); size: bytes that were read."""

    keys: list[tuple[int, bytes]]
    failed: list[Failure]
    size: int


class Meet(msgspec.Struct, frozen=True, tag=True):
    """Which node of a cachefs cluster is this machine? Answered with Met. dirs: of its cache, none = its default."""

    dirs: list[str]


class Met(msgspec.Struct, frozen=True, tag=True):
    """name: "" = of none. nodes: (name, weight) of all that it sees. cache: its home, to be named in errors."""

    name: str
    nodes: list[tuple[str, int]]
    cache: str


class WarmObjects(msgspec.Struct, frozen=True, tag=True):
    """Fetch these into the cache of the worker's machine. objects: (path, version, size). Answered with Warmed."""

    reach: Reach
    root: str
    dirs: list[str]
    tenant: str
    objects: list[tuple[str, str, int]]


class Warmed(msgspec.Struct, frozen=True, tag=True):
    """objects: tried, whether or not they could be fetched."""

    objects: int
    size: int
    failed: list[Failure]


class Wrong(msgspec.Struct, frozen=True, tag=True):
    """The task could not be done: errors.to_wire."""

    error: tuple[str, str, str | None]


Task = ListNames | HashObjects | Meet | WarmObjects
Answer = Names | Keys | Met | Warmed | Wrong

_encode = msgspec.msgpack.Encoder().encode
_decode_task = msgspec.msgpack.Decoder(Task).decode
_decode_answer = msgspec.msgpack.Decoder(Answer).decode


@dataclass(frozen=True)
class Parcel:
    """A task on its way. What a dashboard or a log shows of it is the label."""

    label: str
    data: bytes = field(repr=False)


def pack(label: str, task: Task) -> Parcel:
    return Parcel(label, bytes([VERSION]) + _encode(task))


def unpack(data: bytes) -> Task:
    """Raises ConfigError for what another version of cachefs sent, or nobody of ours."""
    if data[:1] != bytes([VERSION]):
        raise _another_version()
    try:
        task: Task = _decode_task(data[1:])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise _another_version() from None
    return task


def pack_answer(answer: Answer) -> bytes:
    return bytes([VERSION]) + _encode(answer)


def pack_error(error: BaseException) -> bytes:
    return pack_answer(Wrong(to_wire(error)))


def unpack_answer(data: object) -> Answer:
    """Raises what the worker met, and ConfigError for an answer of another version."""
    if not isinstance(data, bytes) or data[:1] != bytes([VERSION]):
        raise _another_version()
    try:
        answer: Answer = _decode_answer(data[1:])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise _another_version() from None
    if isinstance(answer, Wrong):
        raise from_wire(answer.error)
    return answer


def name_of(entry: Entry) -> Name:
    size, mtime_ns = min(entry.size, _MAX + 1), max(-_MAX, min(entry.mtime_ns, _MAX))
    return to_bytes(entry.path), size, mtime_ns, to_bytes(entry.version), entry.directory


def entry_of(name: Name) -> Entry:
    path, size, mtime_ns, version, directory = name
    return Entry(to_text(path), size, mtime_ns, to_text(version), directory)


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def to_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def failure(path: str, error: CacheFSError) -> Failure:
    return path, type(error).__name__, error.message


def lost(parcel: Parcel, why: str) -> FetcherError:
    return FetcherError(f"{parcel.label}: {why}")


def _another_version() -> ConfigError:
    return ConfigError(
        "a worker runs another version of cachefs, which this one does not understand: install the same on both"
    )
