"""What `cachefs status` says of quotas: used, and of how much. The fetcher knows; without one, refs are counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cachefs import datasets
from cachefs.cli.output import printable, table
from cachefs.config import CacheConfig, format_size
from cachefs.tenants import quotas


def charges(config: CacheConfig, fetcher: dict[str, Any] | None) -> dict[str, int | None]:
    """Bytes by id of dataset, of those that a quota bounds; None = not counted yet."""
    if fetcher is not None:
        found: dict[str, int | None] = fetcher.get("quotas", {}).get("datasets", {})
        return found
    of_tenants = quotas(config.home)
    bounded = [r.id for r in datasets.load_all(config.home) if r.quota is not None or r.tenant in of_tenants]
    if not bounded:
        return {}
    from cachefs.store.ledger import count_of

    return {dataset: count_of(config.dirs, dataset) for dataset in bounded}


def tenants(config: CacheConfig, charged: dict[str, int | None]) -> list[dict[str, Any]]:
    """Of each that has a quota or a dataset. used: None without a quota, or while it is counted."""
    of_tenants = quotas(config.home)
    own: dict[str, list[int | None]] = {name: [] for name in of_tenants}
    for record in datasets.load_all(config.home):
        if record.tenant:
            own.setdefault(record.tenant, []).append(charged.get(record.id))
    return [{"name": name, "quota": of_tenants.get(name), "used": _sum(own[name])} for name in sorted(own)]


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def used_of(report: dict[str, Any]) -> str:
    """of what has a quota"""
    used = "counting" if report["used"] is None else format_size(report["used"])
    return f"{used} of a quota of {format_size(report['quota'])}"


def tenant_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """Nothing where nobody has labelled a dataset."""
    if not found:
        return []
    rows = [(printable(t["name"]), "no quota" if t["quota"] is None else used_of(t)) for t in found]
    return ["tenants:", *table(rows)]
