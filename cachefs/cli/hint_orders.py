"""`cachefs hint --sampler`: the order of a job's epochs, computed from the settings of its sampler."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

from cachefs.errors import ConfigError
from cachefs.hints.orders import DistributedOrder, Order, RandomOrder, SequentialOrder, in_batches


class Kind(StrEnum):
    """Samplers of torch. random: RandomSampler with a seeded generator."""

    SEQUENTIAL = "sequential"
    RANDOM = "random"
    DISTRIBUTED = "distributed"


@dataclass(frozen=True)
class Settings:
    """What the command line says of a sampler. epochs: "3" or "3-5". ranks: those of this node, () = 0."""

    kind: Kind
    seed: int = 0
    epochs: str = "0"
    world: int = 1
    ranks: tuple[int, ...] = ()
    shuffle: bool = True
    drop_last: bool = False
    batch_size: int | None = None

    def orders(self, count: int) -> Iterator[array[int]]:
        """One order per epoch over `count` items. Ranks go on side by side, so their items alternate.

        Raises ConfigError, PlanError.
        """
        if count == 0:
            raise ConfigError("--sampler: the list of the dataset's files is empty")
        ranks = [self._of(count, rank) for rank in self.ranks or (0,)]
        for epoch in range(*self._epochs()):
            each = [self._in_batches(order.epoch(epoch)) for order in ranks]
            # Every rank has as many.
            yield each[0] if len(each) == 1 else array("I", chain.from_iterable(zip(*each, strict=True)))

    def _of(self, count: int, rank: int) -> Order:
        if self.kind is Kind.DISTRIBUTED:
            return DistributedOrder(count, self.world, rank, self.seed, self.shuffle, self.drop_last)
        if self.world != 1 or rank != 0:
            kind = self.kind.value
            raise ConfigError(f"--sampler {kind}: every rank reads everything; --world and --rank mean nothing")
        return SequentialOrder(count) if self.kind is Kind.SEQUENTIAL else RandomOrder(count, self.seed)

    def _in_batches(self, order: array[int]) -> array[int]:
        return in_batches(order, self.batch_size, drop_last=True) if self.batch_size else order

    def _epochs(self) -> tuple[int, int]:
        first, dash, last = self.epochs.partition("-")
        try:
            begin, end = int(first), int(last if dash else first)
        except ValueError:
            begin, end = -1, -1
        if not 0 <= begin <= end:
            raise ConfigError(f"--epochs {self.epochs!r}: write one, as 3, or the first and the last, as 0-9")
        return begin, end + 1
