"""Hints from PyTorch: the order that a sampler gives is fetched before the workers ask for it.

    sampler = cachefs.torch.hinted(DistributedSampler(dataset), paths)          # paths[i] is what dataset[i] reads
    loader = DataLoader(dataset, batch_size=256, sampler=sampler, num_workers=8)

It wraps any sampler or batch sampler and changes nothing of what comes out. As an epoch begins it takes the whole order
of the epoch from the sampler, says it to the fetcher, and hands it out; what is announced is what is read, whatever the
sampler. So an epoch that is left early has drawn all of its random numbers: with a generator the next order is then
another one than without hints. Where the next epoch follows from a seed (DistributedSampler, samplers with a generator)
its order is announced in the middle of this one, so that its first batches are there when it begins. The workers take
no part: any number, forked or spawned.

Frameworks that replace samplers: Lightning and Accelerate keep a hinted one. With use_seedable_sampler Accelerate puts
another sampler into the batch sampler, so there it is the batch sampler that is hinted: `hinted(BatchSampler(...))`.

Hints are advice. What goes wrong with them is one warning, and training goes on.
"""

from __future__ import annotations

import copy
import os
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from cachefs.errors import CacheFSError, PlanError
from cachefs.plans import NO_NAME

if TYPE_CHECKING:
    from cachefs.hints.consumer import Consumer
    from cachefs.hints.places import FileSystem, Place

# Taken from the sampler at a time: an epoch of ImageNet and more. Endless samplers end here and go on.
EPOCH_ITEMS = 1 << 22

_OWN = frozenset({"_hinted", "_paths", "_where", "_label", "_consumer", "_place", "_given_up", "_next", "_draws"})

# Samplers of torch whose only state is the generator that they were given.
_DRAWING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def hinted(
    sampler: Sampler[Any] | Iterable[Any],
    paths: Sequence[str | os.PathLike[str]],
    at: str | os.PathLike[str] | FileSystem | None = None,
    *,
    label: str | None = None,
) -> HintedSampler:
    """`sampler`, with hints. paths[i]: what item i of the dataset reads, in a mount or as the file system takes it.

    at: the mount point, the cachefs file system that reads them, or a URL ("s3://bucket") of one with default options;
    None: paths are absolute and in a mount. label: what `cachefs status` calls it [default: the rank].
    """
    return HintedSampler(sampler, paths, at, label=label)


