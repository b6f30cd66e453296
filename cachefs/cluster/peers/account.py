"""What a node says of itself and of the others, when one of them asks: the raw material of `cachefs cluster status`.

One message each way, in a session as any other: who asks sends INQUIRY instead of a request, and the answer is an
Account in MessagePack, not frames. It is a map, so nodes of versions that know more or less of it understand each
other: fields that are unknown are ignored, fields that do not come are empty.

All of it comes from outside. Every length and number has a limit, and texts are data: whoever shows them escapes them.
Whole numbers only, as those have neither infinities nor NaN. No clock of another node is believed: times are ages.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated, Literal

import msgspec

from cachefs.cluster.peers.wire import encode
from cachefs.errors import PeerWrong

# What no Request can be: those begin with a list.
INQUIRY = encode(["account"])

# So large that nobody's is cut in a cluster of some hundred nodes, and so small that 1,000 of them are no burden.
MOST_ACCOUNT = 64 * 1024
MOST_TEXT = 300
MOST_PEERS = 64
MOST_NAMES = 256
MOST_DATASETS = 64

State = Literal["closed", "open", "half open"]  # health.py says what they mean

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Name = Annotated[str, msgspec.Meta(max_length=253)]
_Text = Annotated[str, msgspec.Meta(max_length=MOST_TEXT)]
_Id = Annotated[str, msgspec.Meta(max_length=64)]


class Counts(msgspec.Struct, frozen=True):
    """asked: by readers of this node, of its fetcher. stored: was on the disk when it was asked for. found: what
    readers found on the disk without asking, as far as anybody sees it: the kernel's page cache asks nobody.

    from_peers, from_origin: objects and blocks that came from there, with or without a reader who waits (hints).
    for_peers: of from_origin, those that were read because another node asked for them. peer_failures: what a peer was
    asked for and did not give, or gave later than the origin.
    """

    asked: _Count = 0
    stored: _Count = 0
    from_peers: _Count = 0
    from_peers_bytes: _Count = 0
    peer_failures: _Count = 0
    from_origin: _Count = 0
    from_origin_bytes: _Count = 0
    origin_errors: _Count = 0
    for_peers: _Count = 0
    found: _Count = 0


class Given(msgspec.Struct, frozen=True):
    """To other nodes, from this one's disk or through it."""

    objects: _Count = 0
    bytes: _Count = 0


class Lately(msgspec.Struct, frozen=True):
    """What was counted in the last so many milliseconds."""

    milliseconds: _Count = 0
    counts: Counts = Counts()


class GivenLately(msgspec.Struct, frozen=True):
    milliseconds: _Count = 0
    given: Given = Given()


class Seen(msgspec.Struct, frozen=True):
    """How another node does, as this one sees it. Of the last minute: late, how often the origin was faster; lately,
    how many objects it gave (some of them, where they are very many), and p50 and p99, the microseconds that these
    took, from request to object.
    """

    node: _Name
    state: State = "closed"
    objects: _Count = 0
    bytes: _Count = 0
    failures: _Count = 0
    wrong: _Count = 0
    busy: _Count = 0
    late: _Count = 0
    lately: _Count = 0
    p50: _Count = 0
    p99: _Count = 0
    last_failure: _Text = ""


class View(msgspec.Struct, frozen=True):
    """Which nodes there are, as this one sees it. digest: of their names, the same for the same names. names: empty
    where there are too many to name."""

    count: _Count = 0
    digest: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    names: Annotated[list[_Name], msgspec.Meta(max_length=MOST_NAMES)] = []


class Served(msgspec.Struct, frozen=True):
    """A dataset of this node's cache, and the snapshot of it that new readers get; "" = it has no catalog."""

    dataset: _Id
    root: _Text = ""
    snapshot: _Id = ""


class Account(msgspec.Struct, frozen=True):
    """name: what it believes to be in the cluster. fetcher: why its fetcher said nothing, so that all but `given` is
    missing; "" = it did. trouble: why its view may be out of date. age: milliseconds since it joined. used, size:
    bytes stored, and at most (-1: what the disk has); counted: whether `used` is known yet, after a crash.
    """

    name: _Name = ""
    fetcher: _Text = ""
    trouble: _Text = ""
    age: _Count = 0
    used: _Count = 0
    size: Annotated[int, msgspec.Meta(ge=-1, le=2**62)] = -1
    counted: bool = False
    total: Counts = Counts()
    last_10s: Lately = Lately()
    last_60s: Lately = Lately()
    given: Given = Given()
    given_10s: GivenLately = GivenLately()
    given_60s: GivenLately = GivenLately()
    view: View = View()
    peers: Annotated[list[Seen], msgspec.Meta(max_length=MOST_PEERS)] = []
    datasets: Annotated[list[Served], msgspec.Meta(max_length=MOST_DATASETS)] = []


_decode = msgspec.msgpack.Decoder(Account).decode


def decode_account(data: bytes) -> Account:
    """Raises PeerWrong for what is none."""
    try:
        return _decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerWrong(f"what it says of itself cannot be understood ({text(str(error))})") from None


def encode_account(account: Account) -> bytes:
    """At most MOST_ACCOUNT bytes: what is said of single peers and datasets goes first where it is too long."""
    data = encode(account)
    while len(data) > MOST_ACCOUNT:
        peers, served, view = account.peers, account.datasets, account.view
        if not peers and not served:
            view = msgspec.structs.replace(view, names=[])
        peers, served = peers[: len(peers) // 2], served[: len(served) // 2]
        account = msgspec.structs.replace(account, peers=peers, datasets=served, view=view)
        data = encode(account)
    return data


def view_of(names: list[str]) -> View:
    ordered = sorted(names)
    digest = blake2b("\0".join(ordered).encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return View(len(ordered), digest, [text(name, 253) for name in ordered] if len(ordered) <= MOST_NAMES else [])


def text(words: str, most: int = MOST_TEXT) -> str:
    """`words` as they may travel: valid Unicode, and not longer."""
    return words.encode("utf-8", "replace").decode()[:most]
