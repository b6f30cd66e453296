"""This project's mount with the loader's order known to it: hints on."""

from __future__ import annotations

from typing import Any

from bench.contenders.cachefs_mount import Mount


class HintedMount(Mount):
    title = "cachefs mount, hints on"
    settings = (
        "sampler=cachefs.torch.hinted(SequentialSampler(dataset), paths, at=POINT), else as the mount; "
        "in `accelerators` only"
    )
    loader = "bench.contenders.hinted_mount:hinted_loader"
    hints = True


def hinted_loader(dataset: Any, *, batch_size: int, **how: Any) -> Any:
    """As PyTorch's DataLoader in the order of the dataset, which is said to the fetcher."""
    from torch.utils.data import DataLoader, SequentialSampler

    from cachefs.torch import hinted

    sampler = hinted(SequentialSampler(dataset), dataset.names, at=dataset.contender.point)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, **how)
