"""What consumers may say that is wrong or meant to harm: each gets a clear error, and reads go on beside it.

The fetcher believes nothing of a plan. Here everything is thrown at it that a consumer can send: memory that is none,
too small, cut off while it is read, unreadable; numbers that overflow; names of other datasets; and what comes out of
hypothesis. Afterwards the fetcher's log holds no defect of ours, and its descriptors are as many as before.
"""

from __future__ import annotations

import fcntl
import os
import random
import resource
import socket
import struct
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import structs

from cachefs import CacheFileSystem
from cachefs.client.session import Session
from cachefs.errors import PlanError
from cachefs.fetcher.prefetch.prefetcher import MOST_CONSUMERS
from cachefs.hints.consumer import Consumer
from cachefs.hints.line import Line
from cachefs.messages import Announce, Announced, Cancel, Done, Plan, Withdraw, encode
from cachefs.packets import dial, send
from cachefs.plans import LONGEST_NAME, PAGE, write_names, write_order
from tests.filesystems import make_file_system
from tests.machine import ThrottledBucket
from tests.test_fetcher import pid_of, wait_until
from tests.test_hints import consumers, content, fill, memory, report

COUNT = 20


class Fetcher:
    """The process that serves a cache, seen from outside."""

    def __init__(self, fs: CacheFileSystem, bucket: ThrottledBucket) -> None:
        self.fs = fs
        self.names = fill(bucket, COUNT)
        self._bucket = bucket
        self._fresh = 0
        fs.cat_file(self.names[0])
        self.pid = pid_of(fs.config.home)
        self._log = fs.config.home / "run" / "fetcher.log"

    def descriptors(self) -> Counter[str]:
        """What it has open, by kind; sockets aside, for it keeps some connections to the origin."""
        found: Counter[str] = Counter()
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found[os.readlink(link).split(":")[0]] += 1
        del found["socket"]
        return found

    def defects(self) -> list[str]:
        """Lines of its log that say that something of ours went wrong."""
        words = ("Traceback", " ERROR ", "Exception", "could not be fetched ahead", "prefetcher failed")
        return [line for line in self._log.read_text().splitlines() if any(word in line for word in words)]

    def line(self, session: Session | None = None) -> Line:
        return Line(self.fs.config, session or self.fs.dataset_of(self.names[0])[1], 30.0)

    def read_all(self) -> None:
        """Every object, right, whatever was announced."""
        self.read_one()
        for number, name in enumerate(self.names):
            assert self.fs.cat_file(name) == content(number)

    def read_one(self) -> None:
        """One that nobody has read, and nobody has announced: the fetcher fetches it."""
        self._fresh += 1
        name = self._bucket.put(f"fresh/{self._fresh}.jpg", content(self._fresh))
        assert self.fs.cat_file(name) == content(self._fresh)


@pytest.fixture
def fetcher(throttled: ThrottledBucket, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fetcher]:
    """Whatever a test does to it: reads are right meanwhile, it is the same process, and keeps nothing of it."""
    monkeypatch.setenv("CACHEFS_IDLE", "60")
    made = Fetcher(make_file_system(throttled, cache_dir), throttled)
    made.read_all()
    before = made.descriptors()
    yield made
    made.read_all()
    assert pid_of(made.fs.config.home) == made.pid, "another fetcher had to be started"
    wait_until(lambda: consumers(made.fs.config) == [])
    wait_until(lambda: made.descriptors() == before)
    assert made.defects() == []


def say(line: Line, request: Announce | Plan, fd: int) -> Any:
    """The reply to it. Closes `fd`."""
    try:
        return line.ask(request, Announced if isinstance(request, Announce) else Done, fd)
    finally:
        if fd >= 0:
            os.close(fd)


def announce(line: Line, names: Sequence[str] = (), **fields: Any) -> int:
    request = Announce(id=line.new_id(), **{"attachment": 0, "names": len(names), **fields})
    number: int = say(line, request, memory(write=lambda fd: write_names(fd, PAGE, names))).consumer
    return number


def plan(line: Line, consumer: int, order: list[int], fd: int = -1, **fields: Any) -> None:
    if fd < 0:
        fd = memory(write=lambda fd: write_order(fd, array("I", order)))
    say(line, Plan(id=line.new_id(), **{"consumer": consumer, "at": 0, "count": len(order), **fields}), fd)


