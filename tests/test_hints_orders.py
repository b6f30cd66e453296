"""Orders computed without torch are those of torch's own samplers, for a thousand settings drawn at random."""

from __future__ import annotations

import random
import subprocess
import sys
from array import array
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from cachefs.errors import PlanError
from cachefs.hints.orders import (
    MOST_ITEMS,
    DistributedOrder,
    Generator,
    RandomOrder,
    SequentialOrder,
    in_batches,
)

# Settings drawn from one seed each: 20 parts of 50 make a thousand.
PARTS, EACH = 20, 50


def numbers(dice: random.Random) -> Any:
    """A dataset: mostly small, now and then large enough for every path through the permutation."""
    return range(dice.choice([1, 2, 3, 10, 624, 625, 1000, dice.randint(1, 300), dice.randint(1, 20_000)]))


def seed(dice: random.Random) -> int:
    return dice.choice([0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63 - 1000, dice.randrange(2**40)])


@pytest.mark.parametrize("part", range(PARTS))
def test_distributed(part: int):
    dice = random.Random(part)
    for _ in range(EACH):
        data = numbers(dice)
        world = dice.choice([1, 2, 3, 8, dice.randint(1, 64)])
        settings: dict[str, Any] = {
            "rank": dice.randrange(world),
            "seed": seed(dice),
            "shuffle": dice.random() < 0.8,
            # With fewer items than ranks torch's own sampler fails here.
            "drop_last": len(data) >= world and dice.random() < 0.5,
        }
        sampler: Any = DistributedSampler(data, world, **settings)
        epoch = dice.choice([0, 1, 5, dice.randrange(1000)])
        sampler.set_epoch(epoch)
        assert DistributedOrder(len(data), world, **settings).epoch(epoch).tolist() == list(sampler), settings


@pytest.mark.parametrize("part", range(PARTS // 2))
def test_random_with_a_generator(part: int):
    dice = random.Random(1000 + part)
    for _ in range(EACH):
        data, first = numbers(dice), seed(dice)
        replacement = dice.random() < 0.4
        drawn = dice.choice([None, None, dice.randint(1, 200), 2 * len(data)])
        sampler = RandomSampler(data, replacement, drawn, torch.Generator().manual_seed(first))
        order = RandomOrder(len(data), first, replacement, drawn)
        for epoch in range(3):
            assert order.epoch(epoch).tolist() == list(sampler)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_through_a_loader(shared: bool, persistent: bool, drop_last: bool):
    """With the same generator given to the loader too, as `DataLoader(shuffle=True, generator=g)` does."""
    data: Any = range(50)
    generator = torch.Generator().manual_seed(9)
    loader: Any = DataLoader(
        data,
        batch_size=8,
        sampler=RandomSampler(data, generator=generator),
        generator=generator if shared else None,
        drop_last=drop_last,
        num_workers=1 if persistent else 0,
        persistent_workers=persistent,
    )
    order = RandomOrder(50, 9, shared=shared, persistent=persistent)
    for epoch in range(3):
        seen = [int(n) for batch in loader for n in batch]
        assert in_batches(order.epoch(epoch), 8, drop_last=drop_last).tolist() == seen


def test_sequential():
    data: Any = range(7)
    assert SequentialOrder(7).epoch(3).tolist() == list(SequentialSampler(data))
    assert in_batches(array("I", range(7)), 3, drop_last=True).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_permutation_of_very_many():
    generator = torch.Generator().manual_seed(5)
    assert Generator(5).permutation(1_300_000).tolist() == torch.randperm(1_300_000, generator=generator).tolist()


def test_what_is_not_reproduced_is_refused():
    with pytest.raises(PlanError):
        Generator(0).permutation(MOST_ITEMS)
    with pytest.raises(PlanError):
        Generator(0).choices(2**28, 1)
    for world, rank in ((0, 0), (4, 4), (4, -1)):
        with pytest.raises(PlanError, match="no such rank"):
            DistributedOrder(10, world, rank)


def test_it_needs_no_torch():
    program = "import sys, cachefs.hints.orders; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
