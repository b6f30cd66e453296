"""Where the keys of an S3 user come from, for both clients: obstore asks `provide`, our own requests ask `current`.

Static keys are known from the start. A profile that logs in by itself, or a role, needs botocore (extra `s3`);
without it obstore can still fetch the keys of a role, but keeps them to itself.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from typing import Any

from cachefs.errors import ConfigError
from cachefs.origin.failures import Place, no_credentials
from cachefs.origin.s3_settings import S3Settings
from cachefs.origin.sigv4 import Keys

# botocore renews keys from 15 minutes before they expire, so keys taken from it are good for these 5.
_LEASE = timedelta(minutes=5)

# Variables of roles that obstore can take on, and its names for them.
_ROLE_VARIABLES = {
    "AWS_WEB_IDENTITY_TOKEN_FILE": "web_identity_token_file",
    "AWS_ROLE_ARN": "role_arn",
    "AWS_ROLE_SESSION_NAME": "role_session_name",
    "AWS_ENDPOINT_URL_STS": "sts_endpoint",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "container_credentials_relative_uri",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI": "container_credentials_full_uri",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "container_authorization_token_file",
    "AWS_METADATA_ENDPOINT": "metadata_endpoint",
}
_ROLES = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")


class KeyRing:
    def __init__(self, settings: S3Settings, environ: Mapping[str, str], place: Place) -> None:
        self._settings = settings
        self._environ = environ
        self._place = place
        self._botocore: Any = None
        if settings.profile.dynamic and settings.keys is None and not settings.anon and not self._has_botocore():
            raise ConfigError(
                f"AWS profile {settings.profile.name!r} logs in through SSO, a role or a process, which needs botocore:"
                " install cachefs-sidecar[s3]"
            )

    @property
    def ours(self) -> bool:
        """Whether `current` can give keys: false only for a role that obstore takes on by itself."""
        settings = self._settings
        return settings.anon or settings.keys is not None or (not self._role() and self._has_botocore())

    async def current(self) -> Keys | None:
        """The keys to sign with now; None = do not sign. Raises OriginAccessDenied when there are none."""
        if self._settings.anon or self._settings.keys is not None:
            return self._settings.keys
        return await asyncio.to_thread(self._from_botocore)

    def store_options(self) -> tuple[dict[str, Any], Any]:
        """(configuration, credential provider) for obstore. Raises OriginAccessDenied."""
        if self._settings.anon:
            return {"skip_signature": True}, None
        if self._settings.keys is not None or self._settings.profile.dynamic:
            return {"skip_signature": False}, self.provide
        if os.environ.get("AWS_ACCESS_KEY_ID"):
            # obstore would sign with them, but they belong to whoever started this process, not to this user
            raise no_credentials(self._place, "")
        self._require_instance()
        role = {ours: self._environ[name] for name, ours in _ROLE_VARIABLES.items() if self._environ.get(name)}
        return {"skip_signature": False, **role}, None

    def provide(self) -> dict[str, Any]:
        """obstore's credential callback."""
        static = self._settings.keys
        keys = static or self._from_botocore()
        return {
            "access_key_id": keys.key,
            "secret_access_key": keys.secret,
            "token": keys.token or None,
            "expires_at": None if static else datetime.now(UTC) + _LEASE,
        }

    def _require_instance(self) -> None:
        """Raises OriginAccessDenied where this machine must not be asked for a role."""
        if not self._role() and self._environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
            raise no_credentials(self._place, "")

    def _role(self) -> bool:
        return not self._settings.profile.dynamic and any(self._environ.get(name) for name in _ROLES)

    def _has_botocore(self) -> bool:
        return find_spec("botocore") is not None

    def _from_botocore(self) -> Keys:
        if self._botocore is None:
            from botocore.session import Session

            session = Session(profile=self._settings.profile.name if self._settings.profile.dynamic else None)
            for variable, name in (
                ("AWS_CONFIG_FILE", "config_file"),
                ("AWS_SHARED_CREDENTIALS_FILE", "credentials_file"),
            ):
                if self._environ.get(variable):
                    session.set_config_variable(name, self._environ[variable])
            if not self._settings.profile.dynamic:
                self._require_instance()
                if os.environ.get("AWS_ACCESS_KEY_ID"):
                    raise no_credentials(self._place, "")  # somebody else's, as above
            try:
                self._botocore = session.get_credentials()
            except Exception as error:
                raise no_credentials(self._place, "") from error
            if self._botocore is None:
                raise no_credentials(self._place, "")
        frozen = self._botocore.get_frozen_credentials()
        return Keys(frozen.access_key, frozen.secret_key, frozen.token or "")