def reopened(fd: int, flags: int) -> int:
    """The same memory, opened in another way. Closes `fd`."""
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    finally:
        os.close(fd)


# --- descriptors ---------------------------------------------------------------------------------------------------


def test_numbers_that_no_consumer_reaches(fetcher: Fetcher):
    with closing(fetcher.line()) as line:
        for begin in (2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)):
            with pytest.raises(PlanError, match=f"{begin}"):
                announce(line, fetcher.names, begin=begin)
        far = announce(line, fetcher.names, begin=2**62)
        with pytest.raises(PlanError, match="at most"):
            plan(line, far, [0, 1], at=2**62)
        for at in (-1, 2**63, 2**64 - 1):
            with pytest.raises(PlanError, match=f"item {at}"):
                plan(line, far, [0], at=at)


def test_memory_that_cannot_be_read(fetcher: Fetcher):
    with closing(fetcher.line()) as line:
        write_only = reopened(memory(), os.O_WRONLY)
        with pytest.raises(PlanError, match="read"):
            say(line, Announce(id=line.new_id(), attachment=0), write_only)
        consumer = announce(line, fetcher.names)
        with pytest.raises(PlanError, match="read"):
            plan(line, consumer, [0], reopened(memory(), os.O_WRONLY))


def test_a_page_that_cannot_be_written(fetcher: Fetcher):
    with closing(fetcher.line()) as line:
        page = reopened(memory(write=lambda fd: write_names(fd, PAGE, fetcher.names)), os.O_RDONLY)
        request = Announce(id=line.new_id(), attachment=0, names=len(fetcher.names))
        consumer = say(line, request, page).consumer
        plan(line, consumer, [1, 2])
        wait_until(lambda: report(fetcher.fs)["stored"] == 2)


def test_a_prefix_that_no_name_begins_with(fetcher: Fetcher):
    with closing(fetcher.line()) as line:
        with pytest.raises(PlanError, match="NUL"):
            announce(line, ["x"], prefix="a\0b")
        with pytest.raises(PlanError, match="prefix"):
            announce(line, ["x"], prefix="a" * (LONGEST_NAME + 1))


def test_a_mount_point_that_is_none(fetcher: Fetcher, tmp_path: Path):
    """The fetcher opens files below it: not what is no file, and not for ever."""
    folder = (tmp_path / fetcher.names[0]).parent
    folder.mkdir(parents=True)
    os.mkfifo(tmp_path / fetcher.names[0])
    (tmp_path / fetcher.names[1]).symlink_to("/dev/zero")
    (tmp_path / fetcher.names[2]).mkdir()
    with closing(fetcher.line()) as line:
        for place in (str(tmp_path), "/dev", "with\0nul", "relative", "/" + "x" * 5000):
            consumer = announce(line, fetcher.names, mountpoint=place)
            plan(line, consumer, [0, 1, 2] * 4)
        wait_until(lambda: all(found["stored"] == 12 for found in consumers(fetcher.fs.config)))


def test_a_consumer_that_goes_back_while_another_leaves(fetcher: Fetcher):
    """What was forgotten of its plan is asked for again: the fetcher must not look for it for ever."""
    with closing(fetcher.line()) as line, closing(fetcher.line()) as other:
        page = memory(write=lambda fd: write_names(fd, PAGE, fetcher.names))
        request = Announce(id=line.new_id(), attachment=0, names=len(fetcher.names), begin=100_000)
        consumer = say(line, request, os.dup(page)).consumer
        plan(line, consumer, [n % COUNT for n in range(5000)], at=100_000)
        os.pwrite(page, struct.pack("=q", 104_000), 0)
        wait_until(lambda: report(fetcher.fs)["position"] == 104_000)
        os.pwrite(page, struct.pack("=q", 0), 0)
        wait_until(lambda: report(fetcher.fs)["position"] == 0)
        leaving = announce(other, fetcher.names)
        other.ask(Withdraw(id=other.new_id(), consumer=leaving), Done)
        plan(other, announce(other, fetcher.names), [0])  # so everything is looked at now
        fetcher.read_all()
        os.close(page)


