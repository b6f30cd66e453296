"""What a cache knows of its tenants: one small JSON file, written by the fetcher, read by every reader.

A tenant is a label of datasets, and each dataset has at most one (datasets.py). Here is what all datasets of a tenant
may take together.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

_writing = threading.Lock()


def quotas(home: Path) -> dict[str, int]:
    """Bytes by tenant, of those that have a quota."""
    try:
        raw = json.loads(_file(home).read_bytes())
        return {str(name): int(each["quota"]) for name, each in raw.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def set_quota(home: Path, tenant: str, quota: int | None) -> None:
    """None: no quota any more. Only the fetcher calls this. Raises OSError."""
    with _writing:
        now = quotas(home)
        if quota is None:
            now.pop(tenant, None)
        else:
            now[tenant] = quota
        temporary = home / f".tenants.{os.getpid()}"
        temporary.write_text(json.dumps({name: {"quota": each} for name, each in now.items()}))
        os.replace(temporary, _file(home))


def _file(home: Path) -> Path:
    return home / "tenants.json"
