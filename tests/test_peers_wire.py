"""Bytes from peers are believed in nothing: frames, requests and greetings of every kind, right, changed and random."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from cachefs.cluster.peers import trust, wire
from cachefs.cluster.peers.receiving import Answer, Piece, Unlike
from cachefs.cluster.peers.tags import Checker, Tagger
from cachefs.cluster.peers.trust import Seal, Session
from cachefs.cluster.peers.wire import ENTRY_BYTES, HEADER_BYTES, Item, Request, Status
from cachefs.digest import BLOCK_SIZE, content_key, digest
from cachefs.errors import PeerWrong

TLS = Session("owner")


def sealed(*, whole: bool) -> tuple[Session, Session]:
    """(the server's, the client's)"""
    one, other, objects = (bytes([n]) * 32 for n in range(3))
    server, client = Session("c", Seal(one), Seal(other)), Session("s", Seal(other), Seal(one))
    if not whole:
        return server, client
    return replace(server, tagger=Tagger(objects, slots=64)), replace(client, checker=Checker(objects))


def entry(index: int, data: bytes, session: Session = TLS, **changes) -> bytes:
    fields = {"size": len(data), "length": len(data), "key": content_key(data), "digest": digest(data), **changes}
    if session.tagger and "mark" not in fields:
        fields["mark"] = session.tagger.kept(digest(data)) or session.tagger.mark(digest(data), data)
    return wire.pack_entry(Status.OK, index, **fields)


END = wire.pack_entry(Status.END)


def bundle(table_of: list[bytes], body: bytes = b"", session: Session = TLS, *, names: bytes = b"", **changes) -> bytes:
    """A frame. changes: what its header says and is not so."""
    says = {"entries": len(table_of), "names": len(names), "length": len(body), **changes}
    table = bytearray(wire.pack_header(**says) + b"".join(table_of) + names)
    session.seal_table(table)
    return bytes(table + body)


def frame(index: int, data: bytes, session: Session = TLS, **changes) -> bytes:
    return bundle([entry(index, data, session, **changes)], data, session)


def end(session: Session = TLS) -> bytes:
    return bundle([END], session=session)


def receive(stream: bytes, items: list[Item], session: Session = TLS) -> tuple[dict[int, Any], Answer]:
    """What comes of a stream, whatever it is. Raises PeerWrong; EOFError when it ends too early."""
    came: dict[int, Any] = {}

    def arrived(index: int, what: Piece | Status | Unlike) -> None:
        assert index not in came
        came[index] = what

    answer = Answer(items, session, arrived)
    at = 0
    for view in answer.frames():
        piece = stream[at : at + len(view)]
        if len(piece) < len(view):
            raise EOFError
        view[:] = piece
        at += len(view)
    return came, answer


CONTENTS = [b"", b"one", b"two" * 1000]
ITEMS = [Item("d" * 32, f"p/{n}", "v", len(data)) for n, data in enumerate(CONTENTS)]


def apart(session: Session = TLS) -> bytes:
    """A frame for each."""
    return b"".join(frame(n, data, session) for n, data in reversed(list(enumerate(CONTENTS)))) + end(session)


def together(session: Session = TLS) -> bytes:
    """All in one frame."""
    numbered = list(enumerate(CONTENTS))[::-1]
    return bundle(
        [*(entry(n, data, session) for n, data in numbered), END], b"".join(data for _, data in numbered), session
    )


STREAMS = (apart, together)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("whole", [None, False, True])
def test_an_answer_comes_in_any_order(whole, stream):
    server, client = (TLS, TLS) if whole is None else sealed(whole=whole)
    came, answer = receive(stream(server), ITEMS, client)
    assert {n: bytes(piece.data) for n, piece in came.items()} == dict(enumerate(CONTENTS))
    assert answer.last is Status.END


def test_versions_and_what_has_no_bytes_come_between_those_that_have():
    items = [Item("d" * 32, f"p/{n}") for n in range(5)]
    entries = [
        entry(0, b"one", name_length=2),
        wire.pack_entry(Status.MISSING, 1),
        entry(2, b"", name_length=3),
        wire.pack_entry(Status.LARGE, 3, size=BLOCK_SIZE + 1),
        entry(4, b"three"),
        END,
    ]
    came, _ = receive(bundle(entries, b"onethree", names=b"v1v22"), items)
    assert [(bytes(came[n].data), came[n].version) for n in (0, 2, 4)] == [(b"one", "v1"), (b"", "v22"), (b"three", "")]
    assert came[1] is Status.MISSING
    assert came[3].large


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("whole", [False, True])
@given(data=st.data())
def test_no_bit_of_a_sealed_answer_can_be_changed(whole, stream, data):
    server, client = sealed(whole=whole)
    right = bytearray(stream(server))
    at = data.draw(st.integers(0, len(right) - 1))
    right[at] ^= 1 << data.draw(st.integers(0, 7))
    # A length that was changed may be noticed only when nothing more comes.
    with contextlib.suppress(PeerWrong, EOFError):
        came, _ = receive(bytes(right), ITEMS, client)
        assert [n for n, what in came.items() if isinstance(what, Unlike)] == [
            n for n in came if not right_one(came, n)
        ]
        assert not all(right_one(came, n) for n in range(len(CONTENTS)))


def right_one(came: dict[int, Any], n: int) -> bool:
    return isinstance(came[n], Piece) and bytes(came[n].data) == CONTENTS[n]


def test_what_does_not_match_its_digest_is_asked_for_once_more_and_then_the_peer_lies():
    lie = frame(1, b"One", digest=digest(b"one"), key=digest(b"one"))
    came, _ = receive(lie + apart().replace(frame(1, b"one"), b""), ITEMS)
    assert isinstance(came[1], Unlike)
    assert right_one(came, 0)
    assert right_one(came, 2)
    with pytest.raises(PeerWrong, match="digest"):
        receive(lie, [structs.replace(item, look=True) for item in ITEMS])


def test_other_bytes_of_the_same_digest_do_not_have_its_tag():
    server, client = sealed(whole=True)
    assert server.tagger is not None
    other = server.tagger.mark(digest(b"two"), b"two")
    for mark in (other, other[:8] + bytes(16), bytes(24)):
        server, client = sealed(whole=True)
        with pytest.raises(PeerWrong, match="sign"):
            receive(frame(1, b"one", server, mark=mark), ITEMS, client)
    server, client = sealed(whole=False)  # where nobody asked for tags none are looked at
    stream = frame(1, b"one", server, mark=other) + frame(0, b"", server) + end(server)
    assert right_one(receive(stream, ITEMS[:2], client)[0], 1)


def test_a_tag_is_made_once_and_what_takes_its_place_is_not_taken_for_it():
    tagger, checker = Tagger(bytes(32), slots=1), Checker(bytes(32))
    one = tagger.mark(digest(b"one"), b"one")
    assert tagger.kept(digest(b"one")) == one
    assert tagger.kept(digest(b"two")) is None
    two = tagger.mark(digest(b"two"), b"two")
    assert tagger.kept(digest(b"one")) is None
    assert one[:8] != two[:8]  # a number is used once
    checker.check(b"one", one)
    checker.check(b"two", two)
    for key, data, mark in ((bytes(32), b"one", two), (bytes(32), b"one", two[:8] + one[8:]), (b"k" * 32, b"one", one)):
        with pytest.raises(PeerWrong):
            Checker(key).check(data, mark)


def test_frames_cannot_be_dropped_repeated_or_exchanged():
    server, client = sealed(whole=True)
    frames = [frame(n, data, server) for n, data in enumerate(CONTENTS)]
    for order in ([frames[0], frames[2]], [frames[1], frames[0]], [frames[0], frames[0]]):
        _, client = sealed(whole=True)
        with pytest.raises(PeerWrong):
            receive(b"".join(order), ITEMS, client)


@pytest.mark.parametrize("stream", STREAMS)
@given(at=st.integers(0, HEADER_BYTES + 4 * ENTRY_BYTES + 20), change=st.binary(min_size=1, max_size=40))
def test_without_seals_wrong_bytes_are_found_by_their_digest(stream, at, change):
    right = bytearray(stream())
    before = bytes(right)
    right[at : at + len(change)] = change
    with contextlib.suppress(PeerWrong, EOFError):
        came, _ = receive(bytes(right), ITEMS)
        for n, piece in came.items():
            if isinstance(piece, Piece) and not piece.large:
                assert bytes(piece.data) == CONTENTS[n] or bytes(right) == before


@given(st.binary(max_size=400))
def test_random_bytes_are_no_answer(data):
    with pytest.raises((PeerWrong, EOFError)):
        receive(data, ITEMS)


@pytest.mark.parametrize(
    "wrong",
    [
        frame(3, b"x"),  # there is no such item
        frame(1, b"one") + frame(1, b"one"),
        frame(1, b"one", key=digest(b"other")),
        frame(1, b"another size"),
        frame(1, b"on", size=3),
        frame(1, b"one", size=2),
        bundle([entry(1, b"", size=BLOCK_SIZE + 1, length=BLOCK_SIZE + 1)], length=BLOCK_SIZE + 1),
        bundle([entry(1, b"one", name_length=5000)], b"one", names=bytes(5000)),
        bundle([wire.pack_entry(Status.MISSING, 1, length=3)], b"one"),
        bundle([wire.pack_entry(Status.MISSING)]),
        bundle([wire.pack_entry(Status.END, 1)]),
        bundle([entry(1, b"one"), entry(1, b"one")], b"oneone"),  # the same, in one frame
        bundle([END, entry(1, b"one")], b"one"),  # it goes on after its end
        bundle([entry(1, b"one")], b"one", length=2),
        bundle([entry(1, b"one")], b"one", names=b"more"),
        bundle([]),
        bundle([wire.pack_entry(Status.MISSING, 1)] * (wire.MOST_ENTRIES + 1)),
        bundle([entry(1, b"one", name_length=9)], b"one", names=bytes(9), entries=0),
        end(),  # and nothing of any item
    ],
    ids=range(19),
)
def test_what_is_no_answer_to_the_request_is_refused(wrong):
    with pytest.raises(PeerWrong):
        receive(wrong, ITEMS)


def test_another_part_or_blob_than_was_asked_for_is_refused():
    part = [Item("d" * 32, "p", "v", 10, 4, 3)]
    data = b"0123456789"
    good = frame(0, data[4:7], size=10, offset=4, key=content_key(data))
    assert receive(good + end(), part)[0][0].data == data[4:7]
    with pytest.raises(PeerWrong):
        receive(frame(0, data[3:6], size=10, offset=3, key=content_key(data)), part)
    with pytest.raises(PeerWrong):
        receive(frame(0, data[4:9], size=10, offset=4, key=content_key(data)), part)
    by_key = [Item(key=content_key(data))]
    assert receive(frame(0, data) + end(), by_key)[0][0].data == data
    with pytest.raises(PeerWrong):
        receive(frame(0, b"another"), by_key)


@given(st.binary(max_size=300))
def test_random_bytes_are_no_request_and_no_greeting(data):
    for decode in (wire.decode_request, trust.decode_hello, trust.decode_welcome, trust.decode_proof):
        with contextlib.suppress(PeerWrong):
            decode(data)


_texts = st.text(max_size=20)
_items = st.builds(
    Item,
    dataset=_texts,
    path=_texts,
    version=_texts,
    size=st.integers(-1, 2**62),
    offset=st.integers(0, 2**62),
    length=st.integers(-1, BLOCK_SIZE),
    key=st.binary(max_size=16),
    keep=st.booleans(),
)
_requests = st.builds(
    Request,
    items=st.lists(_items, min_size=1, max_size=20),
    fetch=st.booleans(),
    prefetch=st.booleans(),
    patience=st.integers(1, 600_000),
)


@given(_requests)
def test_a_request_arrives_as_it_was_meant(request):
    assert wire.decode_request(wire.encode(request)) == request


@given(_requests, st.data())
def test_a_changed_request_is_another_one_or_none(request, data):
    encoded = bytearray(wire.encode(request))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PeerWrong):
        changed = wire.decode_request(bytes(encoded))
        assert len(changed.items) <= wire.MOST_ITEMS
        assert all(item.offset >= 0 and item.length <= wire.MOST_LENGTH for item in changed.items)


@pytest.mark.parametrize(
    "beyond",
    [
        [[], False, False, 1],
        [[["", "", "", -1, 0, -1, b""]] * (wire.MOST_ITEMS + 1), False, False, 1],
        [[["d" * 33, "", "", -1, 0, -1, b""]], False, False, 1],
        [[["", "p" * (wire.MOST_PATH + 1), "", -1, 0, -1, b""]], False, False, 1],
        [[["", "", "", -1, -1, 1, b""]], False, False, 1],
        [[["", "", "", -1, 0, BLOCK_SIZE + 1, b""]], False, False, 1],
        [[["", "", "", -1, 0, 1, b"k" * 17]], False, False, 1],
        [[["", "", "", -1, 0, 1, b""]], False, False, 0],
        [[["", "", "", -1, 0, 1, b"", "more"]], False, False, 1],
    ],
)
def test_requests_beyond_the_limits_are_refused(beyond):
    with pytest.raises(PeerWrong):
        wire.decode_request(wire.encode(beyond))
