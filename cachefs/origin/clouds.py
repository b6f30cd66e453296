"""gs:// and az://: options in the words of gcsfs and adlfs or of obstore, turned into a store of obstore.

Names that obstore cannot parse are left to gcsfs or adlfs, where installed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from cachefs.errors import ConfigError
from cachefs.origin.accounts import azure_account, connection_string, gcs_endpoint
from cachefs.origin.contract import Origin
from cachefs.origin.failures import Place, no_credentials
from cachefs.origin.objects import ObjectOrigin
from cachefs.origin.patience import Patience
from cachefs.origin.spec import OriginSpec

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# Options of gcsfs and adlfs that change nothing for reads through obstore.
_IGNORED = frozenset(
    {
        "access",
        "assume_container_exists",
        "asynchronous",
        "block_size",
        "cache_timeout",
        "cache_type",
        "check_connection",
        "consistency",
        "default_cache_type",
        "default_fill_cache",
        "default_location",
        "fill_cache",
        "listings_expiry_time",
        "loop",
        "max_concurrency",
        "max_paths",
        "project",
        "session_kwargs",
        "skip_instance_cache",
        "use_listings_cache",
    }
)

# Variables with which obstore would log in by itself. Whoever started this process is not the user of the options.
_GCS_LEAKS = (
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN",
)
_AZURE_LEAKS = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_TOKEN")


class CloudOrigin(ObjectOrigin):
    """Google or Azure. Subclasses: `configure` reads the options once, `make_store` uses the result."""

    def __init__(self, spec: OriginSpec, where: str) -> None:
        left = {name: value for name, value in spec.options.items() if name not in _IGNORED}
        super().__init__(spec.identity, Place(spec.protocol, where), Patience.take(left))
        self._spec = spec
        self._config = self.configure(left, spec.environ)
        if left:
            raise ConfigError(f"{spec.protocol}: unknown option {sorted(left)[0]!r}")

    def configure(self, left: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
        """obstore's configuration from the options, which lose what is understood. Raises ConfigError."""
        raise NotImplementedError

    def make_deputy(self) -> Origin:
        from cachefs.origin.generic import FsspecOrigin

        return FsspecOrigin(self._spec)

    def client_options(self, endpoint: str, patience: Patience) -> Any:
        return patience.client_options() | {"allow_http": endpoint.startswith("http://")}

    def refuse_leaks(self, variables: tuple[str, ...]) -> None:
        if any(os.environ.get(name) and name not in self._spec.environ for name in variables):
            raise no_credentials(self.place, "")


