"""`cachefs.torch` looks ahead and moves nothing: what is announced is what comes, and that as it does without hints."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import cachefs.torch
from cachefs.torch.sampler import HintedSampler

COUNT = 96
DATA: Any = range(COUNT)
PATHS = [str(number) for number in DATA]


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> int:
        return number


class Consumer:
    """Takes what a consumer takes, and keeps what was announced, by number."""

    def __init__(self) -> None:
        self.position = 0
        self.said: list[int] = []
        self.closed = False

    @property
    def end(self) -> int:
        return len(self.said)

    def at(self, number: int) -> None:
        self.position = number

    def plan(self, order: Any, *, at: int | None = None) -> None:
        del self.said[self.end if at is None else at :]
        self.said += order

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def consumers(monkeypatch: pytest.MonkeyPatch) -> list[Consumer]:
    made: list[Consumer] = []

    def begin(sampler: HintedSampler) -> Consumer:
        made.append(Consumer())
        return made[-1]

    monkeypatch.setattr(HintedSampler, "_begin", begin)
    return made


def hinted(sampler: Any, **options: Any) -> Any:
    return cachefs.torch.hinted(sampler, PATHS, **options)


def bare(sampler: Any) -> Any:
    return sampler


def flat(items: Any) -> list[int]:
    """Items, or those of batches, one after the other."""
    return [each for item in items for each in torch.as_tensor(item).reshape(-1).tolist()]


def data() -> Any:
    return pytest.importorskip("torchdata.stateful_dataloader")


# --- samplers --------------------------------------------------------------------------------------------------

Make = Callable[[torch.Generator | None], Any]


def seedable(generator: torch.Generator | None) -> Any:
    made = pytest.importorskip("accelerate.data_loader").SeedableRandomSampler
    return made(DATA, generator=generator, data_seed=4)


def shard(generator: torch.Generator | None) -> Any:
    made = pytest.importorskip("accelerate.data_loader").BatchSamplerShard
    return made(BatchSampler(RandomSampler(DATA, generator=generator), 7, False), 2, 1)


class Zigzag(Sampler[int]):
    """Of no known kind, and it draws as it goes: with torch's own random numbers unless it is given some."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[int]:
        for _ in range(50):
            yield int(torch.randint(COUNT, (1,), generator=self.generator))


KINDS: dict[str, Make] = {
    "sequential": lambda g: SequentialSampler(DATA),
    "random": lambda g: RandomSampler(DATA, generator=g),
    "random, replaced": lambda g: RandomSampler(DATA, replacement=True, num_samples=300, generator=g),
    "random, more than there is": lambda g: RandomSampler(DATA, num_samples=250, generator=g),
    "weighted": lambda g: WeightedRandomSampler([1.0 + n for n in DATA], 200, generator=g),
    "subset": lambda g: SubsetRandomSampler([5, 3, 50, 60], generator=g),
    "distributed": lambda g: DistributedSampler(DATA, 4, 1, seed=3),
    "batches": lambda g: BatchSampler(RandomSampler(DATA, generator=g), 7, drop_last=True),
    "batches of batches": lambda g: BatchSampler(SequentialSampler(DATA), 5, drop_last=False),
    "a list": lambda g: [4, 2, 7, 5, 5, 5, 1],
    "seedable": seedable,
    "shard": shard,
    "torchdata, random": lambda g: data().sampler.RandomSampler(DATA, generator=g),
    "torchdata, replaced": lambda g: data().sampler.RandomSampler(DATA, True, 100, generator=g),
    "torchdata, distributed": lambda g: data().sampler.StatefulDistributedSampler(DATA, 4, 1, seed=3),
    "torchdata, batches": lambda g: data().sampler.BatchSampler(RandomSampler(DATA, generator=g), 7, False),
}


def epochs(wrap: Callable[[Any], Any], make: Make, seeded: bool, leave: tuple[int, ...]) -> list[Any]:
    """Epochs that are left after so many items, and the random numbers that are next after each."""
    torch.manual_seed(11)
    generator = torch.Generator().manual_seed(7) if seeded else None
    sampler = wrap(make(generator))
    seen: list[Any] = []
    for epoch, most in enumerate(leave):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        for count, item in enumerate(sampler):
            seen.append(item)
            seen.append(torch.rand(1).item())
            if count == most:
                break
        seen.append(torch.rand(1, generator=generator).item())
    return seen


