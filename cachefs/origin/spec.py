"""Which origin, and who asks: everything the fetcher needs to open it, captured in the reader's process.

The fetcher may have been started by somebody else, hours ago, with another environment. So a reader captures the
variables that hold its credentials together with the options it was given, and those are what counts. Cheap: a
training process makes one of these per file system, so nothing heavy is imported here.
"""

from __future__ import annotations

import base64
import difflib
import json
import os
import secrets
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any
from urllib.parse import unquote, urlsplit

from cachefs.errors import UnsupportedOrigin
from cachefs.origin.accounts import azure_account, gcs_endpoint
from cachefs.origin.redaction import without_secrets

# Spellings of one kind of storage. What is cached under one of them is found under the others.
ALIASES = {
    "s3a": "s3",
    "gcs": "gs",
    "abfs": "az",
    "abfss": "az",
    "adl": "az",
    "azure": "az",
    "local": "file",
    "ssh": "sftp",
}

# Protocols served by a client of ours; every other one goes through its fsspec file system.
NATIVE = frozenset({"s3", "gs", "az", "http", "https", "file"})

# Environment variables that say who somebody is, by the beginning of their names.
_VARIABLES = {
    "s3": ("AWS_",),
    "gs": ("GOOGLE_", "GCLOUD_", "CLOUDSDK_", "STORAGE_EMULATOR_HOST"),
    "az": ("AZURE_",),
}
_ALL_VARIABLES = tuple(prefix for prefixes in _VARIABLES.values() for prefix in prefixes)

# Variables that say where, not who: they stay when the secrets are taken out, else the identity would change.
_HARMLESS = frozenset(
    {
        "HOME",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_PROFILE",
        "AWS_CONFIG_FILE",
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_CA_BUNDLE",
        "GOOGLE_BASE_URL",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "STORAGE_EMULATOR_HOST",
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ENDPOINT",
    }
)

# Fingerprints compare credentials within one process and mean nothing outside it.
_FINGERPRINT_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, repr=False)
class OriginSpec:
    """An origin and the credentials for it.

    protocol: a key of fsspec's registry, aliases resolved ("s3", "gs", "az", "http", "https", "file", "memory",
    ...). options: as for that protocol's fsspec file system (or obstore's store). environ: captured variables.
    """

    protocol: str
    options: Mapping[str, Any]
    environ: Mapping[str, str]

    def __repr__(self) -> str:
        return f"OriginSpec({self.protocol!r}, options={sorted(self.options)}, environ={sorted(self.environ)})"

    @classmethod
    def capture(cls, protocol: str, options: Mapping[str, Any] | None = None) -> OriginSpec:
        """With this process's credentials variables, and fsspec's configured defaults for the protocol.

        Raises UnsupportedOrigin for a protocol nobody knows.
        """
        from fsspec.config import conf

        name = ALIASES.get(protocol, protocol)
        require_known(name)
        configured = conf.get(protocol, conf.get(name, {}))
        merged = {**(configured if isinstance(configured, Mapping) else {}), **(options or {})}
        nested = merged.get(protocol, merged.get(name))
        if isinstance(nested, Mapping):  # fsspec's way of many protocols in one call: s3={...}
            merged = {k: v for k, v in merged.items() if k not in (protocol, name)} | dict(nested)
        return cls(name, merged, _capture_environment(name))

    @cached_property
    def identity(self) -> str:
        """Names the origin, not who asks: equal for two users of one endpoint. No secrets.

        Raises ConfigError for options that cannot be understood.
        """
        if self.protocol == "s3":
            from cachefs.origin.s3_settings import S3Settings

            endpoint = S3Settings.endpoint_of(self.options, self.environ)
            return f"s3 {_canonical(endpoint)}" if endpoint else "s3"
        if self.protocol == "gs":
            endpoint = gcs_endpoint(self.options, self.environ)
            return f"gs {_canonical(endpoint)}" if endpoint else "gs"
        if self.protocol == "az":
            account, endpoint = azure_account(self.options, self.environ)
            return f"az {account} {_canonical(endpoint)}".strip() if endpoint else f"az {account}"
        if self.protocol in ("http", "https"):
            return "http"  # the object path is the whole URL, host included
        if self.protocol == "file":
            return "file"
        shown = _describable(without_secrets(self.options))
        return f"{self.protocol} {json.dumps(shown, sort_keys=True)}" if shown else self.protocol

    def redacted(self) -> OriginSpec:
        """The same identity without secrets: what a pickle may carry."""
        options = without_secrets(self.options)
        if self.protocol == "az":
            account, endpoint = azure_account(self.options, self.environ)
            options |= {"account_name": account} | ({"endpoint": endpoint} if endpoint else {})
        environ = {name: value for name, value in self.environ.items() if name in _HARMLESS}
        return OriginSpec(self.protocol, options, environ)

    def fingerprint(self) -> str:
        """32 hex characters that differ when the options or credentials differ. Only comparable in this process."""
        data = json.dumps(
            [self.protocol, self.options, self.environ], sort_keys=True, default=lambda value: repr(value)
        )
        return blake2b(data.encode("utf-8", "surrogateescape"), digest_size=16, key=_FINGERPRINT_KEY).hexdigest()


