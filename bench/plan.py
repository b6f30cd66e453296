"""How much a run does. Smaller ones are quicker and coarser; what is measured, and how, stays the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """files: read by the scenarios about images; cold_files: of these, at once and cold. names: of the large dataset.
    objects: of the dataset that is larger than the cache. trained_steps: of an accelerator whose dataset is.
    found: names that `find` looks for, each of them also a native file.

    shared: objects of the dataset that clusters read, of twice shared_nodes nodes at most. rows: of the table about
    clusters, empty = all.

    rounds: how often each contender has its turn. kills: of processes, one in 60 ms.
    shard: bytes of the large object, whole MiB.

    Of the comparisons with other contenders: photographs: files that are read; shard_mib: size of one of the large
    files; ranges: read of them at random; listed_names: that are looked for; overfull_mib: size of the dataset that
    is twice the cache; loader_workers: numbers of DataLoader workers; accelerators: numbers of them, each with
    loader_threads workers; ..._rounds: turns of each; contenders: who takes part, empty = all.

    scenarios: goals and comparisons that run when none is named, empty = all.
    """

    scenarios: tuple[str, ...] = ()

    files: int = 4000
    objects: int = 8000
    trained_steps: int = 12
    names: int = 1_000_000
    found: int = 200_000
    shard: int = 1 << 30
    rounds: int = 9
    cold_rounds: int = 5
    mount_rounds: int = 5
    hint_rounds: int = 3
    kills: int = 1000
    shared: int = 1500
    shared_nodes: int = 4
    shared_rounds: int = 2
    rows: tuple[str, ...] = ()

    contenders: tuple[str, ...] = ()
    photographs: int = 240
    comparison_rounds: int = 3
    loader_workers: tuple[int, ...] = (1, 2, 4, 8)
    loader_rounds: int = 2
    overfull_mib: int = 256
    shard_mib: int = 48
    ranges: int = 160
    shard_rounds: int = 2
    listed_names: int = 10_000
    name_rounds: int = 2
    workloads: tuple[str, ...] = ("resnet50", "cosmoflow", "unet3d")
    accelerators: tuple[int, ...] = (1, 2, 4, 8)
    loader_threads: int = 2
    accelerator_rounds: int = 1


# Within three minutes on two cores: what decides whether to look further. The others take minutes whatever their size:
# rests before each cold turn, a native file for each name, kills one after another, an epoch per accelerator.
QUICK = Plan(
    scenarios=("hints", "epochs", "workers", "capacity", "shards"),
    files=600,
    objects=500,
    trained_steps=2,
    names=100_000,
    found=20_000,
    shard=128 << 20,
    rounds=3,
    cold_rounds=1,
    mount_rounds=1,
    hint_rounds=1,
    kills=50,
    shared=1200,
    shared_rounds=1,
    contenders=("native", "mount", "url", "simplecache", "rclone", "obstore"),
    photographs=176,
    comparison_rounds=1,
    loader_workers=(2,),
    loader_rounds=1,
    overfull_mib=144,
    shard_mib=16,
    ranges=40,
    shard_rounds=1,
    listed_names=2000,
    name_rounds=1,
    workloads=("resnet50",),
    accelerators=(1, 4),
)
