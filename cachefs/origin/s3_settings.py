"""What an S3 user said, in s3fs's words or in obstore's, in the environment or in a profile: one set of settings.

Where two say something, the order is that of the AWS tools: options, environment, profile. Credentials come as a
pair from one place and are never mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachefs.errors import ConfigError
from cachefs.origin.aws_profile import Profile, load_profile
from cachefs.origin.patience import Patience
from cachefs.origin.sigv4 import Keys

# Spellings of one option: s3fs's, botocore's (client_kwargs), object_store's.
_NAMES = {
    "key": ("key", "username", "access_key_id", "aws_access_key_id"),
    "secret": ("secret", "password", "secret_access_key", "aws_secret_access_key"),
    "token": ("token", "session_token", "aws_session_token", "aws_token"),
    "anon": ("anon", "skip_signature", "aws_skip_signature"),
    "endpoint": (
        "endpoint_url",
        "endpoint",
        "aws_endpoint",
        "aws_endpoint_url",
        "aws_endpoint_url_s3",
    ),
    "region": ("region_name", "region", "aws_region", "default_region", "aws_default_region"),
    "profile": ("profile", "profile_name"),
    "payer": ("requester_pays", "request_payer", "aws_request_payer"),
    "verify": ("verify",),
    "virtual": ("virtual_hosted_style_request", "aws_virtual_hosted_style_request"),
}
_CANONICAL = {spelling: name for name, spellings in _NAMES.items() for spelling in spellings}

# Options of s3fs that change nothing here: how it buffers, lists and connects, and whether it speaks TLS, which the
# endpoint's URL says.
_IGNORED = frozenset(
    {
        "allow_http",
        "asynchronous",
        "cache_regions",
        "default_block_size",
        "default_cache_type",
        "default_fill_cache",
        "fixed_upload_size",
        "listings_expiry_time",
        "loop",
        "max_concurrency",
        "max_paths",
        "max_pool_connections",
        "skip_instance_cache",
        "use_listings_cache",
        "use_ssl",
    }
)
_CONFIG_IGNORED = frozenset(
    {"max_pool_connections", "retries", "signature_version", "tcp_keepalive", "user_agent_extra"}
)

_DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True, repr=False)
class S3Settings:
    """endpoint: "" = AWS. region: "" = not said. keys: None with anon=False: a role, or the profile by botocore."""

    endpoint: str
    region: str
    keys: Keys | None
    anon: bool
    virtual: bool
    requester_pays: bool
    verify: bool | str
    patience: Patience
    profile: Profile

    @classmethod
    def make(cls, options: Mapping[str, Any], environ: Mapping[str, str]) -> S3Settings:
        """Raises ConfigError for options that are unknown or contradict each other."""
        left = dict(options)
        given = _flatten(left)
        patience = Patience.take(left)
        if left:
            raise ConfigError(f"s3: unknown option {sorted(left)[0]!r}; known are s3fs's and obstore's")
        profile = load_profile(str(given.get("profile") or ""), environ)
        return cls(
            endpoint=_endpoint(given, environ, profile),
            region=str(
                given.get("region")
                or environ.get("AWS_REGION")
                or environ.get("AWS_DEFAULT_REGION")
                or profile.region
                or (_DEFAULT_REGION if _endpoint(given, environ, profile) else "")
            ),
            keys=None if given.get("anon") else _keys(given, environ, profile),
            anon=bool(given.get("anon", False)),
            virtual=bool(given.get("virtual", False)),
            requester_pays=bool(given.get("payer", False)),
            verify=_verify(given, environ),
            patience=patience,
            profile=profile,
        )

    @staticmethod
    def endpoint_of(options: Mapping[str, Any], environ: Mapping[str, str]) -> str:
        """Only where: for the identity. "" = AWS itself."""
        given = _flatten(dict(options))
        return _endpoint(given, environ, load_profile(str(given.get("profile") or ""), environ))

    def client_options(self) -> dict[str, Any]:
        """For obstore. Everything is said, so that nothing is taken from the environment of this process."""
        result = self.patience.client_options() | {
            "allow_http": self.endpoint.lower().startswith("http://"),
            "allow_invalid_certificates": self.verify is False,
        }
        if isinstance(self.verify, str):
            try:
                result["root_certificate"] = Path(self.verify).read_bytes()
            except OSError as error:
                raise ConfigError(f"verify={self.verify!r}: cannot be read ({error.strerror})") from error
        return result


def _flatten(left: dict[str, Any]) -> dict[str, Any]:
    """Moves what is known out of `left`, client_kwargs and config_kwargs included, under one name each."""
    client, config = left.pop("client_kwargs", None) or {}, left.pop("config_kwargs", None) or {}
    given: dict[str, Any] = {}
    # Outer options win: s3fs lets endpoint_url override client_kwargs.
    for source, prefix in ((_config(config, left), "config_kwargs"), (client, "client_kwargs"), (dict(left), "")):
        for name, value in source.items():
            canonical = _CANONICAL.get(name)
            if canonical is not None:
                if value is not None:
                    given[canonical] = _flag(name, value) if canonical in ("anon", "payer", "virtual") else value
            elif prefix and name not in _IGNORED:
                raise ConfigError(f"s3: unknown option {prefix}[{name!r}]")
    for name in list(left):
        if name in _CANONICAL or name in _IGNORED:
            del left[name]
    if left.pop("allow_invalid_certificates", False):
        given["verify"] = False
    if left.pop("version_aware", False):
        raise ConfigError("s3: version_aware is not supported: cachefs pins versions by ETag itself")
    extra = dict(left.pop("s3_additional_kwargs", None) or {})
    if extra.pop("RequestPayer", None):
        given["payer"] = True
    if extra:
        raise ConfigError(f"s3: s3_additional_kwargs[{sorted(extra)[0]!r}] is not supported for reads")
    return given


def _config(config: Mapping[str, Any], left: dict[str, Any]) -> dict[str, Any]:
    """botocore's Config: its timeouts become ours, its addressing style the `virtual` option."""
    result = dict(config)
    style = dict(result.pop("s3", None) or {}).get("addressing_style")
    if style not in (None, "auto", "path", "virtual"):
        raise ConfigError(f"s3: addressing_style {style!r}: choose path or virtual")
    for name in ("connect_timeout", "read_timeout"):
        if name in result:
            left.setdefault(name, result.pop(name))
    known = {name: value for name, value in result.items() if name not in _CONFIG_IGNORED}
    return known | ({"virtual_hosted_style_request": True} if style == "virtual" else {})


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in ("1", "true", "yes", "on", "requester"):
        return True
    if text in ("0", "false", "no", "off", ""):
        return False
    raise ConfigError(f"s3: {name}={value!r}: say true or false")