def parse_origin(url: str, options: Mapping[str, Any] | None = None) -> tuple[OriginSpec, str]:
    """The origin of a URL or local path, and the object path in it (no trailing slash).

    "s3://b/p/" -> "b/p"; "/data/x" and "file:///data/x" -> "/data/x"; "https://h/x" -> "https://h/x"; chained URLs
    as in fsspec. Raises UnsupportedOrigin for a scheme that cannot be reached and says what to install.
    """
    options = dict(options or {})
    if "::" in url:
        return _parse_chain(url, options)
    scheme, separator, rest = url.partition("://")
    if not separator:
        return OriginSpec.capture("file", options), os.path.abspath(os.path.expanduser(url))
    protocol = ALIASES.get(scheme.lower(), scheme.lower())
    if protocol in ("s3", "gs"):
        return OriginSpec.capture(protocol, options), rest.strip("/")
    if protocol == "az":
        container, at, location = rest.partition("@")
        if at and "/" not in container:  # abfs://container@account.dfs.core.windows.net/path
            host, _, path = location.partition("/")
            options.setdefault("account_name", host.partition(".")[0])
            rest = f"{container}/{path}"
        return OriginSpec.capture(protocol, options), rest.strip("/")
    if protocol == "file":
        return OriginSpec.capture("file", options), os.path.abspath(os.path.expanduser(rest or "/"))
    if protocol in ("http", "https"):
        return _parse_http(protocol, rest, options)
    return _parse_other(protocol, url, options)