def test_descriptors_that_are_no_memory(fetcher: Fetcher, tmp_path: Path):
    """Whatever a packet may carry."""

    def pipe() -> int:
        read, write = os.pipe()
        os.close(write)
        return read

    kinds: list[Callable[[], int]] = [
        pipe,
        lambda: os.open(tmp_path, os.O_RDONLY),
        lambda: os.open(tmp_path, os.O_PATH),
        lambda: os.open("/dev/zero", os.O_RDWR),
        lambda: socket.socket(socket.AF_UNIX).detach(),
        lambda: os.eventfd(0),
        lambda: os.pidfd_open(os.getpid()),
        lambda: os.open("/proc/self/mem", os.O_RDONLY),
    ]
    with closing(fetcher.line()) as line:
        consumer = announce(line, fetcher.names)
        for make in kinds:
            with pytest.raises(PlanError, match=r"'mine' is refused.* memfd_create"):
                say(line, Announce(id=line.new_id(), attachment=0, label="mine"), make())
            with pytest.raises(PlanError, match=rf"consumer {consumer} from item 0 on is refused.* memfd_create"):
                plan(line, consumer, [0], make())


def test_a_descriptor_that_keeps_waiting_whoever_closes_it(fetcher: Fetcher):
    """A connection with bytes that nobody takes, told to wait for that at its end. Nobody but the fetcher has it."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as sock:
        sock.connect(server.getsockname())
        peer, _ = server.accept()
        sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sock.send(bytes(1 << 20))
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 100))
        with peer, closing(fetcher.line()) as line:
            consumer = announce(line, fetcher.names)
            send(line._sock, encode(Plan(id=line.new_id(), consumer=consumer, at=0, count=1)), sock.fileno())
            send(line._sock, encode(Cancel(id=line.new_id(), target=0)), sock.fileno())
            # What is on its way lives on; and where the fetcher has closed it already, it is this close that waits.
            ours = threading.Thread(target=os.close, args=(sock.detach(),))
            ours.start()
            plan(line, consumer, [0])
            fetcher.read_all()
        ours.join()  # its other end is gone, so there is nothing to wait for


def test_memory_without_end(fetcher: Fetcher):
    """Sparse: a file of 2^40 bytes costs who makes it nothing, and must not cost the fetcher anything."""
    with closing(fetcher.line()) as line:
        huge = memory(2**40)
        os.pwrite(huge, b"".join(name.encode() for name in fetcher.names), 2**40 - 4096)
        most = 2**32 - 1
        consumer = say(line, Announce(id=line.new_id(), attachment=0, names=most), huge).consumer
        plan(line, consumer, [], memory(2**40), count=most)
        wait_until(lambda: report(fetcher.fs)["unknown"] >= 128)
        wait_until(lambda: report(fetcher.fs)["end"] == most)
        plan(line, consumer, [], memory(2**40), count=most, at=most)
        with pytest.raises(PlanError, match="at most"):
            plan(line, consumer, [], memory(2**40), count=2**32)
        fetcher.read_all()


def test_sealed_memory(fetcher: Fetcher):
    """Nothing can be written to it, its frontier neither: then the consumer does not want to know."""
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    with closing(fetcher.line()) as line:
        page = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(page, PAGE)
        write_names(page, PAGE, fetcher.names)
        order = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        write_order(order, array("I", range(COUNT)))
        for fd in (page, order):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        consumer = say(line, Announce(id=line.new_id(), attachment=0, names=COUNT), page).consumer
        plan(line, consumer, [], order, count=COUNT)
        wait_until(lambda: report(fetcher.fs)["stored"] == COUNT)


def test_memory_that_shrinks_and_grows_while_it_is_read(fetcher: Fetcher):
    with closing(fetcher.line()) as line:
        page = memory(write=lambda fd: write_names(fd, PAGE, fetcher.names))
        consumer = say(line, Announce(id=line.new_id(), attachment=0, names=COUNT), os.dup(page)).consumer
        over = threading.Event()
        orders: list[int] = []

        def play() -> None:
            dice = random.Random(1)
            while not over.is_set():
                for fd in [page, *orders]:
                    os.ftruncate(fd, dice.choice([0, 1, 7, PAGE, PAGE + 100, 40_000, 2**30]))
                    os.pwrite(fd, dice.randbytes(64), dice.randrange(0, 2 * PAGE))

        player = threading.Thread(target=play)
        player.start()
        try:
            for _ in range(60):
                order = memory(write=lambda fd: write_order(fd, array("I", [n % COUNT for n in range(2000)])))
                orders[:] = [*orders[-3:], os.dup(order)]
                with suppress(PlanError):  # too small at that very moment
                    say(line, Plan(id=line.new_id(), consumer=consumer, at=0, count=2000), order)
                fetcher.read_all()
        finally:
            over.set()
            player.join()
            os.close(page)


# --- datasets ------------------------------------------------------------------------------------------------------


def test_a_dataset_that_the_attachment_does_not_cover(fetcher: Fetcher, throttled: ThrottledBucket):
    """Everything that it names is elsewhere, whichever way it is written."""
    secret = throttled.put("secret/0.jpg", b"not for this consumer")
    bucket = throttled.name
    names = [secret, f"{bucket}/set", f"{bucket}/settled/0.jpg", f"/{bucket}/set/0000.jpg", f"{bucket}//set/0000.jpg"]
    session = replace(fetcher.fs.dataset_of(fetcher.names[0])[1], root=f"{bucket}/set", snapshot="")
    throttled.throttle.reset()
    with closing(fetcher.line(session)) as line:
        consumer = announce(line, names)
        plan(line, consumer, list(range(len(names))))
        wait_until(lambda: report(fetcher.fs)["unknown"] + report(fetcher.fs)["failed"] == len(names))
        assert report(fetcher.fs)["prefetched"] == 0
    assert throttled.reads.keys() <= {"set"}, "the name of its root may be that of an object"


def test_paths_that_lead_out_of_a_folder(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a file system `..` is no name."""
    monkeypatch.setenv("CACHEFS_IDLE", "60")
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"not for this consumer")
    (folder / "a").write_bytes(b"a")
    fs = fsspec.filesystem("cachefs", target_protocol="file", cache_dir=str(cache_dir), skip_instance_cache=True)
    session = replace(fs.dataset_of(str(folder))[1], root=str(folder), snapshot="")
    names = [f"{folder}/a", f"{folder}/../secret", f"{folder}/..", f"{folder}/x/../../secret", f"{folder}/..a"]
    with closing(Consumer(fs.config, session, names)) as consumer:
        consumer.plan(array("I", range(len(names))))
        wait_until(lambda: consumer.frontier == len(names))
        found = report(fs)
        assert (found["prefetched"], found["unknown"], found["failed"]) == (1, 3, 1)


