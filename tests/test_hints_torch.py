"""`cachefs.torch` with the real samplers and the real DataLoader: nothing changes but that the bytes are there."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import cachefs.torch
from cachefs import CacheFileSystem
from cachefs.client import Connection
from tests.command_line import CommandLine, credentials, s3
from tests.filesystems import make_file_system
from tests.machine import ThrottledBucket
from tests.test_fetcher import pid_of, wait_until

COUNT = 96


def content(number: int) -> bytes:
    return bytes([number]) * (3000 + number)


class Images(Dataset[int]):
    """Item n is n, if the bytes of file n are right, by the file system or, without one, by plain paths."""

    def __init__(self, paths: list[str], fs: CacheFileSystem | None = None) -> None:
        self.paths = paths
        self.fs = fs

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> int:
        path = self.paths[number]
        data = Path(path).read_bytes() if self.fs is None else self.fs.cat_file(path)
        assert data == content(number)
        return number


@pytest.fixture
def names(throttled: ThrottledBucket) -> Any:
    return [throttled.put(f"set/{number:03d}.jpg", content(number)) for number in range(COUNT)]


@pytest.fixture
def fs(throttled: ThrottledBucket, cache_dir: Path) -> CacheFileSystem:
    return make_file_system(throttled, cache_dir)


def consumers(fs: CacheFileSystem) -> list[dict[str, Any]]:
    with closing(Connection(fs.config, None)) as connection:
        found: list[dict[str, Any]] = connection.status().status["consumers"]
        return found


# --- nothing changes -----------------------------------------------------------------------------------------


class Endless(Sampler[int]):
    """As samplers that never end are written."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from (3, 1, 2)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


DATA: Any = range(COUNT)

SAMPLERS: dict[str, Callable[[], Any]] = {
    "sequential": lambda: SequentialSampler(DATA),
    "random": lambda: RandomSampler(DATA),
    "random, seeded": lambda: RandomSampler(DATA, generator=generator()),
    "random, replaced": lambda: RandomSampler(DATA, replacement=True, num_samples=300, generator=generator()),
    "random, more than there is": lambda: RandomSampler(DATA, num_samples=250),
    "weighted": lambda: WeightedRandomSampler([1.0 + n for n in DATA], 200),
    "subset": lambda: SubsetRandomSampler([5, 3, 50, 60]),
    "distributed": lambda: DistributedSampler(DATA, 4, 1, seed=3),
    "distributed, short": lambda: DistributedSampler(DATA, 5, 4, shuffle=False, drop_last=True),
    "batches": lambda: BatchSampler(RandomSampler(DATA), 7, drop_last=True),
    "batches, distributed": lambda: BatchSampler(DistributedSampler(DATA, 2, 0), 7, drop_last=False),
    "a list": lambda: [4, 2, -1],
}


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints to nobody: the order alone is looked at."""
    monkeypatch.setattr(cachefs.torch.HintedSampler, "_begin", lambda self: Mute())


class Mute:
    """Takes what a consumer takes."""

    def __init__(self) -> None:
        self.position = self.end = 0

    def at(self, number: int) -> None:
        self.position = number

    def plan(self, order: Any, *, at: int | None = None) -> None:
        self.end = (self.end if at is None else at) + len(order)

    def close(self) -> None:
        pass


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_order_is_the_same(kind: str, workers: int):
    """Also that of whatever else draws from torch's random numbers meanwhile."""

    def epochs(wrap: Callable[[Any], Any]) -> list[Any]:
        torch.manual_seed(11)
        sampler = wrap(SAMPLERS[kind]())
        where = {"batch_sampler": sampler} if "batches" in kind else {"sampler": sampler, "batch_size": 4}
        loader: Any = DataLoader(DATA, num_workers=workers, **where)
        seen: list[Any] = []
        for epoch in range(3):
            for inner in (sampler, getattr(sampler, "sampler", None)):
                if isinstance(inner, DistributedSampler):
                    inner.set_epoch(epoch)
            seen += [len(loader), *(batch.tolist() for batch in loader), torch.rand(1).item()]
        return seen

    paths = [str(number) for number in DATA]
    assert epochs(lambda sampler: cachefs.torch.hinted(sampler, paths)) == epochs(lambda sampler: sampler)


