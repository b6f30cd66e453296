"""S3's answer to a listing (ListObjectsV2, ListBuckets), read without losing a byte of a name.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html. Names are asked for percent-encoded
(encoding-type=url), because XML cannot hold control characters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import unquote, unquote_plus
from xml.etree import ElementTree  # expat limits entity expansion, the only attack on a reader of XML

from cachefs.messages import Entry
from cachefs.origin.contract import version_of

# The token of a page whose server says that there is more, but not how to ask for it.
FORGOTTEN = "\0"


@dataclass(frozen=True)
class Page:
    """keys and prefixes as in the bucket. token: where the next page begins, "" = this was the last."""

    files: list[Entry]
    prefixes: list[str]
    token: str
    last_key: str


class UnreadablePage(ValueError):
    """Not the XML of a listing."""


def parse_page(body: bytes, bucket: str) -> Page:
    """Raises UnreadablePage."""
    root = _root(body)
    encoded = False
    truncated = False
    token = ""
    contents: list[ElementTree.Element] = []
    common: list[ElementTree.Element] = []
    for child in root:
        tag = _name(child)
        if tag == "Contents":
            contents.append(child)
        elif tag == "CommonPrefixes":
            common.append(child)
        elif tag == "EncodingType":
            encoded = child.text == "url"
        elif tag == "IsTruncated":
            truncated = child.text == "true"
        elif tag == "NextContinuationToken":
            token = child.text or ""
    decode: Callable[[str], str] = _decoded if encoded else str
    files = [_entry(element, bucket, decode) for element in contents]
    prefixes = [decode(part.text or "") for element in common for part in element if _name(part) == "Prefix"]
    last = max([*(entry.path.partition("/")[2] for entry in files[-1:]), *prefixes[-1:]], default="")
    if not truncated:
        return Page(files, prefixes, "", last)
    # A server that forgets the token still goes on after the last name.
    return Page(files, prefixes, token or FORGOTTEN, last)


def parse_buckets(body: bytes) -> list[str]:
    """Raises UnreadablePage."""
    return [
        part.text or ""
        for buckets in _root(body)
        if _name(buckets) == "Buckets"
        for bucket in buckets
        for part in bucket
        if _name(part) == "Name"
    ]


def _root(body: bytes) -> ElementTree.Element:
    try:
        root = ElementTree.fromstring(body)  # noqa: S314 - see the import
    except ElementTree.ParseError as error:
        raise UnreadablePage(str(error)) from error
    if _name(root) not in ("ListBucketResult", "ListAllMyBucketsResult"):
        raise UnreadablePage(f"<{_name(root)}>")
    return root


def _entry(element: ElementTree.Element, bucket: str, decode: Callable[[str], str]) -> Entry:
    key, size, e_tag, mtime = "", 0, "", 0
    for part in element:
        tag, text = _name(part), part.text or ""
        if tag == "Key":
            key = decode(text)
        elif tag == "Size":
            size = int(text)
        elif tag == "ETag":
            e_tag = text.strip()
        elif tag == "LastModified":
            # Whole seconds, as in the header of a read: a version made from the time must be the same in both.
            mtime = int(datetime.fromisoformat(text.strip()).timestamp()) * 1_000_000_000
    return Entry(f"{bucket}/{key}", size, mtime, version_of(e_tag, mtime, size))


def _decoded(text: str) -> str:
    # AWS writes a space as "+"; some servers as "%20". A literal "+" is always "%2B".
    return unquote_plus(text, errors="surrogateescape") if "+" in text else unquote(text, errors="surrogateescape")


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]
