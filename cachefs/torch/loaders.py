"""What to hint: a sampler, or a loader, which then says what it draws itself, whoever gave it its sampler."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset

from cachefs.torch.sampler import HintedSampler, Told, hint_sampler, warn, warn_of_whole_order

if TYPE_CHECKING:
    from cachefs.hints.places import FileSystem

S = TypeVar("S")


def hinted(
    sampler: S,
    paths: Sequence[str | os.PathLike[str]],
    at: str | os.PathLike[str] | FileSystem | None = None,
    *,
    label: str | None = None,
    twin: Callable[[Any], Iterable[Any]] | None = None,
) -> S:
    """`sampler`, which may be a batch sampler or a loader, with hints.

    paths[i]: what item i of the dataset reads, in a mount or as the file system takes it. A loader is changed and given
    back; do that before its first epoch.

    at: the mount point, the cachefs file system that reads them, or a URL ("s3://bucket") of one with default options;
    None: paths are absolute and in a mount. label: what `cachefs status` calls it [default: the rank]. twin: for a
    sampler of your own, a function that makes of it one that gives the same order and moves nothing of it; without, it
    is asked for a whole epoch at once.
    """
    told = Told(paths, at, label, twin)
    if isinstance(sampler, DataLoader):
        _hint_loader(sampler, told)
        return sampler
    within = _without_hints(sampler)
    warn_of_whole_order(within, "accelerate", "pytorch_lightning", "lightning")
    return hint_sampler(within, told)  # type: ignore[return-value] # it passes for what it wraps


def _hint_loader(loader: Any, told: Told) -> None:
    loader = getattr(loader, "base_dataloader", loader)  # Accelerate's have the real one within
    if isinstance(loader.dataset, IterableDataset):
        warn("no hints: the dataset of the loader has an order of its own. Announce its files: cachefs.hinted(files)")
        return
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    sampler = hint_sampler(_without_hints(getattr(loader, name)), told)
    object.__setattr__(loader, name, sampler)  # DataLoader itself refuses: a loader that is in use would not notice
    if loader._iterator is not None:  # of persistent workers, or made by torchdata to have a state to save
        loader._iterator._index_sampler = sampler
        if getattr(loader, "_initial_iter_for_state_dict", False):
            loader._iterator._sampler_iter = sampler.continuing(loader._iterator._sampler_iter)


def _without_hints(sampler: Any) -> Any:
    """Nothing is announced twice: whoever is outermost knows best what is read."""
    if issubclass(type(sampler), HintedSampler):
        sampler._end()
        return _without_hints(sampler._hinted)
    for name in ("sampler", "batch_sampler"):
        within = getattr(sampler, name, None)
        if within is not None and (bare := _without_hints(within)) is not within:
            setattr(sampler, name, bare)
    return sampler
