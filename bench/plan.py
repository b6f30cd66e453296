"""How much a run does. Smaller ones are quicker and coarser; what is measured, and how, stays the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """files: read by the scenarios about images; cold_files: of these, at once and cold. names: of the large dataset.
    found: names that `find` looks for, each of them also a native file.

    rounds: how often each contender has its turn. kills: of processes, one in 60 ms.
    """

    files: int = 4000
    names: int = 1_000_000
    found: int = 200_000
    rounds: int = 9
    cold_rounds: int = 5
    mount_rounds: int = 5
    hint_rounds: int = 3
    kills: int = 1000


QUICK = Plan(
    files=1000, names=100_000, found=20_000, rounds=5, cold_rounds=3, mount_rounds=3, hint_rounds=1, kills=100
)