def test_wrong_credentials_are_not_mended_with_those_of_others(fetcher: Fetcher, throttled: ThrottledBucket):
    """The fetcher knows good ones by now; who brought wrong ones does not profit, and who brought none does."""
    names = [throttled.put(f"set/new{number}.jpg", b"x") for number in range(3)]
    session = fetcher.fs.dataset_of(names[0])[1]
    wrong = replace(session, options={**throttled.options, "secret": "another"})
    with closing(Consumer(fetcher.fs.config, wrong, names)) as consumer:
        for failed in (3, 6):  # a refusal is what makes it look for others
            consumer.plan(array("I", range(3)), at=0)
            wait_until(lambda failed=failed: report(fetcher.fs)["failed"] == failed)
        assert report(fetcher.fs)["prefetched"] == 0
    bare = {key: value for key, value in throttled.options.items() if key not in ("key", "secret")}
    with closing(Consumer(fetcher.fs.config, replace(session, options=bare, redacted=True), names)) as consumer:
        consumer.plan(array("I", range(3)))
        wait_until(lambda: report(fetcher.fs)["prefetched"] == 3)


def test_a_consumer_without_credentials_waits_for_somebody_who_has_some(throttled: ThrottledBucket, cache_dir: Path):
    names = fill(throttled, 3)
    fs = make_file_system(throttled, cache_dir)
    session = fs.dataset_of(names[0])[1]
    bare = {key: value for key, value in throttled.options.items() if key not in ("key", "secret")}
    with closing(Consumer(fs.config, replace(session, options=bare, redacted=True), names)) as consumer:
        consumer.plan(array("I", range(3)))
        wait_until(lambda: report(fs)["failed"] == 3)
        assert report(fs)["prefetched"] == 0
        assert fs.cat_file(throttled.put("other.jpg", b"x")) == b"x"

        def again() -> bool:
            consumer.plan(array("I", range(3)), at=0)
            return bool(report(fs)["prefetched"] == 3)

        wait_until(again)