def _endpoint(given: Mapping[str, Any], environ: Mapping[str, str], profile: Profile) -> str:
    endpoint = str(
        given.get("endpoint")
        or environ.get("AWS_ENDPOINT_URL_S3")
        or environ.get("AWS_ENDPOINT_URL")
        or environ.get("AWS_ENDPOINT")
        or profile.endpoint
    ).rstrip("/")
    if endpoint and not endpoint.lower().startswith(("http://", "https://")):
        raise ConfigError(f"s3: endpoint_url {endpoint!r}: begin it with http:// or https://")
    return endpoint


def _keys(given: Mapping[str, Any], environ: Mapping[str, str], profile: Profile) -> Keys | None:
    if given.get("key") or given.get("secret"):
        if not (given.get("key") and given.get("secret")):
            raise ConfigError("s3: options key and secret belong together; only one is given")
        return Keys(str(given["key"]), str(given["secret"]), str(given.get("token") or ""))
    if given.get("profile"):  # a profile that was named goes before the environment, as in the AWS tools
        return None if profile.dynamic or not profile.key else Keys(profile.key, profile.secret, profile.token)
    key, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
    if key and secret:
        return Keys(key, secret, environ.get("AWS_SESSION_TOKEN", ""))
    if profile.dynamic or not profile.key:
        return None
    return Keys(profile.key, profile.secret, profile.token)


def _verify(given: Mapping[str, Any], environ: Mapping[str, str]) -> bool | str:
    value = given.get("verify", environ.get("AWS_CA_BUNDLE") or True)
    if isinstance(value, str):
        lowered = value.lower()
        return lowered == "true" if lowered in ("true", "false") else value
    return bool(value)
