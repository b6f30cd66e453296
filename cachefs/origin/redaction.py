"""Which options and environment variables are secrets, and what is left when they are taken out.

Options come from the file systems of others, under names we do not control, so the rule is by name and errs on the
side of secrecy: what looks like a secret is dropped, wherever it is nested.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

_SECRET = re.compile(
    r"secret|token|passw|passphrase|pwd|credential|sas_|_sas|^sas$|signature$|auth|cookie|headers|connection_string"
    r"|private|pkey|key$|key_id$|_key_|^key_|^username$|^user$|identity_file",
    re.IGNORECASE,
)

# A path to a key is not the key; without it another process could not log in.
_PATH = re.compile(r"(file|filename|path|certs?)$", re.IGNORECASE)

# Values that choose a way to log in and give nothing away (gcsfs's `token`, s3fs's and adlfs's `anon`).
_MODES = frozenset({"anon", "cloud", "google_default", "cache", "browser"})


def secret_name(name: str) -> bool:
    """Whether an option of this name is treated as a secret."""
    return bool(_SECRET.search(name)) and not _PATH.search(name)


def without_secrets(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options less everything that looks like a secret, nested mappings included."""
    kept: dict[str, Any] = {}
    for name, value in options.items():
        mode = value is None or isinstance(value, bool) or (isinstance(value, str) and value in _MODES)
        if secret_name(name) and not mode:
            continue
        if isinstance(value, Mapping):
            kept[name] = without_secrets(value)
        elif isinstance(value, str) and "://" in value:
            kept[name] = plain_url(value)
        else:
            kept[name] = value
    return kept


def plain_url(url: str) -> str:
    """The URL without user, password, query and fragment: fit for a message. Signed URLs carry secrets there."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))
