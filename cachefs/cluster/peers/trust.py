"""Why two nodes believe each other: certificates of one authority (TLS 1.3), or one secret that both know.

There is no third kind: no anonymous peer gets a byte. Neither needs clocks that agree (certificates are valid from a
day before they were made), and nothing can be replayed: the keys of a session come from what both sides drew by lot.

**TLS.** Both sides show a certificate of the cluster's authority, and its name (subjectAltName) is the node's: the
client compares it with the node that it called, the server takes the caller's from it, not from what the caller says.

**Secret.** Client: Hello (names, 32 random bytes). Server: Welcome (32 random bytes, a proof that it knows the secret).
Client: a proof. Proofs are HMAC-SHA256 over all that was said, different for the two sides, so none can be sent back
to its maker. From the same the keys of the session are made, one for each direction, and every request and the table of
every frame carries a tag (AES-256-GMAC, numbered), the table with the tags of the objects' bytes (`tags`): who sits in
the middle can read, and cut off, and cannot change, add, drop or repeat anything. What one must know:
  * nothing is encrypted: who can listen reads the objects that pass. TLS is for networks that are not one's own;
  * names are claims: any node that knows the secret may call itself what it likes, and is believed to be the node at
    whose address it answers;
  * a secret that people make up can be guessed from one overheard handshake, so `cachefs pki secret` makes one;
  * with `cover="headers"` objects' bytes have no tags and are protected by the digests named in the table. XXH3 finds
    every accident. Who sits in the middle can make other bytes of the same digest. It saves who receives 6 us per 110
    KB, and who gives the same and one reading of an object that was not given before. Each node says for itself how
    what it receives is signed.

Secrets come from files that only their owner may read; they are never logged and in no repr.
"""

from __future__ import annotations

import hmac
import os
import secrets
import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import msgspec

from cachefs.cluster.nodes import MOST_CAPACITY
from cachefs.cluster.peers.channel import Channel
from cachefs.cluster.peers.tags import Checker, Tagger
from cachefs.cluster.peers.wire import HEADER_BYTES, MOST_GREETING, PROTOCOL, TAG_AT, TAG_BYTES, encode
from cachefs.errors import ConfigError, PeerRefused, PeerWrong

T = TypeVar("T")

NONCE_BYTES = 32

# 32 hex digits hold 128 bits, which nobody guesses.
LEAST_SECRET = 32

_NO_TAG = bytes(TAG_BYTES)

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=253)]
_Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
_Proof = Annotated[bytes, msgspec.Meta(max_length=32)]


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """name: who calls. to: whom. whole: objects' bytes shall have tags too."""

    protocol: int
    name: _Name
    to: _Name
    nonce: _Nonce
    whole: bool = True


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """refused: why not, in words; then the rest does not count. capacity: bytes that it can store; 0 = not said.

    lot: what the key of its objects' tags is made from, drawn when it started.
    """

    protocol: int
    name: str
    nonce: bytes
    proof: _Proof = b""
    refused: Annotated[str, msgspec.Meta(max_length=500)] = ""
    capacity: Annotated[int, msgspec.Meta(ge=0, le=MOST_CAPACITY)] = 0
    lot: Annotated[bytes, msgspec.Meta(max_length=NONCE_BYTES)] = b""


class Proof(msgspec.Struct, frozen=True, array_like=True):
    proof: _Proof


def _decoder(type: type[T]) -> Callable[[bytes], T]:
    decode = msgspec.msgpack.Decoder(type).decode

    def understand(data: bytes) -> T:
        try:
            return decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise PeerWrong(f"its greeting cannot be understood ({error})") from None

    return understand


decode_hello, decode_welcome, decode_proof = _decoder(Hello), _decoder(Welcome), _decoder(Proof)