@pytest.mark.usefixtures("silent")
def test_it_passes_for_the_sampler_that_it_wraps():
    inner: Any = DistributedSampler(DATA, 4, 1)
    sampler: Any = cachefs.torch.hinted(inner, ["x"] * COUNT)
    assert isinstance(sampler, DistributedSampler)
    assert isinstance(sampler, cachefs.torch.HintedSampler)
    sampler.set_epoch(5)
    assert (inner.epoch, sampler.epoch, sampler.rank, len(sampler)) == (5, 5, 1, 24)
    sampler.epoch = 6  # as Accelerate and Lightning set what they find
    assert inner.epoch == 6
    for other in (pickle.loads(pickle.dumps(sampler)), copy.copy(sampler)):
        assert list(other) == list(inner)
    with pytest.raises(AttributeError):
        _ = sampler.no_such_thing


@pytest.mark.usefixtures("silent")
def test_an_endless_sampler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cachefs.torch.sampler, "EPOCH_ITEMS", 10)
    items = iter(cachefs.torch.hinted(Endless(), ["a", "b", "c", "d"]))
    assert [next(items) for _ in range(31)] == [3, 1, 2] * 10 + [3]


# --- hints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "method", "persistent"),
    [(0, None, False), (2, "fork", False), (2, "fork", True), (2, "spawn", True), (1, "forkserver", False)],
)
def test_epochs_with_hints(
    workers: int,
    method: str | None,
    persistent: bool,
    names: Any,
    fs: CacheFileSystem,
    throttled: ThrottledBucket,
):
    throttled.throttle.set(latency=0.01)
    sampler: Any = cachefs.torch.hinted(RandomSampler(names), names, fs, label="train")
    loader = DataLoader(
        Images(names, fs),
        batch_size=8,
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context=method,
        persistent_workers=persistent,
    )
    for _ in range(3):
        assert sorted(int(n) for batch in loader for n in batch) == list(range(COUNT))
    assert set(throttled.reads.values()) == {1}
    assert len(throttled.reads) == COUNT
    (found,) = consumers(fs)
    assert found["label"] == "train"
    assert found["prefetched"] > COUNT // 4
    wait_until(lambda: consumers(fs)[0]["position"] == 3 * COUNT)
    del loader._iterator
    sampler._consumer.close()
    wait_until(lambda: consumers(fs) == [])


def test_the_next_epoch_is_announced_in_the_middle_of_this_one(
    names: Any, fs: CacheFileSystem, throttled: ThrottledBucket
):
    mine: Any = cachefs.torch.hinted(DistributedSampler(names, 2, 0, seed=1), names, fs)
    twin: Any = DistributedSampler(names, 2, 0, seed=1)
    for epoch in range(3):
        mine.set_epoch(epoch)
        twin.set_epoch(epoch)
        assert list(mine) == list(twin)
        consumer = mine._consumer
        assert consumer is not None
        assert consumer.end == (epoch + 2) * COUNT // 2
        twin.set_epoch(epoch + 1)
        following = {names[number].partition("/")[2] for number in twin}
        wait_until(lambda consumer=consumer: consumer.frontier == consumer.end)
        assert following <= throttled.reads.keys()
    assert list(mine) == list(mine), "set_epoch is forgotten: the order that came is announced in its place"
    assert consumer.position == 5 * COUNT // 2
    assert consumers(fs)[0]["label"] == "rank 0 of 2"
    assert consumers(fs)[0]["unknown"] == 0
    consumer.close()


