"""Hints through what people train with: lists of files, WebDataset, Accelerate, Lightning. The order never changes."""

from __future__ import annotations

import io
import itertools
import tarfile
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler

import cachefs
import cachefs.torch
from cachefs import CacheFileSystem
from cachefs.client import Connection
from cachefs.hints import reading
from tests.filesystems import make_file_system
from tests.machine import ThrottledBucket
from tests.test_fetcher import wait_until

COUNT = 64


@pytest.fixture
def names(throttled: ThrottledBucket) -> list[str]:
    return [throttled.put(f"set/{number:03d}.jpg", bytes([number]) * 1000) for number in range(COUNT)]


@pytest.fixture
def fs(throttled: ThrottledBucket, cache_dir: Path) -> CacheFileSystem:
    return make_file_system(throttled, cache_dir)


def consumers(fs: CacheFileSystem) -> list[dict[str, Any]]:
    with closing(Connection(fs.config, None)) as connection:
        found: list[dict[str, Any]] = connection.status().status["consumers"]
        return found


# --- lists of files ------------------------------------------------------------------------------------------


def test_a_list_of_files(names: list[str], fs: CacheFileSystem, throttled: ThrottledBucket):
    paths = cachefs.hinted(reversed(names), fs, label="a list")
    seen = [next(paths)]
    wait_until(lambda: len(throttled.reads) == COUNT)
    (found,) = consumers(fs)
    assert (found["label"], found["end"]) == ("a list", COUNT)
    assert [*seen, *paths] == names[::-1]
    assert consumers(fs) == [], "it has said everything"


def test_a_list_without_end(
    names: list[str], fs: CacheFileSystem, throttled: ThrottledBucket, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reading, "PATHS", 10)
    monkeypatch.setattr(reading, "LEFT", 4)
    paths = cachefs.hinted(itertools.cycle(names), fs)
    assert list(itertools.islice(paths, 500)) == list(itertools.islice(itertools.cycle(names), 500))
    assert 500 <= consumers(fs)[0]["end"] <= 520
    paths.close()  # type: ignore[attr-defined]
    assert consumers(fs) == []
    short = list(cachefs.hinted(names[:25], fs))
    assert short == names[:25]


def test_a_list_of_nothing_and_of_nowhere(tmp_path: Path):
    for paths in ([], [str(tmp_path / "a"), str(tmp_path / "b")]):
        with pytest.warns(RuntimeWarning, match="no hints"):
            assert list(cachefs.hinted(paths)) == paths


def test_shards_of_webdataset(fs: CacheFileSystem, throttled: ThrottledBucket):
    wds = pytest.importorskip("webdataset")
    urls = []
    for shard in range(6):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as archive:
            for number in range(5):
                info = tarfile.TarInfo(f"{shard}-{number}.txt")
                info.size = 3
                archive.addfile(info, io.BytesIO(b"abc"))
        urls.append(throttled.put(f"shards/{shard}.tar", sink.getvalue()))

    def announced(shards: Any) -> Any:
        for path in cachefs.hinted((shard["url"] for shard in shards), fs):
            yield {"url": path, "stream": fs.open(path)}

    tar = wds.tariterators
    pipeline = wds.DataPipeline(wds.SimpleShardList(urls, seed=3), announced, tar.tar_file_expander, tar.group_by_keys)
    keys = [sample["__key__"] for sample in pipeline]
    assert sorted(keys) == [f"{shard}-{number}" for shard in range(6) for number in range(5)]
    assert throttled.reads == {f"shards/{shard}.tar": 1 for shard in range(6)}


def test_items_that_have_paths(names: list[str], fs: CacheFileSystem):
    shards = [{"url": name, "number": number} for number, name in enumerate(names)]
    items = cachefs.hinted(iter(shards), fs, key=lambda shard: shard["url"])
    seen = [next(items)]
    assert consumers(fs)[0]["end"] == COUNT
    assert [*seen, *items] == shards
    with pytest.warns(RuntimeWarning, match="no hints"):
        assert list(cachefs.hinted(shards, fs, key=lambda shard: shard["path"])) == shards


