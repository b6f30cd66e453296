"""The orders of torch's samplers, reproduced without torch: from kind, seed, epoch, world and rank.

So whoever knows a job's settings knows what every rank reads in every epoch: a command, a script that fills a cache the
night before. Defined by torch 2.13: torch/utils/data/sampler.py and distributed.py; the generator is MT19937
(ATen/core/MT19937RNGEngine.h), a permutation of fewer than 2^32 / 20 items swaps item i with one of the rest, drawn as
random() modulo their number (randperm_cpu in ATen/native/TensorFactories.cpp).
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from math import ceil

from cachefs.errors import PlanError

# From here on torch draws 64 bits for each item.
MOST_ITEMS = (2**32 - 1) // 20

# From here on torch.randint draws 64 bits (uniform_int_from_to_distribution).
_MOST_CHOICES = 2**28


class Generator:
    """As torch.Generator().manual_seed(seed) on a CPU."""

    def __init__(self, seed: int) -> None:
        state = [seed & 0xFFFFFFFF]
        for n in range(1, 624):
            last = state[-1]
            state.append((1812433253 * (last ^ (last >> 30)) + n) & 0xFFFFFFFF)
        self._random = random.Random()  # noqa: S311 - torch's, not ours to choose
        self._random.setstate((3, (*state, 624), None))

    def permutation(self, count: int) -> array[int]:
        """torch.randperm(count). Raises PlanError for more than MOST_ITEMS."""
        if count >= MOST_ITEMS:
            raise PlanError(f"{count} items: orders of so many are drawn in another way, which is not reproduced")
        order = array("I", range(count))
        draw = self._random.getrandbits
        for n in range(count - 1):
            other = n + draw(32) % (count - n)
            order[n], order[other] = order[other], order[n]
        return order

    def choices(self, count: int, size: int) -> array[int]:
        """torch.randint(high=count, size=(size,))."""
        if count >= _MOST_CHOICES:
            raise PlanError(f"{count} items: drawn with replacement from so many is not reproduced")
        draw = self._random.getrandbits
        return array("I", (draw(32) % count for _ in range(size)))

    def skip(self, words: int) -> None:
        for _ in range(words):
            self._random.getrandbits(32)


@dataclass(frozen=True)
class SequentialOrder:
    """SequentialSampler."""

    count: int

    def epoch(self, number: int) -> array[int]:
        return array("I", range(self.count))


@dataclass(frozen=True)
class DistributedOrder:
    """DistributedSampler after set_epoch(number)."""

    count: int
    world: int = 1
    rank: int = 0
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False

    def __post_init__(self) -> None:
        """Raises PlanError."""
        if self.count < 1 or self.world < 1 or not 0 <= self.rank < self.world:
            raise PlanError(f"rank {self.rank} of {self.world} over {self.count} items: there is no such rank")

    def epoch(self, number: int) -> array[int]:
        order = Generator(self.seed + number).permutation(self.count) if self.shuffle else array("I", range(self.count))
        if self.drop_last:
            return order[: self.count // self.world * self.world][self.rank :: self.world]
        total = ceil(self.count / self.world) * self.world
        return (order * ceil(total / self.count))[:total][self.rank :: self.world]


@dataclass(frozen=True)
class RandomOrder:
    """RandomSampler(generator=torch.Generator().manual_seed(seed)), whose epochs follow from one another.

    drawn: items per epoch, None = all. shared: the DataLoader was given the same generator, so it draws the seed of its
    workers from it at the start of each epoch; persistent: (with persistent_workers) of the first one only.
    """

    count: int
    seed: int = 0
    replacement: bool = False
    drawn: int | None = None
    shared: bool = False
    persistent: bool = False

    def epoch(self, number: int) -> array[int]:
        """Computes those before it too."""
        generator = Generator(self.seed)
        order = array("I")
        for each in range(number + 1):
            if self.shared and (each == 0 or not self.persistent):
                generator.skip(2)  # an int64 is drawn from 64 bits
            order = self._next(generator)
        return order

    def _next(self, generator: Generator) -> array[int]:
        drawn = self.count if self.drawn is None else self.drawn
        if self.replacement:
            return generator.choices(self.count, drawn)
        order = array("I")
        for _ in range(drawn // self.count):
            order += generator.permutation(self.count)
        # Drawn even where none of it is taken.
        return order + generator.permutation(self.count)[: drawn % self.count]


Order = SequentialOrder | DistributedOrder | RandomOrder


def in_batches(order: array[int], size: int, *, drop_last: bool) -> array[int]:
    """What a DataLoader reads of an order: all, or with drop_last whole batches only."""
    return order[: len(order) // size * size] if drop_last else order