def test_of_a_long_epoch_the_next_one_is_announced_long_before_its_middle(
    silent: None, monkeypatch: pytest.MonkeyPatch
):
    """What has passed before that, no cache can keep for it."""
    monkeypatch.setattr(cachefs.torch.sampler, "SOON_ITEMS", 5)
    mine: Any = cachefs.torch.hinted(DistributedSampler(DATA, 2, 0, seed=1), [])
    items = iter(mine)
    ends = []
    for _ in range(8):
        next(items)
        ends.append(mine._consumer.end)
    assert ends == [COUNT // 2] * 5 + [COUNT] * 3


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["random", "random, replaced", "weighted", "subset", "batches"])
def test_the_next_epoch_of_a_generator_is_announced_too(kind: str, shared: bool, names: Any, fs: CacheFileSystem):
    """shared: the loader has the generator too, and draws the seed of its workers from it: found out at the first
    boundary, right from the second on."""
    make: dict[str, Callable[[Any], Any]] = {
        "random": lambda g: RandomSampler(DATA, generator=g),
        "random, replaced": lambda g: RandomSampler(DATA, replacement=True, num_samples=100, generator=g),
        "weighted": lambda g: WeightedRandomSampler([1.0 + n for n in DATA], COUNT, generator=g),
        "subset": lambda g: SubsetRandomSampler(list(range(10, 50)), generator=g),
        "batches": lambda g: BatchSampler(RandomSampler(DATA, generator=g), 7, drop_last=False),
    }

    def epochs(wrap: Callable[[Any], Any]) -> tuple[Any, list[list[int]], list[list[int]]]:
        drawn = generator()
        sampler = wrap(make[kind](drawn))
        where = {"batch_sampler": sampler} if kind == "batches" else {"sampler": sampler, "batch_size": 4}
        loader: Any = DataLoader(DATA, generator=drawn if shared else None, **where)
        seen, said = [], []
        for _ in range(4):
            seen.append([int(n) for batch in loader for n in batch])
            following = getattr(sampler, "_next", None)
            said.append([] if following is None else following[1].tolist())
        return sampler, seen, said

    sampler, seen, said = epochs(lambda inner: cachefs.torch.hinted(inner, names, fs))
    assert seen == epochs(lambda inner: inner)[1], "bit for bit what comes without hints"
    right = [announced == came for announced, came in zip(said, seen[1:], strict=False)]
    assert right == [not shared, True, True]
    assert sampler._consumer.end == sampler._consumer.position + len(seen[0]), "the fourth announces the fifth"
    sampler._consumer.close()


def test_a_loop_that_is_left_early(names: Any, fs: CacheFileSystem):
    sampler: Any = cachefs.torch.hinted(SequentialSampler(names), names, fs)
    for number in sampler:
        if number == 10:
            break
    assert list(sampler) == list(range(COUNT))
    assert sampler._consumer.position == 10 + COUNT
    assert sampler._consumer.end == 10 + 2 * COUNT, "one more epoch of the same"
    sampler._consumer.close()


def test_without_a_fetcher_there_is_one_warning_and_training_goes_on(names: Any, tmp_path: Path):
    for at in (None, tmp_path, "nosuchprotocol://bucket"):
        sampler: Any = cachefs.torch.hinted(SequentialSampler(names), [f"/nowhere/{name}" for name in names], at)
        with pytest.warns(RuntimeWarning, match="no hints") as caught:
            assert list(sampler) == list(range(COUNT))
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert list(sampler) == list(range(COUNT))


def test_what_is_no_number_of_an_item(names: Any, fs: CacheFileSystem):
    strange = [("a", "b"), ("c",)]
    with pytest.warns(RuntimeWarning, match="no number"):
        assert list(cachefs.torch.hinted(strange, names, fs)) == strange
    sampler: Any = cachefs.torch.hinted([torch.tensor(3), -1, 10**12], names, fs)
    assert [int(n) for n in sampler] == [3, -1, 10**12]
    wait_until(lambda: sampler._consumer.frontier == 6)
    assert consumers(fs)[0]["prefetched"] == 2
    assert consumers(fs)[0]["unknown"] == 2, "in this epoch, and in the next one, which will be the same"
    sampler._consumer.close()


