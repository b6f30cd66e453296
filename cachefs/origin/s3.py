"""s3://: objects through obstore, names through our own listing.

Ordinary reads cost a tenth with obstore of what they cost any other way in Python; what obstore cannot do is left to
S3Plain, decided per name, or once per origin for a server that does not answer ranges as obstore wants.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, cast

from cachefs.errors import ObjectNotFound, OriginError, UnsupportedOrigin
from cachefs.messages import Entry
from cachefs.origin.failures import Place
from cachefs.origin.objects import ObjectOrigin, RangeIgnored
from cachefs.origin.patience import Patience
from cachefs.origin.s3_keys import KeyRing
from cachefs.origin.s3_plain import S3Plain
from cachefs.origin.s3_settings import S3Settings
from cachefs.origin.spec import OriginSpec

if TYPE_CHECKING:
    from obstore.store import ObjectStore


class S3Origin(ObjectOrigin):
    def __init__(self, spec: OriginSpec) -> None:
        settings = S3Settings.make(spec.options, spec.environ)
        place = Place("s3", settings.endpoint or "AWS S3")
        super().__init__(spec.identity, place, settings.patience)
        self._settings = settings
        self._ring = KeyRing(settings, spec.environ, place)
        self._plain = S3Plain(spec.identity, place, settings, self._ring)
        self._regions: dict[str, str] = {}
        # rclone answers ranges with status 200 and Content-Range, which obstore refuses.
        self._ranges_ignored = False

    def make_store(self, bucket: str, patience: Patience) -> ObjectStore:
        from obstore.store import S3Store

        region = self._regions[bucket]
        endpoint = self._plain.endpoint(region)
        if self._settings.virtual:
            scheme, _, rest = endpoint.partition("://")
            endpoint = f"{scheme}://{bucket}.{rest}"
        config, provider = self._ring.store_options()
        return S3Store(
            bucket,
            config=cast(
                Any,
                {
                    **config,
                    "region": region,
                    # Both, because obstore prefers the second from the environment to the first from here.
                    "endpoint": endpoint,
                    "aws_endpoint_url_s3": endpoint,
                    "virtual_hosted_style_request": self._settings.virtual,
                    "request_payer": self._settings.requester_pays,
                },
            ),
            client_options=cast(Any, self._settings.client_options() | patience.client_options()),
            retry_config=patience.retry_config(),
            credential_provider=provider,
        )

    def make_deputy(self) -> S3Plain:
        if not self._ring.ours:
            raise UnsupportedOrigin(
                "s3://: objects with names like a//b, ../x or with control characters need botocore beside this"
                " machine's role: install cachefs-sidecar[s3]"
            )
        return self._plain

    async def head(self, path: str) -> Entry:
        try:
            return await super().head(path)
        except OriginError as error:
            if type(error) is OriginError and self._ring.ours:
                # An answer to HEAD has no body, so a status like 400 says nothing; a listing's answer has the code.
                await self._plain.check(path)
            raise

    async def get_range(self, path: str, start: int, stop: int, *, version: str) -> bytes:
        if not self._ranges_ignored:
            try:
                return await super().get_range(path, start, stop, version=version)
            except RangeIgnored:
                self._ranges_ignored = True
        return await self._fallback().get_range(path, start, stop, version=version)

    async def list_level(self, path: str) -> AsyncIterator[list[Entry]]:
        async for page in self._plain.list_level(path) if self._ring.ours else super().list_level(path):
            yield page

    async def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]:
        own = self._ring.ours
        async for page in self._plain.list_all(path, after=after) if own else super().list_all(path, after=after):
            yield page

    def in_key_order(self, path: str) -> bool:
        return self._plain.in_key_order(path)

    async def check(self, path: str = "") -> None:
        await (self._plain.check(path) if self._ring.ours else super().check(path))

    async def aclose(self) -> None:
        await super().aclose()
        await self._plain.aclose()

    async def _locate(self, path: str) -> tuple[str, str]:
        bucket, key = await super()._locate(path)
        if bucket not in self._regions:
            self._regions[bucket] = await self._plain.region(bucket)
        return bucket, key

    async def _directory(self, path: str, missing: ObjectNotFound | None = None) -> Entry:
        return await (self._plain.directory(path, missing) if self._ring.ours else super()._directory(path, missing))
