"""A sampler whose order is announced; otherwise it is the sampler."""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler

from cachefs.errors import CacheFSError, PlanError
from cachefs.plans import NO_NAME
from cachefs.torch.twins import Twin, keeps_state, twin_of, whole_order

if TYPE_CHECKING:
    from cachefs.hints.consumer import Consumer
    from cachefs.hints.places import FileSystem, Place

# Announced at a time: an epoch of ImageNet and more. Longer epochs, and those without end, go on from there.
EPOCH_ITEMS = 1 << 22

# What comes after that is announced when so many of it were taken, or half: what a loader takes before its first batch
# is read. Not at once, as it takes 0.1 s to draw; and early, because what has passed when it is announced cannot be
# kept for the next epoch any more.
SOON_ITEMS = 8192

_OWN = frozenset({"_hinted", "_told", "_consumer", "_place", "_given_up", "_next", "_draws", "_whole"})

_FAILURES = (CacheFSError, OSError, TypeError, ValueError, OverflowError)


class Told(NamedTuple):
    """What the user said. paths[i]: what item i reads; at: where; twin: how to copy a sampler that is not known."""

    paths: Sequence[str | os.PathLike[str]]
    at: str | os.PathLike[str] | FileSystem | None = None
    label: str | None = None
    twin: Callable[[Any], Iterable[Any]] | None = None


class HintedSampler(Sampler[Any]):
    """As the sampler within, for whoever asks (set_epoch, len, isinstance, its state); its order is announced."""

    def __init__(self, sampler: Sampler[Any] | Iterable[Any], told: Told) -> None:
        self._hinted = sampler
        self._told = told
        self._consumer: Consumer | None = None
        self._place: Place | None = None
        self._given_up = False
        self._next: tuple[int, array[int]] | None = None  # the order that was announced for item `number` on
        self._whole = False  # whether all of the last epoch was taken
        # Numbers that somebody else draws from the generator between two epochs: a DataLoader that has the same one
        # takes the seed of its workers from it. None: nobody knows, and the next epoch is not announced.
        self._draws: int | None = 0

    def __iter__(self) -> Iterator[Any]:
        # As without hints: what the sampler does when it is asked for an iterator, it does now, and the rest later.
        return self.continuing(iter(self._hinted))

    def continuing(self, source: Iterator[Any]) -> Iterator[Any]:
        """What `source`, an iterator of the sampler within, still gives, with hints."""
        return _Stateful(self, source) if keeps_state(source) else self.hand_out(source)

    def __len__(self) -> int:
        return len(self._hinted)  # type: ignore[arg-type]

    # --- an epoch ---

    def hand_out(self, source: Iterator[Any]) -> Iterator[Any]:
        # A generator, so that nothing is looked at before the first item is wanted: DataLoader draws the seed of its
        # workers in between, and whoever resumes says where.
        self._whole, was_whole = False, self._whole
        twin = None if self._given_up else self._twin(source)
        if twin is None and self._given_up:
            yield from source
            return
        if twin is None:
            ahead, source = itertools.tee(source)
            twin = Twin(ahead, self._hinted, None)
        order = self._take(twin.items)
        number = self._announce(order, self._consumer.position if self._consumer is not None else 0, was_whole)
        taken, soon, more = 0, min(SOON_ITEMS, len(order) // 2), array("I")
        for item in source:
            consumer = self._consumer
            if consumer is None or taken == len(order):
                yield item
                break
            consumer.at(number)
            size = 1 if type(item) is int and order[taken] == item else self._expected(item, order, taken)
            if size is None:
                self._depart(item, number)
                yield item
                break
            taken += size
            number += size
            if taken > soon:
                soon, more = sys.maxsize, self._announce_more(twin)
            yield item
            if more and taken == len(order):
                order, taken, soon, more = more, 0, min(SOON_ITEMS, len(more) // 2), array("I")
        else:
            if self._consumer is not None:
                self._consumer.at(number)
            self._whole = taken == len(order)
        yield from source

    def _twin(self, source: Iterator[Any]) -> Twin | None:
        """Whom to ask ahead; None: `source` itself, unless that is given up."""
        try:
            if self._told.twin is not None:
                return Twin(iter(self._told.twin(self._hinted)), self._hinted, None)
            twin = twin_of(self._hinted, source)
            if twin is None and (keeps_state(source) or keeps_state(self._hinted)):
                raise PlanError(
                    f"{type(self._hinted).__name__} keeps its place (state_dict), which looking ahead would move; "
                    "say how to copy it: hinted(..., twin=copy.deepcopy)"
                )
            return twin
        except Exception as error:  # noqa: BLE001 - samplers are anybody's code, and a copy that fails costs hints only
            self._give_up(error)
            return None

    def _take(self, items: Iterator[Any]) -> array[int]:
        try:
            taken = list(itertools.islice(items, EPOCH_ITEMS))
        except Exception as error:
            if self._told.twin is None:
                raise  # what the sampler itself is about to raise
            self._give_up(error)
            return array("I")
        try:
            return self._flat(taken)
        except PlanError as error:
            self._give_up(error)
            return array("I")

    # --- what is announced ---

    def _announce(self, order: array[int], number: int, was_whole: bool) -> int:
        """Say that these come next; the number of the first of them."""
        if self._given_up or not order:
            return number
        try:
            if self._place is not None and not self._place.current:
                self._end()  # the mount serves another snapshot by now
                number = 0
            if self._next is not None and self._next[1] == order:
                number, self._next = self._next[0], None
                return number
            if self._next is not None and was_whole:
                self._draws = 1 if self._draws == 0 else None
            self._next = None
            if self._consumer is None:
                self._consumer = self._begin()
            self._consumer.at(number)
            self._consumer.plan(order, at=number)
        except _FAILURES as error:
            self._give_up(error)
        return number

    def _announce_more(self, twin: Twin) -> array[int]:
        """Say what comes after what is announced: more of this epoch, which is given back, or else the next one."""
        more = self._take(twin.items)
        consumer = self._consumer
        if consumer is None:
            return more
        try:
            if more:
                consumer.plan(more)
            elif (following := twin.following(self._draws)) is not None:
                order = self._flat(list(itertools.islice(following, EPOCH_ITEMS)))
                self._next = (consumer.end, order)
                consumer.plan(order)
        except _FAILURES as error:
            self._give_up(error)
        return more

    def _expected(self, item: Any, order: array[int], taken: int) -> int | None:
        """How many numbers it has, if they are those that were announced."""
        try:
            flat = self._flat([item])
        except PlanError:
            return None
        return len(flat) if order[taken : taken + len(flat)] == flat else None

    def _depart(self, item: Any, number: int) -> None:
        """What came is not what was announced: that is void from here on."""
        self._next = None
        warn(
            "something else draws from the random numbers of "
            f"{type(self._hinted).__name__}, so what it gives cannot be told ahead: no hints for the rest of this epoch"
        )
        try:
            if self._consumer is not None:
                self._consumer.plan(self._flat([item]), at=number)
        except _FAILURES as error:
            self._give_up(error)

    def _begin(self) -> Consumer:
        from cachefs.hints.places import place_of

        warn_of_whole_order(self._hinted, "accelerate")
        paths = [os.fspath(path) for path in self._told.paths]
        self._place = place_of(paths, _file_system(self._told.at))
        return self._place.consumer(self._told.label if self._told.label is not None else _label_of(self._hinted))

    def _end(self) -> None:
        if self._consumer is not None:
            self._consumer.close()
        self._consumer = self._place = self._next = None

    def _give_up(self, error: Exception) -> None:
        self._given_up = True
        self._end()
        warn(f"no hints, training goes on without: {error}")

    def _flat(self, items: list[Any]) -> array[int]:
        """The dataset's items that these are, one after the other; batches are lists of them. Raises PlanError."""
        try:
            if items and isinstance(items[0], list | tuple):
                return array("I", list(itertools.chain.from_iterable(items)))
            return array("I", items)
        except (TypeError, OverflowError):
            pass  # negative ones, tensors, arrays of numpy
        count = len(self._told.paths)
        try:
            numbers = [int(each) for item in items for each in _each(item)]
        except (TypeError, ValueError, RuntimeError):
            raise PlanError("the sampler gives what is no number of an item") from None
        return array("I", [n if 0 <= n < count else n + count if -count <= n < 0 else NO_NAME for n in numbers])

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
        return hint_sampler, (self._hinted, self._told)


class _Stateful(Iterator[Any]):
    """An iterator that says where it is, as the one within does (torchdata looks for these methods)."""

    def __init__(self, hints: HintedSampler, source: Any) -> None:
        self._hints = hints
        self._source = source
        self._items = hints.hand_out(source)

    def __next__(self) -> Any:
        return next(self._items)

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state)
        self._items = self._hints.hand_out(self._source)  # what is announced is what comes from there on

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)


