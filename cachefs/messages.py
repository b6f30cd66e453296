"""What readers and the fetcher of a cache say to each other.

One message is one packet on a Unix SOCK_SEQPACKET socket: the kernel keeps the borders, so there is no framing,
and a descriptor passed with SCM_RIGHTS belongs to exactly one message. Bodies are MessagePack; the first field
names the message. Replies carry the `id` of their request and may come in any order; long work sends Progress
messages before its final reply. Bytes of objects never travel here: a reply names a file or passes a descriptor.

Both sides send Hello first; a peer of another PROTOCOL is refused with a clear error.
"""

from __future__ import annotations

from typing import Any

import msgspec

PROTOCOL = 1

# Unix sockets take packets up to their send buffer (net.core.wmem_default, 212,992 bytes on every
# distribution's kernel), of which the kernel charges about half as overhead.
MAX_PACKET = 96 * 1024

# Entries per page of a listing: at most 1 KiB of name (the longest S3 key) each stays within MAX_PACKET.
PAGE_BYTES = 64 * 1024

# Consumers per Report, each of at most 3 KiB: what they call themselves and what is said of them has a limit.
CONSUMERS_PER_REPORT = 24

# Nodes of a cluster, or peers, per Report, each of at most 1 KiB.
NODES_PER_REPORT = 64


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One name at an origin. path: the origin's full path (as its fsspec file system strips it).

    size: bytes, 0 for a directory. mtime_ns: nanoseconds since the epoch, 0 where the origin has none.
    version: what the origin calls this content (ETag without quotes, generation, or "mtime-size"); "" for a directory.
    """

    path: str
    size: int
    mtime_ns: int
    version: str
    directory: bool = False


# --- requests ------------------------------------------------------------------------------------------------


class Request(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    id: int = 0


class Hello(Request, frozen=True, tag=True, kw_only=True):
    """size: bytes the cache may take, where this reader was told (None = as it is)."""

    protocol: int = PROTOCOL
    pid: int = 0
    size: int | None = None


class Attach(Request, frozen=True, tag=True, kw_only=True):
    """Use an origin. `options` may hold credentials: they stay in the fetcher's memory.

    redacted: the secrets were left out (a pickle from another process); the fetcher then needs to know this
    origin already, or to find credentials in `environ`. root: the dataset root; "" = everything at the origin.
    snapshot: the one the reader serves ("" = the dataset's current one). direct: it reads for another node of the
    cluster: from the origin then, never from a third one. tenant: whose the dataset is; "" = whoever's it is by now.
    """

    protocol: str
    options: dict[str, Any]
    environ: dict[str, str]
    redacted: bool = False
    root: str = ""
    snapshot: str = ""
    direct: bool = False
    tenant: str = ""


class Need(Request, frozen=True, tag=True, kw_only=True):
    """Make bytes [offset, offset+length) of an object readable. length None = the whole object.

    version "" = whatever this dataset's snapshot says (its catalog, or the version first seen). size: of that
    version where the reader knows it, else -1.
    descriptor: answer with a descriptor even where a path would do (the reader lost the path to eviction).
    damaged: the reader found the stored bytes wrong; check them before answering.
    everywhere: make it a hit for mounts and file systems alike, whichever of them reads it.
    ahead: nobody waits for it yet: reads go first.
    keep: it is a block of a large object for its owner, a node of the cluster that has no room for it: keep it for that
    one. Failed, CacheFull, where there is no room here either, and then it was not read.
    """

    attachment: int
    path: str
    version: str = ""
    size: int = -1
    offset: int = 0
    length: int | None = None
    descriptor: bool = False
    damaged: bool = False
    everywhere: bool = False
    ahead: bool = False
    keep: bool = False


class Info(Request, frozen=True, tag=True, kw_only=True):
    """What is `path`? Answered with Found."""

    attachment: int
    path: str


class List(Request, frozen=True, tag=True, kw_only=True):
    """The entries below `path`: one level, or all files (`recursive`). Answered with Page... (last: more=False)."""

    attachment: int
    path: str
    recursive: bool = False


class MakeCatalog(Request, frozen=True, tag=True, kw_only=True):
    """List the dataset into a catalog, unless it has one (`refresh`: list again). Progress..., then Catalogued."""

    attachment: int
    refresh: bool = False


class TakeCatalog(Request, frozen=True, tag=True, kw_only=True):
    """Serve a catalog that a command has made of the dataset. Answered with Catalogued.

    file: its name in the dataset's folder of catalogs. previous, last_id: of the dataset's record when the work began:
    the snapshot of its catalog ("" = none), and its last inode number. Where these are others by now: ConfigError.
    """

    attachment: int
    file: str
    previous: str = ""
    last_id: int = 0


class Refresh(Request, frozen=True, tag=True, kw_only=True):
    """Forget the versions first seen of a dataset that has no catalog; MakeCatalog(refresh) for one that has."""

    attachment: int


class Warm(Request, frozen=True, tag=True, kw_only=True):
    """Fetch the dataset's files (all, or `paths`). Progress..., then Done.

    versions: (path, version, size) each instead of `paths`, for a node that has no catalog which says them.
    """

    attachment: int
    paths: list[str] | None = None
    versions: list[tuple[str, str, int]] | None = None


class Evict(Request, frozen=True, tag=True, kw_only=True):
    """Drop what is stored of the dataset below `path`. Progress..., then Done. force: also of what is pinned."""

    attachment: int
    path: str
    force: bool = False


class Pin(Request, frozen=True, tag=True, kw_only=True):
    """Never evict what is stored of a dataset (its id) to make room for others, or do so again. Answered with Done.

    It needs no attachment: nothing is asked of the origin, and whoever pins a dataset does not use it.
    """

    dataset: str
    pinned: bool


class Join(Request, frozen=True, tag=True, kw_only=True):
    """Be a node of a cluster, until this connection ends. Answered with Done.

    members: where its nodes are named (cachefs/cluster/sources). name, host, port, weight: this one, as others see it.
    Trust: `secret`, a file, or the files ca, certificate and key. sign: what is signed with the secret, "all" or
    "headers" (cluster/peers/trust).
    """

    members: str
    name: str
    host: str
    port: int
    weight: int
    secret: str = ""
    ca: str = ""
    certificate: str = ""
    key: str = ""
    sign: str = "all"


class Tell(Request, frozen=True, tag=True, kw_only=True):
    """What this node of a cluster says of itself to the others (cluster/peers/account). Answered with Report."""


class Survey(Request, frozen=True, tag=True, kw_only=True):
    """Ask every node of the cluster what it says of itself. Answered with a Report for each as they come, and a last
    one (more=False) of this node: `me` (None: in no cluster) and `trouble`.
    """


class Adopt(Request, frozen=True, tag=True, kw_only=True):
    """Bring the catalog of a dataset (its id) that `node` of the cluster has, if this cache has one that is older.
    switch: and serve it from now on. Progress..., then Catalogued, or Done where the dataset has no catalog here.

    edition, snapshot, size, key, keys: see cachefs/cluster/peers/catalogs. As Pin, it is no use of the dataset.
    """

    dataset: str
    node: str
    edition: int
    snapshot: str
    size: int
    key: bytes
    switch: bool
    keys: int = 0


class Follow(Request, frozen=True, tag=True, kw_only=True):
    """Look whether the cluster serves a newer catalog of a dataset (its id), and go over to it. Answered as Adopt."""

    dataset: str


class Lodge(Request, frozen=True, tag=True, kw_only=True):
    """Keep an object for its owner, a node of the cluster that has no room for it. Answered with Done: count 1, or 0
    where it cannot be; or with Failed, CacheFull. size: of the object, at most a block.
    """

    attachment: int
    path: str
    version: str
    size: int


class Quota(Request, frozen=True, tag=True, kw_only=True):
    """What a dataset (its id), or all datasets of a tenant, may take on the disk; None = what there is. More than that
    goes at once, but of pinned ones. Progress..., then Report: used, dropped (objects), freed (bytes), changed, pinned
    (roots of what had to stay).
    """

    quota: int | None
    dataset: str = ""
    tenant: str = ""


class Announce(Request, frozen=True, tag=True, kw_only=True):
    """A consumer will say what it is going to read. Comes with a descriptor of shared memory (cachefs/plans.py): a page
    for its position, then a table of `names` names. Answered with Announced; ends with its connection or process.

    label: what `cachefs status` calls it. prefix: stands before every name; names are object paths.
    follow: nobody will tell a position; items are fetched one after the other as fast as they come.
    begin: the number of its first item (a consumer that comes back has some behind it).
    mountpoint: where it reads the dataset through a mount; "" = by URL.
    """

    attachment: int
    begin: int = 0
    label: str = ""
    names: int = 0
    prefix: str = ""
    follow: bool = False
    mountpoint: str = ""


class Plan(Request, frozen=True, tag=True, kw_only=True):
    """From its item number `at` on a consumer reads these `count` items, and what it said before of that part is void.
    Comes with a descriptor of shared memory that has them. Answered with Done.

    kind: "indices" into the names of Announce, "ids" of catalog entries (a mount's inode numbers), or "names".
    """

    consumer: int
    at: int
    count: int
    kind: str = "indices"


class Withdraw(Request, frozen=True, tag=True, kw_only=True):
    """Forget a consumer. Answered with Done: what was fetched ahead for it, and what could not be."""

    consumer: int


class Verify(Request, frozen=True, tag=True, kw_only=True):
    """Check every blob against its digest; damaged ones are dropped. Progress..., then Done."""


class Status(Request, frozen=True, tag=True, kw_only=True):
    """Answered with Report... (last: more=False)."""


class Cancel(Request, frozen=True, tag=True, kw_only=True):
    """Stop caring about request `target` of this connection. No reply of its own."""

    target: int


class Shutdown(Request, frozen=True, tag=True, kw_only=True):
    """Finish and exit. Answered with Done before the socket closes."""


# --- replies -------------------------------------------------------------------------------------------------


class Reply(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    id: int


class Welcome(Reply, frozen=True, tag=True, kw_only=True):
    protocol: int
    pid: int


class Attached(Reply, frozen=True, tag=True, kw_only=True):
    """dataset: 32 hex characters, the directory of refs. snapshot: the id for digest.snapshot_ref."""

    attachment: int
    dataset: str
    snapshot: str


class Ready(Reply, frozen=True, tag=True, kw_only=True):
    """Bytes [start, stop) of the object may be read now, at file offset (object offset - base).

    file: an absolute path, or "" when a descriptor travels with this message. size and version are the object's.
    complete: the file is the whole object and will stay so (only then may a reader keep using it beyond stop).
    """

    file: str
    size: int
    version: str
    start: int
    stop: int
    base: int = 0
    complete: bool = False


class Found(Reply, frozen=True, tag=True, kw_only=True):
    entry: Entry


class Announced(Reply, frozen=True, tag=True, kw_only=True):
    consumer: int


class Page(Reply, frozen=True, tag=True, kw_only=True):
    entries: list[Entry]
    more: bool


class Progress(Reply, frozen=True, tag=True, kw_only=True):
    """Long work is alive. total 0 = not known yet. what: "objects listed", "objects", "blobs", ..."""

    done: int
    total: int
    bytes: int
    what: str


class Catalogued(Reply, frozen=True, tag=True, kw_only=True):
    """file: absolute path of the catalog. The counts are of the whole dataset. edition: see DatasetRecord.

    behind: nodes of the cluster that do not serve it yet, and why; at most 64 of `behind_total`.
    """

    file: str
    snapshot: str
    files: int
    directories: int
    bytes: int
    skipped: int
    changed: bool
    edition: int = 0
    behind: list[tuple[str, str]] = []
    behind_total: int = 0


class Done(Reply, frozen=True, tag=True, kw_only=True):
    """The end of long work: how many, how many bytes, what failed (path, reason), at most 100 of `failed_total`."""

    count: int = 0
    bytes: int = 0
    failed: list[tuple[str, str]] = []
    failed_total: int = 0


class Report(Reply, frozen=True, tag=True, kw_only=True):
    """The first has everything, of "consumers" what fits into a packet; those after it have more of these, and the
    "nodes" and "peers" of "cluster".
    """

    status: dict[str, Any]
    more: bool = False


class Failed(Reply, frozen=True, tag=True, kw_only=True):
    """errors.to_wire of what went wrong."""

    error: tuple[str, str, str | None]


AnyRequest = (
    Hello
    | Attach
    | Need
    | Info
    | List
    | MakeCatalog
    | TakeCatalog
    | Refresh
    | Warm
    | Evict
    | Pin
    | Join
    | Tell
    | Survey
    | Adopt
    | Follow
    | Lodge
    | Quota
    | Announce
    | Plan
    | Withdraw
    | Verify
    | Status
    | Cancel
    | Shutdown
)
AnyReply = Welcome | Attached | Ready | Found | Announced | Page | Progress | Catalogued | Done | Report | Failed

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(AnyRequest).decode
decode_reply = msgspec.msgpack.Decoder(AnyReply).decode