class HintedSampler(Sampler[Any]):
    """As the sampler within, for whoever asks (set_epoch, len, isinstance, its state); its order is announced."""

    def __init__(
        self,
        sampler: Sampler[Any] | Iterable[Any],
        paths: Sequence[str | os.PathLike[str]],
        at: str | os.PathLike[str] | FileSystem | None,
        *,
        label: str | None,
    ) -> None:
        self._hinted = sampler
        self._paths = paths
        self._where = at
        self._label = label
        self._consumer: Consumer | None = None
        self._place: Place | None = None
        self._given_up = False
        self._next: tuple[int, array[int]] | None = None  # the order that was announced for item `number` on
        # Numbers that somebody else draws from the generator between two epochs: a DataLoader that has the same one
        # takes the seed of its workers from it. None: nobody knows, and the next epoch is not announced.
        self._draws: int | None = 0

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that nothing is drawn before the first item is asked for: DataLoader draws the seed of its
        # workers in between, and the random numbers must come as they do without hints.
        source = iter(self._hinted)
        number = self._consumer.position if self._consumer is not None else 0
        while items := list(islice(source, EPOCH_ITEMS)):
            number = self._announce(items, number)
            consumer = self._consumer
            if consumer is None:
                yield from items
                continue
            # The middle of the last part: only there it is known from what state the next epoch starts.
            ahead = len(items) // 2 if len(items) < EPOCH_ITEMS else -1
            for count, item in enumerate(items):
                consumer.at(number)
                number += len(item) if isinstance(item, list | tuple) else 1
                if count == ahead:
                    self._announce_next()
                yield item
            consumer.at(number)

    def __len__(self) -> int:
        return len(self._hinted)  # type: ignore[arg-type]

    # --- what is announced ---

    def _announce(self, items: list[Any], number: int) -> int:
        """Say that these come next; the number of the first of them."""
        if self._given_up:
            return number
        try:
            order = _flat(items, len(self._paths))
            if self._place is not None and not self._place.current:
                self._end()  # the mount serves another snapshot by now
                number = 0
            if self._next is not None and self._next[1] == order:
                number, self._next = self._next[0], None
                return number
            if self._next is not None:
                self._draws = 1 if self._draws == 0 else None
            self._next = None
            if self._consumer is None:
                self._consumer = self._begin()
            self._consumer.at(number)
            self._consumer.plan(order, at=number)
        except (CacheFSError, OSError, TypeError, ValueError, OverflowError) as error:
            self._give_up(error)
        return number

    def _announce_next(self) -> None:
        """Say the next epoch's order too, where it follows from a seed."""
        consumer = self._consumer
        if consumer is None or self._given_up:
            return
        following = _following(self._hinted, self._draws)
        if following is None:
            return
        try:
            order = _flat(list(following), len(self._paths))
            at = consumer.end
            consumer.plan(order)
            self._next = (at, order)
        except (CacheFSError, OSError, TypeError, ValueError, OverflowError) as error:
            self._give_up(error)

    def _begin(self) -> Consumer:
        from cachefs.hints.places import place_of

        paths = [os.fspath(path) for path in self._paths]
        self._place = place_of(paths, _file_system(self._where))
        return self._place.consumer(self._label if self._label is not None else _label_of(self._hinted))

    def _end(self) -> None:
        if self._consumer is not None:
            self._consumer.close()
        self._consumer = self._place = self._next = None

    def _give_up(self, error: Exception) -> None:
        self._given_up = True
        self._end()
        warnings.warn(f"cachefs gives no hints, training goes on without: {error}", RuntimeWarning, stacklevel=4)

    # --- otherwise it is the sampler ---

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # Lightning and others replace samplers that are not what they expect: they see the one within.
        return type(self._hinted)

    def __getattr__(self, name: str) -> Any:
        if name in _OWN or name.startswith("__"):
            raise AttributeError(name)  # while it is being unpickled
        return getattr(self._hinted, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._hinted, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return HintedSampler._again, (self._hinted, self._paths, self._where, self._label)

    @staticmethod
    def _again(sampler: Any, paths: Any, at: Any, label: str | None) -> HintedSampler:
        return HintedSampler(sampler, paths, at, label=label)


def _flat(items: list[Any], count: int) -> array[int]:
    """The dataset's items that these are, one after the other; batches are lists of them. Raises PlanError."""
    if items and isinstance(items[0], list | tuple):
        items = [each for batch in items for each in batch]
    try:
        return array("I", items)
    except (TypeError, OverflowError):
        pass
    try:  # negative ones, tensors, numbers of numpy
        numbers = [int(each) for each in items]
    except (TypeError, ValueError):
        raise PlanError("the sampler gives what is no number of an item") from None
    return array("I", [n if 0 <= n < count else n + count if -count <= n < 0 else NO_NAME for n in numbers])


def _following(sampler: Any, draws: int | None) -> Iterable[Any] | None:
    """A sampler that gives the next epoch's order and draws nothing from anybody's random numbers; None: unknown.

    sampler: it was asked for the whole of this epoch. draws: see HintedSampler._draws.
    """
    inner = getattr(sampler, "sampler", None)
    if inner is not None and (type(sampler) is BatchSampler or isinstance(inner, DistributedSampler)):
        within = _following(inner, draws)
        outer = copy.copy(sampler)
        outer.sampler = within
        return None if within is None else outer
    following = copy.copy(sampler)
    if isinstance(sampler, DistributedSampler):
        following.set_epoch(sampler.epoch + 1)
        return following  # type: ignore[no-any-return]
    if type(sampler) not in _DRAWING or sampler.generator is None or draws is None:
        return None
    following.generator = sampler.generator.clone_state()
    for _ in range(draws):
        torch.empty((), dtype=torch.int64).random_(generator=following.generator)
    return following  # type: ignore[no-any-return]


def _label_of(sampler: Any) -> str:
    for each in (sampler, getattr(sampler, "sampler", None)):
        if isinstance(each, DistributedSampler):
            return f"rank {each.rank} of {each.num_replicas}"
    rank = os.environ.get("RANK")  # as torchrun sets it
    return f"rank {rank}" if rank else f"process {os.getpid()}"


def _file_system(at: Any) -> Any:
    """A URL means the file system that fsspec makes of it."""
    if isinstance(at, str) and "://" in at:
        import fsspec

        return fsspec.core.url_to_fs(at if at.startswith("cachefs::") else f"cachefs::{at}")[0]
    return at