def hint_sampler(sampler: Any, told: Told) -> HintedSampler:
    kind = type(sampler)
    if not (hasattr(sampler, "batch_size") and hasattr(sampler, "drop_last")):
        return HintedSampler(sampler, told)

    class HintedBatchSampler(HintedSampler):
        """As batch samplers are made: Lightning makes another of the same type, around a sampler of its own."""

        def __init__(self, sampler: Any, batch_size: int, drop_last: bool) -> None:
            super().__init__(kind(sampler, batch_size=batch_size, drop_last=drop_last), told)

    made = HintedBatchSampler.__new__(HintedBatchSampler)
    HintedSampler.__init__(made, sampler, told)
    return made


def _each(item: Any) -> list[Any] | tuple[Any, ...]:
    """What a batch has, or the one item that it is."""
    plain = item.tolist() if hasattr(item, "tolist") else item
    return plain if isinstance(plain, list | tuple) else [plain]


def warn_of_whole_order(sampler: Any, *frameworks: str) -> None:
    """Where a framework is going to give each process a part of what this sampler gives."""
    if _processes() > 1 and whole_order(sampler) and any(name in sys.modules for name in frameworks):
        warn(
            f"each of {_processes()} processes has hints for the whole order, and not for its part. Hint the loader: "
            "loader = cachefs.torch.hinted(loader, paths), for Accelerate the one that prepare() gives back"
        )


def _processes() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE") or 1)  # as torchrun and Lightning set it


def warn(text: str) -> None:
    warnings.warn(f"cachefs: {text}", RuntimeWarning, stacklevel=4)


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
