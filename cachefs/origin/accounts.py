"""Which Google or Azure is meant: what options and environment say of account and endpoint.

Part of an origin's identity, so readers ask it too; nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def gcs_endpoint(options: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    """ "" = Google's own."""
    endpoint = (
        options.get("endpoint_url")
        or options.get("base_url")
        or environ.get("GOOGLE_BASE_URL")
        or environ.get("STORAGE_EMULATOR_HOST")
        or ""
    )
    return _with_scheme(str(endpoint))


def azure_account(options: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[str, str]:
    """(account name, endpoint); endpoint "" = Azure's own of that account."""
    text = options.get("connection_string") or environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    string = connection_string(str(text or ""))
    account = (
        options.get("account_name") or string.get("AccountName") or environ.get("AZURE_STORAGE_ACCOUNT_NAME") or ""
    )
    host = options.get("account_host")
    endpoint = (
        options.get("endpoint")
        or (f"https://{host}" if host else "")
        or string.get("BlobEndpoint")
        or environ.get("AZURE_STORAGE_ENDPOINT")
        or ""
    )
    return str(account), _with_scheme(str(endpoint))


def _with_scheme(endpoint: str) -> str:
    endpoint = endpoint.rstrip("/")
    return endpoint if not endpoint or "://" in endpoint else f"http://{endpoint}"


def connection_string(text: str) -> dict[str, str]:
    """ "AccountName=a;AccountKey=b==" -> {"AccountName": "a", "AccountKey": "b=="}."""
    pairs = (part.partition("=") for part in text.split(";") if part)
    return {name.strip(): value for name, _, value in pairs}
