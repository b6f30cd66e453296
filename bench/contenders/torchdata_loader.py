"""torchdata's StatefulDataLoader in the place of PyTorch's own, over this project's mount."""

from __future__ import annotations

from bench.contenders.cachefs_mount import Mount


class TorchdataOverMount(Mount):
    title = "torchdata over the mount"
    settings = "StatefulDataLoader over files of the cachefs mount; in comparisons with a DataLoader only"
    packages = ("torchdata",)
    loader = "torchdata.stateful_dataloader:StatefulDataLoader"