# --- many ------------------------------------------------------------------------------------------------------------


def test_as_many_consumers_as_there_may_be(fetcher: Fetcher):
    """All are in the status, whose packets have a limit; one more is refused, until one leaves."""
    label = "\N{FACE WITH TEARS OF JOY}" * 300
    with closing(fetcher.line()) as line, closing(fetcher.line()) as other:
        numbers = [announce(line, label=label) for _ in range(MOST_CONSUMERS)]
        for _ in range(3):
            with pytest.raises(PlanError, match="consumers at once"):
                announce(other)
        found = consumers(fetcher.fs.config)
        assert [each["label"] for each in found] == [label[:200]] * MOST_CONSUMERS
        for number in numbers:
            line.ask(Withdraw(id=line.new_id(), consumer=number), Done)
            with pytest.raises(PlanError, match="any more"):
                line.ask(Withdraw(id=line.new_id(), consumer=number), Done)
        fetcher.read_all()


def test_plans_never_take_all_descriptors(throttled: ThrottledBucket, cache_dir: Path):
    """A fetcher that may open few files: consumers are refused before readers are."""
    names = fill(throttled, COUNT)
    fs = make_file_system(throttled, cache_dir)
    fs.cat_file(names[0])
    resource.prlimit(pid_of(fs.config.home), resource.RLIMIT_NOFILE, (400, 400))
    session = fs.dataset_of(names[0])[1]

    def take_all(line: Line) -> None:
        for _ in range(10):
            consumer = announce(line, names)
            for at in range(20):
                plan(line, consumer, [at], at=at)

    with closing(Line(fs.config, session, 30.0)) as line:
        with pytest.raises(PlanError, match="ulimit"):
            take_all(line)
        for number, name in enumerate(names):
            assert fs.cat_file(name) == content(number)


def test_reads_are_right_beside_a_flood_of_plans(fetcher: Fetcher):
    over = threading.Event()
    told = 0

    def flood() -> None:
        nonlocal told
        with closing(fetcher.line()) as line:
            consumer = announce(line, fetcher.names)
            while not over.is_set():
                plan(line, consumer, [n % COUNT for n in range(2000)])
                told += 1

    flooders = [threading.Thread(target=flood) for _ in range(4)]
    for flooder in flooders:
        flooder.start()
    try:
        for _ in range(5):
            fetcher.read_all()
    finally:
        over.set()
        for flooder in flooders:
            flooder.join()
    assert told > 4


# --- whatever comes to mind ----------------------------------------------------------------------------------------

EDGES = [0, 1, 2, 255, 4096, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)]
NUMBERS = st.sampled_from(EDGES) | st.integers(0, 4) | st.integers(-(2**63), 2**64 - 1)
OWN = 2**63 + 1  # stands for the number that the connection's own consumer was given
WORDS = st.sampled_from(
    ["", "set", "/", "..", "../", "set/0001.jpg", "a\0b", "/dev/zero", "/proc/self", "x" * 20_000]
) | st.text(max_size=20)
FIELDS = {
    Announce: {"begin": NUMBERS, "label": WORDS, "names": NUMBERS, "prefix": WORDS, "mountpoint": WORDS},
    Plan: {
        "at": NUMBERS,
        "count": NUMBERS,
        "kind": st.sampled_from(["indices", "ids", "names", ""]) | WORDS,
    },
    Withdraw: {},
}


def mostly(value: int, others: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    return st.sampled_from([True, True, True, False]).flatmap(lambda plain: st.just(value) if plain else others)


@st.composite
def memories(draw: st.DrawFn) -> Callable[[], int]:
    """Something to pass: a page, a table with offsets that may lie, or a hole; perhaps opened in an odd way."""
    size = draw(st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 8, 3 * PAGE, 2**40]))
    words = draw(st.lists(NUMBERS.map(lambda n: n % 2**64), max_size=12))
    text = draw(st.binary(max_size=60))
    position = draw(NUMBERS) % 2**64
    flags = draw(st.sampled_from([os.O_RDWR] * 6 + [os.O_RDONLY, os.O_WRONLY, os.O_PATH]))
    at = draw(st.sampled_from([0, PAGE]))

    def make() -> int:
        def write(fd: int) -> None:
            os.pwrite(fd, array("Q", words).tobytes() + text, at)
            os.pwrite(fd, struct.pack("=Q", position), 0 if at else 2 * PAGE)
            if size < PAGE:
                os.ftruncate(fd, size)

        return reopened(memory(size, write), flags)

    return make


