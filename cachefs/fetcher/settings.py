"""The size a cache was given, kept in its home: a fetcher that is started without one must not outgrow it."""

from __future__ import annotations

import json
import os
from pathlib import Path


def _file(home: Path) -> Path:
    return home / "settings.json"


def remembered_size(home: Path) -> int | None:
    """Bytes, or None when the cache was never given a size (or the file is damaged: then the floor bounds it)."""
    try:
        size = json.loads(_file(home).read_bytes())["size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) and size >= 0 else None


def remember_size(home: Path, size: int) -> None:
    """Raises OSError."""
    temporary = _file(home).with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"size": size}))
    os.replace(temporary, _file(home))
