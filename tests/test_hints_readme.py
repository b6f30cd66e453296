"""What README.md says about hints, executed as it stands there: with each framework, through a mount."""

from __future__ import annotations

import functools
import io
import operator
import re
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import cachefs
import cachefs.torch
from cachefs.hints.consumer import Consumer
from tests.command_line import CommandLine, credentials, s3
from tests.machine import ThrottledBucket

PAGE = Path(__file__).resolve().parents[1] / "README.md"
COUNT, SHARDS = 40, 6

# Which block is meant: each has one of these.
WORDS = (
    "import cachefs.torch",
    "DistributedSampler",
    "accelerator",
    "trainer",
    "from_dict",
    "    read(file)",
    "from_generator",
    "wds",
)

pytestmark = pytest.mark.needs_fuse


def blocks() -> dict[str, str]:
    """The Python blocks of the section, by their words."""
    section = re.search(r"^### Give hints.*?^(?=### )", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None
    start = PAGE.read_text()[: section.start()].count("\n")
    found = {}
    for block in re.finditer(r"^```python\n(.*?)^```$", section[0], re.MULTILINE | re.DOTALL):
        line = start + section[0][: block.start()].count("\n") + 1
        (word,) = [word for word in WORDS if word in block[1]]
        assert word not in found
        found[word] = "\n" * line + block[1]
    return found


class Images(Dataset[int]):
    """Item n is n, if the bytes of file n are right."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> int:
        return number_in(self.paths[number])


def content(number: int) -> bytes:
    return bytes([number]) * (3000 + number)


def shard(number: int) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for member in range(5):
            info = tarfile.TarInfo(f"{number}-{member}.txt")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    return sink.getvalue()


def number_in(path: str) -> int:
    data = Path(path).read_bytes()
    assert data == content(data[0])
    return data[0]


@pytest.fixture
def world(
    throttled: ThrottledBucket,
    cache_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[dict[str, Any]]:
    """What the blocks' words mean."""
    for name, value in credentials(throttled.options).items():
        monkeypatch.setenv(name, value)
    for number in range(COUNT):
        throttled.put(f"set/{number:03d}.jpg", content(number))
    for number in range(SHARDS):
        throttled.put(f"shards/{number}.tar", shard(number))
    data, command = tmp_path / "data", CommandLine(capsys)
    data.mkdir()
    command("mount", throttled.url, data, *s3(throttled.options), "--cache-dir", cache_dir).ok()
    paths = [str(data / f"set/{number:03d}.jpg") for number in range(COUNT)]
    try:
        yield {
            "DataLoader": DataLoader,
            "DistributedSampler": functools.partial(DistributedSampler, num_replicas=1, rank=0),
            "cachefs": cachefs,
            "dataset": Images(paths),
            "files": paths,
            "functools": functools,
            "operator": operator,
            "paths": paths,
        }
    finally:
        command("umount", data).ok()


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items each plan has."""
    told: list[int] = []

    def counting(plan: Any) -> Any:
        def counted(self: Consumer, what: Any, **at: int) -> None:
            told.append(len(what))
            plan(self, what, **at)

        return counted

    monkeypatch.setattr(Consumer, "plan", counting(Consumer.plan))
    monkeypatch.setattr(Consumer, "plan_names", counting(Consumer.plan_names))
    return told


def run(word: str, world: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        exec(compile(blocks()[word], PAGE, "exec"), world)
    return world


def numbers(loader: Any) -> list[int]:
    return sorted(int(number) for batch in loader for number in batch)


def test_every_block_is_executed_here():
    assert set(blocks()) == set(WORDS)


@pytest.mark.parametrize("word", ["import cachefs.torch", "DistributedSampler"])
def test_loaders_and_samplers(word: str, world: dict[str, Any], throttled: ThrottledBucket, announced: list[int]):
    loader = run(word, world)["loader"]
    assert numbers(loader) == list(range(COUNT))
    assert announced[0] == COUNT
    assert set(throttled.reads.values()) == {1}
    assert len(throttled.reads) == COUNT


def test_accelerate(world: dict[str, Any], announced: list[int]):
    world["accelerator"] = pytest.importorskip("accelerate").Accelerator(cpu=True)
    world["loader"] = DataLoader(world["dataset"], batch_size=8, shuffle=True)
    assert numbers(run("accelerator", world)["loader"]) == list(range(COUNT))
    assert announced == [COUNT]


def test_lightning(world: dict[str, Any], announced: list[int], tmp_path: Path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Model(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen: list[int] = []

        def training_step(self, batch: Any, number: int) -> Any:
            self.seen += batch.tolist()
            return self.layer(batch[:, None].float()).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    world["model"] = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world["trainer"] = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
    world["loader"] = DataLoader(world["dataset"], batch_size=8, shuffle=True)
    run("trainer", world)
    assert sorted(world["model"].seen) == list(range(COUNT))
    assert announced == [COUNT]


def test_datasets_of_hugging_face(world: dict[str, Any], throttled: ThrottledBucket, announced: list[int]):
    world["datasets"] = pytest.importorskip("datasets")
    world["read_images"] = lambda rows: {"number": [number_in(path) for path in rows["path"]]}
    world["DataLoader"] = functools.partial(DataLoader, collate_fn=lambda rows: [row["number"] for row in rows])
    loader = run("from_dict", world)["loader"]
    batches = iter(loader)
    seen = [*next(batches), *(number for batch in batches for number in batch)]
    assert sorted(seen) == list(range(COUNT))
    assert announced == [COUNT]
    assert set(throttled.reads.values()) == {1}


def test_a_stream_of_hugging_face(world: dict[str, Any], announced: list[int]):
    world["datasets"] = pytest.importorskip("datasets")
    world["read"] = lambda file: [{"number": number_in(file)}]
    loader = run("from_generator", world)["loader"]
    assert [int(number) for batch in loader for number in batch["number"]] == list(range(COUNT))
    assert announced[-1] == COUNT


def test_files_one_after_the_other(world: dict[str, Any], announced: list[int]):
    seen: list[int] = []
    world["read"] = lambda file: seen.append(number_in(file))
    run("    read(file)", world)
    assert seen == list(range(COUNT))
    assert announced == [COUNT]


def test_shards_of_webdataset(world: dict[str, Any], throttled: ThrottledBucket, announced: list[int]):
    world["files"] = [str(Path(world["paths"][0]).parents[1] / f"shards/{number}.tar") for number in range(SHARDS)]
    world["wds"] = pytest.importorskip("webdataset")
    samples = run("wds", world)["samples"]
    keys = sorted(sample["__key__"] for sample in samples)
    assert keys == [f"{number}-{member}" for number in range(SHARDS) for member in range(5)]
    assert announced == [SHARDS]
    assert throttled.reads == {f"shards/{number}.tar": 1 for number in range(SHARDS)}
