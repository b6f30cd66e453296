"""What is a sampler going to give? Its twin is asked: a copy, with a copy of its random numbers.

The sampler itself is asked when an item is wanted, and not before, so what it draws and what it keeps of its place is
as it would be without anybody looking ahead. A twin is made only of what is known to give the same again and to move
nothing of the original: samplers that iterate as those of torch, torchdata or Accelerate do, and all that iterate over
a list or a range. They are known by the names of what iterates, so a subclass that iterates in a way of its own has no
twin, and no package is imported to look.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from types import GeneratorType
from typing import Any, NamedTuple

import torch

# Iterators over what does not change; a copy goes on where they are.
_COUNTING: tuple[type, ...] = (type(iter([])), type(iter(())), type(iter(range(0))), type(iter(range(1 << 70))))

# Asked again, they give the same again.
_FIXED = {"torch.utils.data.sampler.SequentialSampler"}

# The order follows from a seed and the number of the epoch.
_NUMBERED = {
    "torch.utils.data.distributed.DistributedSampler",
    "torchdata.stateful_dataloader.sampler.StatefulDistributedSampler",
}

# The order follows from a generator, or from the random numbers of the process.
_DRAWN = {
    "torch.utils.data.sampler.RandomSampler",
    "torch.utils.data.sampler.SubsetRandomSampler",
    "torch.utils.data.sampler.WeightedRandomSampler",
    "torchdata.stateful_dataloader.sampler.RandomSampler",
}

# It seeds its generator anew for each epoch, and counts them itself.
_SEEDABLE = "accelerate.data_loader.SeedableRandomSampler"

# Each rank's part of the order.
_SHARD = "accelerate.data_loader.BatchSamplerShard"

# Around another sampler, which is their attribute of this name.
_AROUND = {
    "torch.utils.data.sampler.BatchSampler": "sampler",
    "torchdata.stateful_dataloader.sampler.BatchSampler": "sampler",
    "accelerate.data_loader.SkipBatchSampler": "batch_sampler",
    _SHARD: "batch_sampler",
}

_STATEFUL_DRAWING = "torchdata.stateful_dataloader.sampler._StatefulRandomSamplerIterator"
_STATEFUL_BATCHING = "torchdata.stateful_dataloader.sampler._BatchSamplerIterator"


class Twin(NamedTuple):
    """items: what the original gives from now on. sampler: its copy, moved by taking them; None: there is none."""

    items: Iterator[Any]
    original: Any
    sampler: Any

    def following(self, draws: int | None) -> Any | None:
        """What the next epoch gives; None: unknown. To be asked when all items were taken.

        draws: how many numbers somebody else takes from the generator between two epochs; None: unknown.
        """
        return self.sampler if self.sampler is not None and _turn(self.sampler, self.original, draws) else None


def twin_of(sampler: Any, source: Iterator[Any]) -> Twin | None:
    """source: an iterator of `sampler`, before anything is asked of it. None: the sampler is of no known kind."""
    if isinstance(source, GeneratorType):
        again = _copy_of(sampler) if inspect.getgeneratorstate(source) == inspect.GEN_CREATED else None
        return None if again is None else Twin(iter(again), sampler, again)
    if isinstance(source, _COUNTING):
        return Twin(copy.copy(source), sampler, _copy_of(sampler))
    kind = _name(type(source))
    if kind == _STATEFUL_DRAWING:
        items: Any = copy.copy(source)
        items.sampler = _copy_of(items.sampler)
        return None if items.sampler is None else Twin(items, sampler, items.sampler)
    if kind == _STATEFUL_BATCHING:
        return _batching(sampler, source)
    return None


def keeps_state(source: Any) -> bool:
    """Whether it says where it is, so that whoever looks ahead must not move it."""
    return hasattr(source, "state_dict") and hasattr(source, "load_state_dict")


def whole_order(sampler: Any) -> bool:
    """Whether it gives the order of all processes together, as far as can be told."""
    name = _iterating(sampler)
    if name in _AROUND:
        return name != _SHARD and whole_order(getattr(sampler, _AROUND[name]))
    return name in _FIXED or name in _DRAWN or name == _SEEDABLE


def _batching(sampler: Any, source: Any) -> Twin | None:
    inner = twin_of(source.sampler, source.sampler_iter)
    if inner is None:
        if keeps_state(source.sampler) or keeps_state(source.sampler_iter):
            return None
        # It counts what it has taken: what is below it may be taken ahead.
        below, source.sampler_iter = itertools.tee(source.sampler_iter)
        inner = Twin(below, None, None)
    items = copy.copy(source)
    items.sampler_iter = inner.items
    again = None
    if inner.sampler is not None:
        again = copy.copy(sampler)
        again.sampler = inner.sampler
    return Twin(items, sampler, again)


def _copy_of(sampler: Any) -> Any | None:
    """A sampler that gives what this one gives, if asked now, and moves nothing of it; None: it is not known how."""
    if type(sampler) in (list, tuple, range):
        return sampler
    name = _iterating(sampler)
    if name in _FIXED or name in _NUMBERED:
        return copy.copy(sampler)
    if name in _DRAWN or name == _SEEDABLE:
        again = copy.copy(sampler)
        if sampler.generator is not None:
            again.generator = _clone(sampler.generator)
        elif name != _SEEDABLE:
            again.generator = _of_the_process(name)
        return again
    if name in _AROUND:
        within = _copy_of(getattr(sampler, _AROUND[name]))
        if within is not None:
            again = copy.copy(sampler)
            setattr(again, _AROUND[name], within)
            return again
    return None


def _turn(again: Any, original: Any, draws: int | None) -> bool:
    """Turn a copy that has given all of its epoch to the next one; whether that is known."""
    name = _iterating(again)
    if name in _AROUND:
        return _turn(getattr(again, _AROUND[name]), getattr(original, _AROUND[name]), draws)
    if name in _NUMBERED:
        again.set_epoch(again.epoch + 1)
    elif name in _DRAWN:
        if draws is None or original.generator is None:
            return False
        for _ in range(draws):
            torch.empty((), dtype=torch.int64).random_(generator=again.generator)
    return True


def _clone(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())


def _of_the_process(name: str) -> torch.Generator:
    """The generator that a sampler which was given none is going to use."""
    generator = _clone(torch.default_generator)
    if name.endswith(".RandomSampler"):  # one of its own, with a seed from the process's
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())
        generator = torch.Generator()
        generator.manual_seed(seed)
    return generator


def _iterating(sampler: Any) -> str:
    """The class whose __iter__ this one has."""
    return _name(getattr(type(sampler), "__iter__", None)).removesuffix(".__iter__")


def _name(of: Any) -> str:
    return f"{getattr(of, '__module__', '')}.{getattr(of, '__qualname__', '')}"
