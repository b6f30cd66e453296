"""What one fetcher leaves for the next in the cache's home: the size it was given, and what it counted.

The size: a fetcher that is started without one must not outgrow the cache. The count: written at an orderly end and
taken away at the next start, so that only after a crash the whole store is counted anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


def remembered_size(home: Path) -> int | None:
    """Bytes, or None when the cache was never given a size (or the file is damaged: then the floor bounds it)."""
    return _read(home / "settings.json", "size")


def remember_size(home: Path, size: int) -> None:
    """Raises OSError."""
    _write(home / "settings.json", "size", size)


def take_count(home: Path) -> int | None:
    """Bytes stored as the last fetcher counted them, once; None after a crash."""
    file = home / "run" / "counted.json"
    count = _read(file, "bytes")
    file.unlink(missing_ok=True)
    return count


def leave_count(home: Path, count: int) -> None:
    """Raises OSError."""
    _write(home / "run" / "counted.json", "bytes", count)


def _read(file: Path, name: str) -> int | None:
    try:
        value = json.loads(file.read_bytes())[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, int) and value >= 0 else None


def _write(file: Path, name: str, value: int) -> None:
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({name: value}))
    os.replace(temporary, file)
