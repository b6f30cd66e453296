"""Hints in jobs of several processes, with the real torch.distributed, Accelerate and Lightning.

Each process reads its part, and that is what it announces.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import cachefs.torch
from cachefs import CacheFileSystem
from cachefs.torch import HintedSampler
from tests.command_line import script
from tests.filesystems import make_file_system
from tests.machine import ThrottledBucket
from tests.ranks import Said, job
from tests.test_fetcher import wait_until

COUNT, WORLD = 96, 2


def content(number: int) -> bytes:
    return bytes([number]) * (3000 + number)


@pytest.fixture
def names(throttled: ThrottledBucket) -> list[str]:
    return [throttled.put(f"set/{number:03d}.jpg", content(number)) for number in range(COUNT)]


@pytest.fixture
def fs(throttled: ThrottledBucket, cache_dir: Path) -> CacheFileSystem:
    return make_file_system(throttled, cache_dir)


class Images(Dataset[int]):
    """Item n is n, if the bytes of file n are right."""

    def __init__(self, names: list[str], fs: CacheFileSystem) -> None:
        self.names = names
        self.fs = fs

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> int:
        assert self.fs.cat_file(self.names[number]) == content(number)
        return number


def items(loader: Any) -> list[int]:
    return [int(number) for batch in loader for number in batch]


# --- torch.distributed -----------------------------------------------------------------------------------------


def train(names: list[str], fs: CacheFileSystem) -> Any:
    """Two epochs of one rank: what it read, what it had announced, how far it is."""
    torch.distributed.init_process_group("gloo")
    said = Said()
    sampler: Any = cachefs.torch.hinted(DistributedSampler(names, seed=3), names, fs)  # type: ignore[arg-type]
    loader = DataLoader(Images(names, fs), batch_size=8, sampler=sampler, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = iter(loader)
        seen = next(batches).tolist()
        consumer = sampler._consumer
        wait_until(lambda consumer=consumer: consumer.frontier >= consumer.end)
        epochs.append(seen + items(batches))
        wait_until(lambda consumer=consumer: consumer.frontier >= consumer.end)  # the next one is there when it begins
    del loader._iterator
    return (epochs, said.items, [sampler._consumer.position, sampler._consumer.end]), sampler


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_read_their_parts_and_each_object_is_read_once(
    names: list[str], fs: CacheFileSystem, throttled: ThrottledBucket, cache_dir: Path
):
    throttled.throttle.set(latency=0.01)
    with job(train, names, fs) as ranks:
        status = json.loads(script("status", "--json", "--cache-dir", cache_dir).out)
    part = COUNT // WORLD
    for rank, (epochs, said, progress) in enumerate(ranks):
        for epoch, seen in enumerate(epochs):
            alone: Any = DistributedSampler(names, WORLD, rank, seed=3)  # type: ignore[arg-type]
            alone.set_epoch(epoch)
            assert seen == list(alone)
        assert said[: 2 * part] == epochs[0] + epochs[1]
        assert progress == [2 * part, 3 * part], "the third epoch is announced too"
    assert throttled.reads == {f"set/{number:03d}.jpg": 1 for number in range(COUNT)}
    consumers = sorted(status["consumers"], key=lambda found: found["label"])
    assert [found["label"] for found in consumers] == [f"rank {rank} of {WORLD}" for rank in range(WORLD)]
    assert len({found["pid"] for found in consumers}) == WORLD
    for found in consumers:
        # What the first two batches of two workers ask for comes at once, and one more is asked for when the first
        # has come; all else was there when it was asked for.
        assert found["late"] <= (2 * 2 + 1) * 8
        assert (found["unknown"], found["failed"]) == (0, 0)


# --- Accelerate ------------------------------------------------------------------------------------------------


class Numbers(Dataset[float]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> float:
        return float(number)


WAYS: list[dict[str, bool]] = [
    {},
    {"use_seedable_sampler": True},
    {"split_batches": True},
    {"even_batches": False},
    {"use_stateful_dataloader": True},
]


def accelerate(names: list[str], fs: CacheFileSystem) -> Any:
    """What a rank read in two epochs without hints and with, what it announced and where it is: in each way."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, set_seed

    def run(options: dict[str, bool], hints: bool) -> tuple[list[int], Any]:
        set_seed(5)
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
        assert accelerator.num_processes == WORLD
        loader = accelerator.prepare(DataLoader(Numbers(), batch_size=8, shuffle=True))
        if hints:
            loader = cachefs.torch.hinted(loader, names, fs)
        return items(loader) + items(loader), loader.batch_sampler

    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for options in WAYS:
            without, _ = run(options, False)
            said = Said()
            seen, sampler = run(options, True)
            said.undo()
            results.append((without, seen, said.items, sampler._consumer.position))
    return (results,)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_accelerate_deals_out_the_order(names: list[str], fs: CacheFileSystem):
    pytest.importorskip("accelerate")
    with job(accelerate, names, fs) as ranks:
        pass
    for way, *both in zip(WAYS, *ranks, strict=True):
        for without, seen, said, position in both:
            assert seen == without, way
            assert position == len(seen) == COUNT, way
            assert said[:COUNT] == seen, way
        for half in (slice(COUNT // 2), slice(COUNT // 2, None)):
            assert sorted(both[0][0][half] + both[1][0][half]) == list(range(COUNT)), way


# --- Lightning -------------------------------------------------------------------------------------------------


def lightning(names: list[str], fs: CacheFileSystem, folder: str) -> Any:
    """Lightning puts a DistributedSampler into a shuffled loader: what came without hints and with, what was said."""
    import pytorch_lightning

    class Model(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen: list[int] = []

        def training_step(self, batch: Any, number: int) -> Any:
            self.seen += [int(item) for item in batch]
            return self.layer(batch[:, None].float()).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    said = Said()

    def run(hints: bool) -> tuple[list[int], Any]:
        loader = DataLoader(Numbers(), batch_size=8, shuffle=True)
        if hints:
            loader = cachefs.torch.hinted(loader, names, fs)
        model = Model()
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu",
            devices=WORLD,
            strategy="ddp",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(model, loader)
        fitted: Any = trainer.train_dataloader
        return model.seen, fitted.batch_sampler

    without, _ = run(False)
    seen, sampler = run(True)
    assert isinstance(sampler, HintedSampler)
    assert isinstance(sampler.sampler, DistributedSampler)
    return (without, seen, said.items), sampler


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_lightning_keeps_the_hints_of_a_loader(names: list[str], fs: CacheFileSystem, tmp_path: Path):
    pytest.importorskip("pytorch_lightning")
    with job(lightning, names, fs, str(tmp_path)) as ranks:
        pass
    for without, seen, said in ranks:
        assert seen == without
        assert said[:COUNT] == seen
    assert sorted(ranks[0][0][: COUNT // 2] + ranks[1][0][: COUNT // 2]) == list(range(COUNT))