def test_a_killed_fetcher_in_the_middle_of_an_epoch(names: Any, fs: CacheFileSystem, throttled: ThrottledBucket):
    throttled.throttle.set(latency=0.02)
    sampler: Any = cachefs.torch.hinted(RandomSampler(names), names, fs)
    loader = DataLoader(Images(names, fs), batch_size=4, sampler=sampler, num_workers=2)
    seen: list[int] = []
    for count, batch in enumerate(loader):
        seen += batch.tolist()
        if count == 4:
            os.kill(pid_of(fs.config.home), signal.SIGKILL)
            time.sleep(1.1)  # longer than the consumer leaves its fetcher unlooked at
    assert sorted(seen) == list(range(COUNT))
    sampler._consumer.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["random", "distributed"])
def test_an_epoch_resumed_in_its_middle(kind: str, workers: int, names: Any, fs: CacheFileSystem):
    """torchdata's StatefulDataLoader: what comes after the checkpoint is as it is without hints."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader(hints: bool) -> Any:
        torch.manual_seed(3)
        inner: Any = RandomSampler(names) if kind == "random" else DistributedSampler(names, 2, 1)
        sampler = cachefs.torch.hinted(inner, names, fs) if hints else inner
        return stateful.StatefulDataLoader(Images(names, fs), batch_size=8, sampler=sampler, num_workers=workers)

    def halves(hints: bool) -> list[list[int]]:
        first = loader(hints)
        batches = iter(first)
        seen = [next(batches).tolist() for _ in range(3)]
        state = first.state_dict()
        seen += [batch.tolist() for batch in batches]
        again = loader(hints)
        again.load_state_dict(state)
        resumed = [batch.tolist() for batch in again]
        assert seen[3:] == resumed
        return [*seen, *(batch.tolist() for batch in again)]

    assert halves(True) == halves(False)


# --- through a mount -----------------------------------------------------------------------------------------


@contextmanager
def mounted(cachefs: CommandLine, bucket: ThrottledBucket, folder: Path) -> Iterator[Path]:
    folder.mkdir()
    cachefs("mount", bucket.url, folder, *s3(bucket.options)).ok()
    try:
        yield folder
    finally:
        cachefs("umount", folder).ok()


@pytest.mark.needs_fuse
def test_a_mount_by_its_paths(
    names: Any,
    throttled: ThrottledBucket,
    cache_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """The training process has paths and nothing else: no credentials, no word of the origin."""
    monkeypatch.setenv("CACHEFS_DIR", str(cache_dir))
    for name, value in credentials(throttled.options).items():
        monkeypatch.setenv(name, value)
    command = CommandLine(capsys)
    fs = make_file_system(throttled, cache_dir)
    with mounted(command, throttled, tmp_path / "data") as data:
        throttled.throttle.set(latency=0.02)
        paths = [str(data / f"set/{number:03d}.jpg") for number in range(COUNT)]
        sampler: Any = cachefs.torch.hinted(RandomSampler(range(COUNT)), paths, label="train")
        loader = DataLoader(Images(paths), batch_size=8, sampler=sampler, num_workers=2)
        assert sorted(int(n) for batch in loader for n in batch) == list(range(COUNT))
        assert set(throttled.reads.values()) == {1}
        assert len(throttled.reads) == COUNT
        (found,) = consumers(fs)
        assert found["prefetched"] > COUNT // 4
        said = command("status").ok().out
        assert "train (pid" in said
        assert "decoding or the GPU" in said or "handed out" in said or "origin gives" in said
        assert command("status", "--json").ok().json["consumers"][0]["end"] == COUNT
        # What is new at the origin is announced once the mount serves it.
        throttled.put("set/000.jpg", content(0))
        throttled.put("set/more.jpg", b"new")
        command("refresh", data, *s3(throttled.options)).ok()
        before = sampler._consumer
        assert sorted(sampler) == list(range(COUNT))
        assert sampler._consumer is not before
        assert sampler._place.current
        sampler._consumer.close()
