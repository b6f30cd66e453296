"""What this room must know of mounts, which live in a higher one: asked through whoever registered.

`cachefs_sidecar.cli` registers its mounts here; without it (the library alone) there are none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from cachefs.mountpoints import Mount


class Mounts(Protocol):
    """All methods raise MountError."""

    def all(self) -> list[Mount]: ...

    def at(self, mountpoint: str) -> Mount | None:
        """The mount of exactly that mount point."""
        ...

    def details(self, mount: Mount) -> dict[str, Any]:
        """How it is: "workers" (a list of pid, restarts, answers), "counts" (name -> number), "catalog", "io" (mode)
        and "io_why"."""
        ...

    def refresh(self, mount: Mount, catalog: Path) -> int:
        """Serve another catalog; the number of names that changed."""
        ...


class _NoMounts:
    def all(self) -> list[Mount]:
        return []

    def at(self, mountpoint: str) -> Mount | None:
        return None

    def details(self, mount: Mount) -> dict[str, Any]:
        return {}

    def refresh(self, mount: Mount, catalog: Path) -> int:
        return 0


_registered: list[Mounts] = []


def register(mounts: Mounts) -> None:
    _registered[:] = [mounts]


def mounts() -> Mounts:
    return _registered[0] if _registered else _NoMounts()