@pytest.mark.parametrize("leave", [(1000, 1000, 1000), (2, 0, 5, 1000), (60, 1000, 40)])
@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_random_numbers_are_drawn_as_without_hints(kind: str, seeded: bool, leave: tuple[int, ...]):
    assert epochs(hinted, KINDS[kind], seeded, leave) == epochs(bare, KINDS[kind], seeded, leave)


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "of no known kind"])
def test_what_is_announced_is_what_comes(kind: str, seeded: bool, consumers: list[Consumer]):
    torch.manual_seed(11)
    make = KINDS.get(kind, Zigzag)
    sampler = hinted(make(torch.Generator().manual_seed(7) if seeded else None))
    seen: list[int] = []
    for epoch in range(3):
        for count, item in enumerate(sampler):
            seen += flat([item])
            (consumer,) = consumers
            assert consumer.said[len(seen) - 1] == seen[-1], (epoch, count)
        assert consumer.position == len(seen)
    assert consumer.said[: len(seen)] == seen


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_an_epoch_is_announced_with_its_first_item(kind: str, consumers: list[Consumer]):
    next(iter(hinted(KINDS[kind](None))))
    assert len(consumers[0].said) == len(flat(KINDS[kind](None)))


def test_after_an_epoch_that_was_left_the_next_ones_are_known_again(consumers: list[Consumer]):
    """It has drawn less than was expected, and that says nothing of who else draws."""
    sampler: Any = hinted(RandomSampler(DATA, generator=torch.Generator().manual_seed(7)))
    for count, _ in enumerate(sampler):
        if count == 80:
            break
    list(sampler)
    announced = consumers[0].said[consumers[0].position :]
    assert announced == list(sampler)


class Backwards(RandomSampler):
    """Iterates in a way of its own: a copy of it might draw what is not its to draw."""

    def __iter__(self) -> Iterator[int]:
        yield from reversed(list(super().__iter__()))


def test_a_subclass_that_iterates_otherwise_is_recorded(consumers: list[Consumer]):
    assert epochs(hinted, lambda g: Backwards(DATA, generator=g), True, (1000, 1000)) == epochs(
        bare, lambda g: Backwards(DATA, generator=g), True, (1000, 1000)
    )
    assert len(consumers[0].said) == 2 * COUNT, "and of the next epoch nothing is known"


def test_a_generator_that_something_else_draws_from(consumers: list[Consumer]):
    """Replaced samples are drawn 32 at a time, so the copy is wrong from the 33rd on."""

    def run(wrap: Callable[[Any], Any]) -> list[int]:
        generator = torch.Generator().manual_seed(7)
        sampler = wrap(RandomSampler(DATA, replacement=True, num_samples=100, generator=generator))
        seen = []
        for _ in range(2):
            for count, item in enumerate(sampler):
                seen.append(item)
                if count == 10 and len(seen) < 100:
                    torch.rand(1, generator=generator)
        return seen

    with pytest.warns(RuntimeWarning, match="something else draws") as caught:
        seen = run(hinted)
    assert len(caught) == 1
    assert seen == run(bare)
    (consumer,) = consumers
    assert consumer.said[:32] == seen[:32]
    assert consumer.position == 32 + 100, "the second epoch is announced where the first one departed"
    assert consumer.said[32:132] == seen[100:]