class Seal:
    """Tags of one direction of a session, each message and table of a frame with the next number."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._gcm = AESGCM(key)
        self._number = 0

    def tag(self, data: bytes | bytearray | memoryview) -> bytes:
        self._number += 1
        return self._gcm.encrypt(self._number.to_bytes(12, "big"), b"", data)

    def check(self, data: bytes | bytearray | memoryview, tag: bytes) -> None:
        """Raises PeerWrong when the tag is not that of the next message."""
        if not hmac.compare_digest(self.tag(data), tag):
            raise PeerWrong("what came does not bear its sign: it was changed on the way")


@dataclass(frozen=True)
class Session:
    """What a handshake came to. peer: the other node's name. In TLS the seals are None: the tags are zeros.

    tagger, checker: of objects' bytes, on the side that gives and on that which receives; None = they have no tags.
    capacity: bytes that the server says it can store; 0 = it does not say, or is not the other side.
    """

    peer: str
    sending: Seal | None = field(default=None, repr=False)
    receiving: Seal | None = field(default=None, repr=False)
    tagger: Tagger | None = field(default=None, repr=False)
    checker: Checker | None = field(default=None, repr=False)
    capacity: int = 0

    def who(self, address: str) -> str:
        """Whom limits are counted for. A certificate proves a name; whoever knows the secret may give any, and cloned
        machines all give the same: their addresses tell them apart.
        """
        return self.peer if self.sending is None else f"{self.peer} at {address}"

    async def send(self, channel: Channel, body: bytes) -> None:
        await channel.send_message(body, self.sending.tag(body) if self.sending else b"")

    async def receive(self, channel: Channel, most: int, *, begun: Callable[[], None] | None = None) -> bytes:
        body, tag = await channel.receive_message(most, TAG_BYTES if self.receiving else 0, begun=begun)
        if self.receiving:
            self.receiving.check(body, tag)
        return body

    def seal_table(self, table: bytearray | memoryview) -> None:
        """Put the tag into a frame's header. `table`: that header and all that comes before the objects' bytes."""
        if self.sending:
            table[TAG_AT:HEADER_BYTES] = _NO_TAG
            table[TAG_AT:HEADER_BYTES] = self.sending.tag(table)

    def check_table(self, table: bytearray) -> None:
        """Raises PeerWrong. `table` is what `seal_table` had; its tag is zeros afterwards."""
        if self.receiving:
            tag = bytes(table[TAG_AT:HEADER_BYTES])
            table[TAG_AT:HEADER_BYTES] = _NO_TAG
            self.receiving.check(table, tag)


class Trust(Protocol):
    """How this node shows who it is, and whom it believes. capacity: what it tells its callers that it can store."""

    name: str
    capacity: int

    async def call(self, channel: Channel, to: str) -> Session:
        """Be the client of node `to`. Raises PeerRefused, PeerWrong, OSError."""

    async def answer(self, channel: Channel) -> Session:
        """Be the server. Raises PeerRefused, PeerWrong, OSError."""


class SecretTrust:
    """Both know `secret`. cover: "all", or "headers" (see above)."""

    capacity = 0

    def __init__(self, name: str, secret: bytes, *, cover: str = "all") -> None:
        if len(secret) < LEAST_SECRET:
            raise ConfigError(
                f"the cluster's secret is shorter than {LEAST_SECRET} bytes; make one: cachefs pki secret"
            )
        if cover not in ("all", "headers"):
            raise ConfigError(f"--sign {cover}: choose all or headers")
        self.name = name
        self._whole = cover == "all"
        self._key = hmac.digest(b"cachefs cluster 1", secret, "sha256")
        self._lot = secrets.token_bytes(NONCE_BYTES)
        self._tagger: Tagger | None = None

    def __repr__(self) -> str:
        return f"SecretTrust({self.name!r})"

    @classmethod
    def load(cls, name: str, file: str | os.PathLike[str], *, cover: str = "all") -> SecretTrust:
        """The secret from a file that only its owner may read. Raises ConfigError."""
        return cls(name, read_private(file).strip(), cover=cover)

    async def call(self, channel: Channel, to: str) -> Session:
        hello = encode(Hello(PROTOCOL, self.name, to, secrets.token_bytes(NONCE_BYTES), self._whole))
        await channel.send_message(hello)
        welcome = decode_welcome((await channel.receive_message(MOST_GREETING))[0])
        _require_welcome(welcome)
        keys = self._keys(hello, welcome)
        if not hmac.compare_digest(welcome.proof, keys["server"]):
            raise PeerRefused("it does not know this cluster's secret, or has another")
        await channel.send_message(encode(Proof(keys["client"])))
        checker = Checker(self._key_of_objects(welcome.lot)) if self._whole else None
        return Session(to, Seal(keys["to server"]), Seal(keys["to client"]), checker=checker, capacity=welcome.capacity)

    async def answer(self, channel: Channel) -> Session:
        said, _ = await channel.receive_message(MOST_GREETING)
        hello = decode_hello(said)
        await _require_protocol(channel, self.name, hello)
        drawn = secrets.token_bytes(NONCE_BYTES)
        bare = Welcome(PROTOCOL, self.name, drawn, capacity=self.capacity, lot=self._lot)
        keys = self._keys(said, bare)
        await channel.send_message(encode(msgspec.structs.replace(bare, proof=keys["server"])))
        proof = decode_proof((await channel.receive_message(MOST_GREETING))[0])
        if not hmac.compare_digest(proof.proof, keys["client"]):
            raise PeerRefused(f"who calls itself {hello.name!r} does not know this cluster's secret")
        if hello.whole and self._tagger is None:
            self._tagger = Tagger(self._key_of_objects(self._lot))
        tagger = self._tagger if hello.whole else None
        return Session(hello.name, Seal(keys["to client"]), Seal(keys["to server"]), tagger)

    def _key_of_objects(self, lot: bytes) -> bytes:
        return hmac.digest(self._key, encode(("objects", lot)), "sha256")

    def _keys(self, hello: bytes, welcome: Welcome) -> dict[str, bytes]:
        """Proofs and keys, each from all that was said and its own purpose."""
        said = encode((hello, welcome.protocol, welcome.name, welcome.nonce, welcome.capacity, welcome.lot))
        return {
            purpose: hmac.digest(self._key, encode((purpose, said)), "sha256")
            for purpose in ("server", "client", "to server", "to client")
        }


class TlsTrust:
    """Certificates. ca, certificate, key: files in PEM. admit: which names of the authority may ask; None = all."""

    capacity = 0

    def __init__(
        self,
        name: str,
        ca: str | os.PathLike[str],
        certificate: str | os.PathLike[str],
        key: str | os.PathLike[str],
        *,
        admit: Callable[[str], bool] | None = None,
    ) -> None:
        read_private(key)
        self.name = name
        self._admit = admit
        try:
            self._calling = _context(ssl.PROTOCOL_TLS_CLIENT, ca, certificate, key)
            self._answering = _context(ssl.PROTOCOL_TLS_SERVER, ca, certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{certificate}: this certificate cannot be used with {ca} and {key} ({error})") from None

    def __repr__(self) -> str:
        return f"TlsTrust({self.name!r})"

    async def call(self, channel: Channel, to: str) -> Session:
        try:
            await channel.start_tls(self._calling, to)
            await channel.send_message(encode(Hello(PROTOCOL, self.name, to, bytes(NONCE_BYTES))))
            # A server that does not like our certificate says so here: in TLS 1.3 the client is through before it.
            welcome = decode_welcome((await channel.receive_message(MOST_GREETING))[0])
        except ssl.SSLError as error:
            raise PeerRefused(f"TLS: {_reason(error)}") from None
        _require_welcome(welcome)
        return Session(to, capacity=welcome.capacity)

    async def answer(self, channel: Channel) -> Session:
        try:
            secured = await channel.start_tls(self._answering, None)
            hello = decode_hello((await channel.receive_message(MOST_GREETING))[0])
        except ssl.SSLError as error:
            raise PeerRefused(f"TLS: {_reason(error)}") from None
        await _require_protocol(channel, self.name, hello)
        names = _names(secured.getpeercert())
        if hello.name not in names or (self._admit is not None and not self._admit(hello.name)):
            await _refuse(channel, self.name, f"no node {hello.name!r} is admitted with a certificate of {names}")
        await channel.send_message(encode(Welcome(PROTOCOL, self.name, b"", capacity=self.capacity)))
        return Session(hello.name)


def open_trust(
    name: str, secret: str = "", ca: str = "", certificate: str = "", key: str = "", sign: str = "all"
) -> Trust:
    """From files: the secret of the cluster, or the certificate of its authority and this node's, with its key.

    sign: what is signed with the secret. Raises ConfigError.
    """
    if secret:
        return SecretTrust.load(name, secret, cover=sign)
    if sign != "all":
        raise ConfigError(f"--sign {sign}: says what is signed with a --secret; TLS protects every byte")
    if ca and certificate and key:
        return TlsTrust(name, ca, certificate, key)
    raise ConfigError(
        "peers are served with certificates (--ca, --certificate, --key) or a secret (--secret), never without; "
        "`cachefs pki` makes either"
    )


def read_private(file: str | os.PathLike[str]) -> bytes:
    """What is in a file that only its owner may read. Raises ConfigError."""
    path = Path(file)
    try:
        with path.open("rb") as opened:
            if stat.S_IMODE(os.fstat(opened.fileno()).st_mode) & 0o077:
                raise ConfigError(f"{path}: others may read it; chmod 600 {path}")
            return opened.read(64 * 1024)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _context(
    protocol: int,
    ca: str | os.PathLike[str],
    certificate: str | os.PathLike[str],
    key: str | os.PathLike[str],
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(ca)
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = protocol == ssl.PROTOCOL_TLS_CLIENT
    return context


def _names(certificate: Any) -> list[str]:
    """The names in a certificate that was verified."""
    return [value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind in ("DNS", "IP Address")]


def _reason(error: ssl.SSLError) -> str:
    return getattr(error, "verify_message", "") or error.reason or str(error)


def _require_welcome(welcome: Welcome) -> None:
    if welcome.refused:
        raise PeerRefused(f"it refuses this node: {welcome.refused}")
    if welcome.protocol != PROTOCOL:
        raise PeerRefused(f"it speaks protocol {welcome.protocol}, this node {PROTOCOL}: other versions of cachefs")


async def _require_protocol(channel: Channel, name: str, hello: Hello) -> None:
    if hello.protocol != PROTOCOL:
        await _refuse(channel, name, f"it speaks protocol {PROTOCOL}, not {hello.protocol}")


async def _refuse(channel: Channel, name: str, why: str) -> None:
    await channel.send_message(encode(Welcome(PROTOCOL, name, b"", refused=why[:500])))
    raise PeerRefused(why)