class GcsOrigin(CloudOrigin):
    def __init__(self, spec: OriginSpec) -> None:
        self._bearer = ""
        self._endpoint = gcs_endpoint(spec.options, spec.environ)
        super().__init__(spec, self._endpoint or "Google Cloud Storage")

    def configure(self, left: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
        for name in ("endpoint_url", "base_url"):
            left.pop(name, None)
        if left.pop("requester_pays", False) or left.pop("version_aware", False):
            raise ConfigError("gs: requester_pays and version_aware are not supported")
        config: dict[str, Any] = {"base_url": self._endpoint} if self._endpoint else {}
        token = left.pop("token", None)
        anon = left.pop("anon", False) or left.pop("skip_signature", False)
        self._bearer = str(left.pop("bearer_token", "") or "")
        named = {
            name: left.pop(name)
            for name in ("service_account", "service_account_key", "application_credentials")
            if name in left
        }
        if token == "anon" or anon:  # noqa: S105 - gcsfs's word for no credentials
            return config | {"skip_signature": True}
        if isinstance(token, Mapping):
            return config | {"service_account_key": json.dumps(dict(token))}
        if isinstance(token, str) and token not in ("google_default", "cloud"):
            if os.path.exists(os.path.expanduser(token)):
                return config | {"application_credentials": os.path.expanduser(token)}
            if token in ("browser", "cache"):
                raise ConfigError(
                    f"gs: token={token!r} needs a person at a browser; give a service account's JSON file"
                )
            self._bearer = token
        elif token is not None and not isinstance(token, str):
            raise ConfigError("gs: token is a path, a mapping, a bearer token, 'anon' or 'google_default'")
        if self._bearer or named:
            return config | named
        return config | _ambient_gcs(environ)

    def make_store(self, bucket: str, patience: Patience) -> ObjectStore:
        from obstore.store import GCSStore

        provider = None
        if self._bearer:
            bearer = self._bearer

            def provider() -> Any:
                return {"token": bearer, "expires_at": None}

        elif not self._config.get("skip_signature"):
            self.refuse_leaks(_GCS_LEAKS)
        return GCSStore(
            bucket,
            config=cast(Any, {"skip_signature": False, **self._config}),
            client_options=self.client_options(self._endpoint, patience),
            retry_config=patience.retry_config(),
            credential_provider=provider,
        )

    def in_key_order(self, path: str) -> bool:
        return True


class AzureOrigin(CloudOrigin):
    def __init__(self, spec: OriginSpec) -> None:
        self._account, self._endpoint = azure_account(spec.options, spec.environ)
        if not self._account:
            raise ConfigError("az: say which account: option account_name, or AZURE_STORAGE_ACCOUNT_NAME")
        super().__init__(spec, self._endpoint or f"Azure account {self._account}")

    def configure(self, left: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
        text = left.pop("connection_string", None) or environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
        string = connection_string(str(text))
        for name in ("account_name", "account_host", "endpoint", "location_mode"):
            left.pop(name, None)
        config: dict[str, Any] = {"account_name": self._account}
        if self._endpoint:
            config["endpoint"] = self._endpoint
        if left.pop("use_emulator", False):
            config["use_emulator"] = True
        anon = left.pop("anon", None)
        if anon is None:
            anon = left.pop("skip_signature", False)
        login = {
            "account_key": left.pop("account_key", None) or string.get("AccountKey"),
            "sas_key": left.pop("sas_token", None) or left.pop("sas_key", None) or string.get("SharedAccessSignature"),
            "token": left.pop("token", None),
            "client_id": left.pop("client_id", None),
            "client_secret": left.pop("client_secret", None),
            "tenant_id": left.pop("tenant_id", None),
        }
        credential = left.pop("credential", None)
        if isinstance(credential, str):
            login["sas_key" if "sig=" in credential else "account_key"] = credential
        elif credential is not None:
            raise ConfigError("az: credential objects stay in their process; give account_key, sas_token or client_*")
        given = {name: str(value) for name, value in login.items() if value}
        if anon in (True, "true", "True", "1"):
            return config | {"skip_signature": True}
        return config | (given or _ambient_azure(environ))

    def make_store(self, bucket: str, patience: Patience) -> ObjectStore:
        from obstore.store import AzureStore

        if not self._config.get("skip_signature"):
            self.refuse_leaks(_AZURE_LEAKS)
        return AzureStore(
            bucket,
            config=cast(Any, {"skip_signature": False, **self._config}),
            client_options=self.client_options(self._endpoint, patience),
            retry_config=patience.retry_config(),
        )


def _ambient_gcs(environ: Mapping[str, str]) -> dict[str, Any]:
    """From the captured environment, then gcloud's own login; {} = this machine's service account."""
    if environ.get("GOOGLE_SKIP_SIGNATURE", "").lower() in ("1", "true"):
        return {"skip_signature": True}
    named = {
        "application_credentials": environ.get("GOOGLE_APPLICATION_CREDENTIALS"),
        "service_account": environ.get("GOOGLE_SERVICE_ACCOUNT") or environ.get("GOOGLE_SERVICE_ACCOUNT_PATH"),
        "service_account_key": environ.get("GOOGLE_SERVICE_ACCOUNT_KEY"),
        "bearer_token": environ.get("GOOGLE_BEARER_TOKEN"),
    }
    found = {name: value for name, value in named.items() if value}
    login = f"{environ.get('HOME', '')}/.config/gcloud/application_default_credentials.json"
    return found or ({"application_credentials": login} if os.path.exists(login) else {})


def _ambient_azure(environ: Mapping[str, str]) -> dict[str, Any]:
    names = {
        "account_key": ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY"),
        "sas_key": ("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY"),
        "token": ("AZURE_STORAGE_TOKEN",),
        "client_id": ("AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID"),
        "client_secret": ("AZURE_STORAGE_CLIENT_SECRET", "AZURE_CLIENT_SECRET"),
        "tenant_id": ("AZURE_STORAGE_TENANT_ID", "AZURE_TENANT_ID"),
        "federated_token_file": ("AZURE_FEDERATED_TOKEN_FILE",),
        "use_azure_cli": ("AZURE_USE_AZURE_CLI",),
    }
    found: dict[str, Any] = {}
    for ours, spellings in names.items():
        value = next((environ[name] for name in spellings if environ.get(name)), None)
        if value:
            found[ours] = value
    return found