def test_a_sampler_that_keeps_its_place_in_a_way_of_its_own(consumers: list[Consumer]):
    class Resumable(Sampler[int]):
        def __init__(self) -> None:
            self.taken = 0

        def __iter__(self) -> Iterator[int]:
            while self.taken < COUNT:
                self.taken += 1
                yield COUNT - self.taken
            self.taken = 0

        def state_dict(self) -> dict[str, int]:
            return {"taken": self.taken}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.taken = state["taken"]

    for options in ({}, {"twin": copy.deepcopy}):
        sampler = hinted(Resumable(), **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            items = iter(sampler)
            assert [next(items) for _ in range(10)] == list(range(95, 85, -1))
            assert sampler.state_dict() == {"taken": 10}
            sampler.load_state_dict({"taken": 50})
            assert list(sampler) == list(range(45, -1, -1))
        assert len(caught) == (0 if options else 1)
    (consumer,) = consumers
    assert consumer.said[:9] == list(range(95, 86, -1)), "the tenth was handed out, and nobody came back for more"
    assert consumer.said[9:] == list(range(45, -1, -1))


def test_batches_that_are_tensors(consumers: list[Consumer]):
    batches = [torch.tensor([3, 1]), torch.tensor([], dtype=torch.int64), 5, [6, -2], torch.tensor(-1)]
    for start in range(len(batches)):
        turned = batches[start:] + batches[:start]
        given: Any = hinted(turned)
        assert all(came is batch for came, batch in zip(given, turned, strict=True))
        assert sorted(consumers[start].said) == [1, 1, 3, 3, 5, 5, 6, 6, COUNT - 2, COUNT - 2, COUNT - 1, COUNT - 1]


@pytest.mark.parametrize("items", [[0, 1, "two"], [0, 1, torch.tensor([[1, 2], [3, 4]])], [0, 1, {"a": 1}]])
def test_what_comes_is_no_number_though_the_copy_gave_one(items: list[Any], consumers: list[Consumer]):
    sampler: Any = hinted(items, twin=lambda sampler: DATA)
    with pytest.warns(RuntimeWarning, match="no hints"):
        assert all(came is item for came, item in zip(sampler, items, strict=True))
    assert consumers[0].closed


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_copy_that_fails_costs_hints_only(when: str, consumers: list[Consumer]):
    def twin(sampler: Any) -> Any:
        if when == "at once":
            raise KeyError("no copy")
        return (1 // (50 - number) for number in sampler)

    sampler = hinted(SequentialSampler(DATA), twin=twin)
    with pytest.warns(RuntimeWarning, match="no hints") as caught:
        assert [*sampler, *sampler] == [*DATA, *DATA]
    assert len(caught) == 1
    assert consumers == []


# --- torchdata: a state that is saved and loaded ---------------------------------------------------------------

Loader = Callable[[Callable[[Any], Any], int], Any]


def stateful(wrap: Callable[[Any], Any], workers: int, **options: Any) -> Any:
    return data().StatefulDataLoader(Numbers(), batch_size=8, num_workers=workers, **options)


LOADERS: dict[str, Loader] = {
    "shuffled": lambda wrap, workers: wrap(stateful(wrap, workers, shuffle=True)),
    "in order": lambda wrap, workers: wrap(stateful(wrap, workers)),
    "its sampler": lambda wrap, workers: stateful(wrap, workers, sampler=wrap(data().sampler.RandomSampler(DATA))),
    "distributed": lambda wrap, workers: stateful(
        wrap, workers, sampler=wrap(data().sampler.StatefulDistributedSampler(DATA, 2, 1))
    ),
    "distributed, loader": lambda wrap, workers: wrap(
        stateful(wrap, workers, sampler=data().sampler.StatefulDistributedSampler(DATA, 2, 1))
    ),
    "torch's, loader": lambda wrap, workers: wrap(stateful(wrap, workers, sampler=RandomSampler(DATA))),
    "torch's distributed, loader": lambda wrap, workers: wrap(
        stateful(wrap, workers, sampler=DistributedSampler(DATA, 2, 1))
    ),
}

# torchdata skips what was read by asking for it, above a sampler that keeps no place.
SKIPPING: dict[str, Loader] = {
    "torch's": lambda wrap, workers: stateful(wrap, workers, sampler=wrap(RandomSampler(DATA))),
    "torch's batches": lambda wrap, workers: data().StatefulDataLoader(
        Numbers(), batch_sampler=wrap(BatchSampler(RandomSampler(DATA), 8, False)), num_workers=workers
    ),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [*LOADERS, *SKIPPING])
def test_an_epoch_resumed_in_its_middle(kind: str, workers: int, consumers: list[Consumer]):
    """Checkpoints are the same with hints and without, so either may be resumed as the other."""
    make = {**LOADERS, **SKIPPING}[kind]

    def halves(before: Callable[[Any], Any], after: Callable[[Any], Any]) -> tuple[list[int], list[int], list[int]]:
        torch.manual_seed(3)
        loader = make(before, workers)
        batches = iter(loader)
        start = [next(batches) for _ in range(3)]
        state = loader.state_dict()
        rest = flat(batches)
        torch.manual_seed(3)
        again = make(after, workers)
        again.load_state_dict(state)
        consumers.clear()
        resumed = flat(again)
        assert resumed == rest
        following = flat(again)
        loader._iterator = again._iterator = None  # their workers end with them
        return flat(start), resumed, following

    expected = halves(bare, bare)
    assert halves(hinted, bare) == expected
    for before in (hinted, bare):
        assert halves(before, hinted) == expected
        (consumer,) = consumers
        rest, following = expected[1:]
        skipped = 24 if kind in SKIPPING else 0
        assert consumer.said[skipped : skipped + len(rest) + len(following)] == rest + following


# --- loaders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_loader(workers: int, persistent: bool, consumers: list[Consumer]):
    def run(wrap: Callable[[Any], Any]) -> list[int]:
        torch.manual_seed(5)
        options: Any = {"persistent_workers": persistent and workers > 0, "num_workers": workers}
        loader: Any = DataLoader(Numbers(), batch_size=8, shuffle=True, drop_last=True, **options)
        assert wrap(loader) is loader
        assert (len(loader), loader.batch_size, loader.batch_sampler.drop_last) == (12, 8, True)
        seen = [*flat(loader), *flat(loader)]
        wrap(loader)  # again, while its workers live
        return seen + flat(loader)

    assert run(hinted) == (seen := run(bare))
    first, second = consumers
    assert first.said == seen[: 2 * COUNT]
    assert first.closed
    assert second.said == seen[2 * COUNT :]


def test_a_loader_without_batches(consumers: list[Consumer]):
    loader: Any = hinted(DataLoader(Numbers(), batch_size=None, sampler=SequentialSampler(DATA)))
    assert [int(item) for item in loader] == list(DATA)
    assert consumers[0].said[:COUNT] == list(DATA)


def test_a_loader_whose_dataset_has_an_order_of_its_own():
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield from (3, 1, 2)

    loader: Any = DataLoader(Stream(), batch_size=None)
    with pytest.warns(RuntimeWarning, match=r"cachefs\.hinted"):
        assert list(hinted(loader)) == [3, 1, 2]


def test_who_is_outermost_announces(consumers: list[Consumer]):
    sampler = hinted(SequentialSampler(DATA))
    loader: Any = hinted(DataLoader(Numbers(), batch_size=8, sampler=sampler))
    assert flat(hinted(loader)) == list(DATA)
    assert len(consumers) == 1
    assert isinstance(loader.batch_sampler, HintedSampler)
    assert not isinstance(loader.batch_sampler.sampler, HintedSampler)


def test_accelerate_skips_what_was_read(consumers: list[Consumer]):
    accelerate = pytest.importorskip("accelerate.data_loader")

    def run(wrap: Callable[[Any], Any]) -> list[int]:
        torch.manual_seed(5)
        loader: Any = accelerate.prepare_data_loader(DataLoader(Numbers(), batch_size=8, shuffle=True))
        return flat(wrap(accelerate.skip_first_batches(wrap(loader), 5)))

    assert run(hinted) == (seen := run(bare))
    (consumer,) = consumers
    assert consumer.said == seen, "not what is skipped"


def test_lightning_predicts(consumers: list[Consumer]):
    lightning = pytest.importorskip("pytorch_lightning")

    class Model(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def predict_step(self, batch: Any, number: int) -> Any:
            return batch

    def run(wrap: Callable[[Any], Any]) -> list[int]:
        loader = wrap(DataLoader(Numbers(), batch_size=8, drop_last=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
            return flat(trainer.predict(Model(), loader))

    assert run(hinted) == run(bare) == list(DATA)
    assert consumers[-1].said[:COUNT] == list(DATA)


@pytest.mark.usefixtures("consumers")
def test_a_whole_order_that_is_about_to_be_dealt_out(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("accelerate")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(RuntimeWarning, match="Hint the loader"):
        hinted(RandomSampler(DATA))
    with pytest.warns(RuntimeWarning, match="Hint the loader"):
        hinted(BatchSampler(SequentialSampler(DATA), 4, False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hinted(DistributedSampler(DATA, 2, 0))
        hinted(shard(None))
        hinted(Zigzag(None))