def test_datasets_of_hugging_face_in_torch_format(names: list[str], fs: CacheFileSystem, throttled: ThrottledBucket):
    datasets = pytest.importorskip("datasets")
    images = datasets.Dataset.from_dict({"path": names, "number": range(COUNT)}).shuffle(seed=1).with_format("torch")

    def run(wrap: Callable[[Any], Any]) -> list[int]:
        torch.manual_seed(5)
        seen: list[int] = []
        for batch in wrap(DataLoader(images, batch_size=8, shuffle=True, num_workers=2)):
            data = [fs.cat_file(path) for path in batch["path"]]
            assert [each[0] for each in data] == batch["number"].tolist()
            seen += batch["number"].tolist()
        return seen

    made: list[Any] = []

    def hinting(loader: Any) -> Any:
        made.append(loader)
        return cachefs.torch.hinted(loader, images["path"], fs)

    assert run(hinting) == run(lambda loader: loader)
    assert made[0].batch_sampler._consumer.position == COUNT
    assert throttled.reads == {f"set/{number:03d}.jpg": 1 for number in range(COUNT)}
    made[0].batch_sampler._consumer.close()


# --- frameworks ------------------------------------------------------------------------------------------------


class Numbers(Dataset[float]):
    """Item n is n."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> float:
        return float(number)


def with_and_without(run: Callable[[Callable[[Any], Any]], Any], names: list[str], fs: CacheFileSystem) -> Any:
    """What `run` sees with hints, after checking that it is what it sees without; and the hinted sampler."""
    made: list[Any] = []

    def hinting(sampler: Any) -> Any:
        made.append(cachefs.torch.hinted(sampler, names, fs))
        return made[-1]

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        without, hinted = run(lambda sampler: sampler), run(hinting)
    assert hinted == without
    return made[0]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("seedable", [False, True])
def test_accelerate(processes: int, seedable: bool, names: list[str], fs: CacheFileSystem):
    prepare = pytest.importorskip("accelerate.data_loader").prepare_data_loader

    def run(wrap: Callable[[Any], Any]) -> list[Any]:
        torch.manual_seed(5)
        data = Numbers()
        inner = RandomSampler(data)
        if seedable:  # Accelerate puts a sampler of its own into the batch sampler
            loader: Any = DataLoader(data, batch_sampler=wrap(BatchSampler(inner, 4, False)))
        else:
            loader = DataLoader(data, batch_size=4, sampler=wrap(inner))
        loader = prepare(
            loader,
            num_processes=processes,
            process_index=processes - 1,
            put_on_device=False,
            use_seedable_sampler=seedable,
            rng_types=[],
        )
        return [batch.tolist() for _ in range(2) for batch in loader]

    sampler = with_and_without(run, names, fs)
    # A seedable sampler counts its epochs, and for several processes Accelerate gives the other one a generator: the
    # third epoch is known, and announced.
    assert sampler._consumer.end == (3 if seedable or processes == 2 else 2) * COUNT
    assert sampler._consumer.position == 2 * COUNT
    sampler._consumer.close()


@pytest.mark.parametrize("distributed", [False, True])
def test_lightning(distributed: bool, names: list[str], fs: CacheFileSystem, tmp_path: Path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Model(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen: list[float] = []

        def training_step(self, batch: Any, number: int) -> Any:
            self.seen += batch.tolist()
            return self.layer(batch[:, None].float()).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(wrap: Callable[[Any], Any]) -> list[float]:
        torch.manual_seed(5)
        data = Numbers()
        inner: Any = DistributedSampler(data, 1, 0, seed=3) if distributed else RandomSampler(data)
        model = Model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                accelerator="cpu",
                devices=1,
                strategy="ddp" if distributed else "auto",
                max_epochs=2,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=tmp_path,
            )
            trainer.fit(model, DataLoader(data, batch_size=4, sampler=wrap(inner)))
        return model.seen

    sampler = with_and_without(run, names, fs)
    assert sampler._consumer.position >= 2 * (COUNT - 1)
    sampler._consumer.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