def forget_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Drop the credentials variables of this process. The fetcher does this first of all.

    obstore fills what its caller leaves open from the environment of its process (measured: a session token of the
    environment is sent along with an explicit key). Whoever started the fetcher must not lend others credentials.
    """
    for name in [name for name in environ if name.startswith(_ALL_VARIABLES)]:
        del environ[name]


def require_known(protocol: str) -> None:
    """Raises UnsupportedOrigin unless fsspec knows the protocol."""
    if protocol in NATIVE:
        return
    from fsspec.registry import available_protocols

    known = set(available_protocols()) | set(ALIASES)
    if protocol in known and protocol != "cachefs":
        return
    if protocol == "cachefs":
        raise UnsupportedOrigin("cachefs:// is a cache, not an origin: name the storage behind it, as in s3://bucket")
    close = difflib.get_close_matches(protocol, sorted(known), n=1)
    hint = f"did you mean {close[0]}://?" if close else "install the fsspec file system that serves it"
    raise UnsupportedOrigin(
        f"{protocol}://: no such kind of storage is known here; {hint} (built in: s3, gs, az, http, https, file)"
    )


def _parse_http(protocol: str, rest: str, options: dict[str, Any]) -> tuple[OriginSpec, str]:
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if at:  # object paths are logged, so a password must not stay in one
        credentials = base64.b64encode(unquote(user).encode()).decode()
        headers = {"Authorization": f"Basic {credentials}", **options.get("headers", {})}
        options["headers"] = headers
    if not urlsplit(f"{protocol}://{host}").hostname:
        raise UnsupportedOrigin(f"{protocol}://{rest}: the URL has no host")
    return OriginSpec.capture(protocol, options), f"{protocol}://{host}{slash}{path}".rstrip("/")


def _parse_other(protocol: str, url: str, options: dict[str, Any]) -> tuple[OriginSpec, str]:
    kind = filesystem_class(protocol)
    from_url = {k: v for k, v in kind._get_kwargs_from_urls(url).items() if k != "path"}
    path = str(kind._strip_protocol(url))
    return OriginSpec.capture(protocol, {**from_url, **options}), path.rstrip("/") or path[:1]


def _parse_chain(url: str, options: dict[str, Any]) -> tuple[OriginSpec, str]:
    """fsspec's reading of "zip://member::s3://bucket/x.zip", without making the file systems."""
    from fsspec.core import _un_chain

    for part in url.split("::"):
        require_known(ALIASES.get(part.partition("://")[0], part.partition("://")[0]))
    try:
        chain = _un_chain(url, options)
    except ImportError as error:
        raise UnsupportedOrigin(f"{url.partition('://')[0]}://: {error}") from error
    nested: dict[str, Any] = {}
    for inner, protocol, own in reversed(chain[1:]):
        nested = {"target_options": {**own, **nested}, "target_protocol": protocol, "fo": inner}
    path, protocol, own = chain[0]
    spec = OriginSpec.capture(protocol, {**own, **nested})
    return spec, str(path).rstrip("/")


def filesystem_class(protocol: str) -> Any:
    """The fsspec class of the protocol. Raises UnsupportedOrigin that names the package to install."""
    from fsspec import get_filesystem_class

    require_known(protocol)
    try:
        return get_filesystem_class(protocol)
    except ImportError as error:  # fsspec's text says what to install, as in "Install s3fs to access S3"
        raise UnsupportedOrigin(f"{protocol}://: a package is missing here: {error}") from error


def _capture_environment(protocol: str) -> dict[str, str]:
    # A chain or a file system of others may reach any of them.
    prefixes = _VARIABLES.get(protocol, () if protocol in NATIVE else _ALL_VARIABLES)
    if not prefixes:
        return {}
    wanted = (*prefixes, "HOME")  # profile files are found from the reader's home
    return {name: value for name, value in os.environ.items() if name.startswith(wanted[:-1]) or name == "HOME"}


def _canonical(endpoint: str) -> str:
    """One spelling for equal endpoints: no user, no trailing slash, host in lower case, no default port."""
    parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
    host = (parts.hostname or "").lower()
    port = parts.port
    if port is not None and (parts.scheme, port) not in (("http", 80), ("https", 443)):
        host = f"{host}:{port}"
    return f"{parts.scheme.lower()}://{host}{parts.path.rstrip('/')}"


# Options that change how an origin is reached, not which one it is.
_BEHAVIOUR = frozenset(
    {
        "retry_timeout",
        "connect_timeout",
        "read_timeout",
        "timeout",
        "asynchronous",
        "loop",
        "skip_instance_cache",
        "use_listings_cache",
        "listings_expiry_time",
        "max_paths",
        "anon",
        "mode",
    }
)


def _describable(options: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in options.items():
        if name in _BEHAVIOUR:
            continue
        if isinstance(value, Mapping):
            value = _describable(value)
        elif not isinstance(value, (str, int, float, bool, type(None))):
            value = type(value).__name__
        shown[name] = value
    return shown