@st.composite
def messages(draw: st.DrawFn) -> tuple[Any, Callable[[], int] | None]:
    """A request of a consumer, and what to pass with it. The consumer is mostly that of the connection."""
    kind = draw(st.sampled_from([Announce, Announce, Plan, Plan, Plan, Withdraw]))
    if kind is Plan and draw(st.sampled_from([True, False, False, False])):
        return Plan(consumer=OWN, at=0, count=1), lambda: memory(write=lambda fd: write_order(fd, array("I", [0])))
    fields: dict[str, Any] = {}
    if kind is not Announce:
        fields["consumer"] = draw(mostly(OWN, st.integers(0, 2) | NUMBERS))
    if kind is Announce:
        fields["attachment"] = draw(mostly(0, NUMBERS))
        fields["follow"] = draw(st.booleans())
    elif kind is Plan:
        fields |= {"at": 0, "count": 4}
    for name, values in FIELDS[kind].items():
        if draw(st.booleans()):
            fields[name] = draw(values)
    return kind(**fields), draw(st.none() | memories()) if kind is Withdraw else draw(memories())


# Each kind, heard and refused: what hypothesis makes has hardly any of one or the other now and then.
EACH: list[tuple[Any, Callable[[], int] | None]] = [
    (Announce(attachment=0), memory),
    (Announce(attachment=7), memory),
    (Plan(consumer=OWN, at=0, count=1), lambda: memory(write=lambda fd: write_order(fd, array("I", [0])))),
    (Plan(consumer=OWN, at=9, count=1), memory),
    (Withdraw(consumer=OWN), None),
    (Withdraw(consumer=OWN), None),
]


def outcome(line: Line, request: Any, fd: int) -> str:
    expected = Announced if isinstance(request, Announce) else Done
    try:
        line.ask(structs.replace(request, id=line.new_id()), expected, fd)
    except PlanError:
        return "refused"
    finally:
        if fd >= 0:
            os.close(fd)
    return "heard"


def test_whatever_a_consumer_says_it_is_answered_and_reads_go_on(fetcher: Fetcher):
    met: Counter[str] = Counter()

    @settings(max_examples=100, deadline=None, database=None)
    @given(st.lists(messages(), min_size=1, max_size=8))
    @example(EACH)
    def say_all(said: list[tuple[Any, Callable[[], int] | None]]) -> None:
        with closing(fetcher.line()) as line:
            own = say(line, Announce(id=line.new_id(), names=1, attachment=0), memory(2 * PAGE)).consumer
            for request, make in said:
                if getattr(request, "consumer", None) == OWN:
                    request = structs.replace(request, consumer=own)
                met[type(request).__name__ + " " + outcome(line, request, make() if make else -1)] += 1
        if sum(met.values()) % 10 == 0:
            fetcher.read_one()

    say_all()
    assert all(met[f"{kind} {what}"] for kind in ("Announce", "Plan", "Withdraw") for what in ("heard", "refused")), met


def test_what_is_no_message_ends_the_connection_and_nothing_else(fetcher: Fetcher):
    good = encode(Announce(id=9, attachment=0, label="x" * 40, names=3))

    @settings(max_examples=100, deadline=None, database=None)
    @given(st.binary(max_size=60), st.integers(0, len(good) - 1), st.integers(0, 2))
    def send_anything(junk: bytes, at: int, passed: int) -> None:
        with dial(fetcher.fs.config.home / "run", 30.0) as sock:
            data = good[:at] + junk + good[at + len(junk) :]
            descriptors = [memory() for _ in range(passed)]
            with suppress(ConnectionError):
                socket.send_fds(sock, [data], descriptors)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass
            for fd in descriptors:
                os.close(fd)

    send_anything()
    fetcher.read_all()
