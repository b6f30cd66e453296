"""AWS Signature Version 4 for reads: the one thing that lets us speak S3 about names that obstore refuses.

https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit

_EMPTY_BODY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, repr=False)
class Keys:
    key: str
    secret: str
    token: str = ""


def encode_path(key: str) -> str:
    """An object key as the path of a URL, every byte but the unreserved ones and "/" percent-encoded."""
    return quote(key.encode("utf-8", "surrogateescape"), safe="/~-._")


def encode_query(query: Mapping[str, str]) -> str:
    """Sorted and encoded as the signature wants it."""
    pairs = ((_strict(name), _strict(value)) for name, value in query.items())
    return "&".join(f"{name}={value}" for name, value in sorted(pairs))


def _strict(text: str) -> str:
    return quote(text.encode("utf-8", "surrogateescape"), safe="~-._")


def signed_headers(
    method: str, url: str, headers: Mapping[str, str], *, keys: Keys, region: str, now: datetime | None = None
) -> dict[str, str]:
    """`headers` with what signs a request without a body. The URL's path and query must be encoded already."""
    parts = urlsplit(url)
    moment = (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
    result = dict(headers) | {"x-amz-date": moment, "x-amz-content-sha256": _EMPTY_BODY}
    if keys.token:
        result["x-amz-security-token"] = keys.token
    signing = {name.lower(): " ".join(value.split()) for name, value in result.items()} | {"host": parts.netloc}
    names = ";".join(sorted(signing))
    lines = [f"{name}:{signing[name]}" for name in sorted(signing)]
    canonical = "\n".join([method, parts.path or "/", parts.query, *lines, "", names, _EMPTY_BODY])
    scope = f"{moment[:8]}/{region}/s3/aws4_request"
    text = "\n".join(("AWS4-HMAC-SHA256", moment, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    secret = f"AWS4{keys.secret}".encode()
    for part in scope.split("/"):
        secret = hmac.digest(secret, part.encode(), "sha256")
    signature = hmac.digest(secret, text.encode(), "sha256").hex()
    signer = f"Credential={keys.key}/{scope}, SignedHeaders={names}, Signature={signature}"
    result["Authorization"] = f"AWS4-HMAC-SHA256 {signer}"
    return result
