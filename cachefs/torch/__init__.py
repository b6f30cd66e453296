"""Hints from PyTorch: the order that a sampler gives is fetched before the workers ask for it.

    loader = cachefs.torch.hinted(DataLoader(dataset, batch_size=256, shuffle=True), paths)    # or
    sampler = cachefs.torch.hinted(DistributedSampler(dataset), paths)          # paths[i] is what dataset[i] reads

It takes a loader, or any sampler or batch sampler, and changes nothing of what comes out. As an epoch begins, a copy of
the sampler says the whole order of the epoch to the fetcher; what the sampler itself gives is handed out as it is asked
for (`twins`). So random numbers are drawn when they are without hints, an epoch may be left early, and samplers with a
state (torchdata's) keep their place. A sampler that cannot be copied faithfully is asked for the whole epoch at once;
with `twin` whoever wrote it says how to copy it. Where the next epoch follows from a seed, its order is announced in
this one, so that its first batches are there when it begins. The workers take no part: any number,
forked or spawned.

Frameworks that replace samplers: hint the loader. In several processes Lightning puts a DistributedSampler into it and
keeps the hints; for Accelerate hint what `prepare` gives back, which knows what this process reads.

Hints are advice. What goes wrong with them is one warning, and training goes on.
"""

from __future__ import annotations

from cachefs.torch.loaders import hinted
from cachefs.torch.sampler import HintedSampler

__all__ = ["HintedSampler", "hinted"]
