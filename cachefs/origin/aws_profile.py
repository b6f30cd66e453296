"""What ~/.aws/config and ~/.aws/credentials say about a profile, without botocore.

Only static keys, region and endpoint are read here. A profile that logs in by itself (SSO, an assumed role, a
credential process) needs botocore, and says so.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cachefs.errors import ConfigError

# Settings with which a profile gets its keys from somewhere else.
_DYNAMIC = (
    "sso_session",
    "sso_start_url",
    "role_arn",
    "credential_process",
    "web_identity_token_file",
    "login_session",
)


@dataclass(frozen=True, repr=False)
class Profile:
    """ "" where the files say nothing. dynamic: its keys come from elsewhere, botocore knows how."""

    name: str
    key: str = ""
    secret: str = ""
    token: str = ""
    region: str = ""
    endpoint: str = ""
    dynamic: bool = False


def load_profile(name: str, environ: Mapping[str, str]) -> Profile:
    """The profile `name` ("" = AWS_PROFILE or "default"), as the user of `environ` has it.

    Raises ConfigError when a profile was named and is in neither file, or a file cannot be understood.
    """
    wanted = name or environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE") or "default"
    home = environ.get("HOME") or os.path.expanduser("~")
    config = _read(environ.get("AWS_CONFIG_FILE") or f"{home}/.aws/config", home)
    credentials = _read(environ.get("AWS_SHARED_CREDENTIALS_FILE") or f"{home}/.aws/credentials", home)
    section = config.get("default" if wanted == "default" else f"profile {wanted}", config.get(f"profile {wanted}"))
    keys = credentials.get(wanted)
    if section is None and keys is None:
        if wanted == "default":
            return Profile(wanted)
        raise ConfigError(f"AWS profile {wanted!r}: in neither ~/.aws/config nor ~/.aws/credentials")
    both = {**(section or {}), **(keys or {})}
    static = bool(both.get("aws_access_key_id") and both.get("aws_secret_access_key"))
    return Profile(
        wanted,
        key=both.get("aws_access_key_id", "") if static else "",
        secret=both.get("aws_secret_access_key", "") if static else "",
        token=both.get("aws_session_token", "") if static else "",
        region=both.get("region", ""),
        endpoint=_endpoint(both, config),
        # botocore asks an assumed role before the static keys of the same profile
        dynamic="role_arn" in both or (not static and any(setting in both for setting in _DYNAMIC)),
    )


def _endpoint(profile: Mapping[str, str], config: Mapping[str, Mapping[str, str]]) -> str:
    """endpoint_url of s3 in the profile's services section, else of the profile."""
    services = config.get(f"services {profile.get('services', '')}", {})
    for source in (services.get("s3", ""), profile.get("s3", "")):
        for line in source.splitlines():
            setting, _, value = line.partition("=")
            if setting.strip() == "endpoint_url":
                return value.strip()
    return profile.get("endpoint_url", "")


def _read(file: str, home: str) -> dict[str, dict[str, str]]:
    path = Path(home + file[1:] if file.startswith("~/") else file)
    parser = configparser.RawConfigParser(default_section="\0", strict=False)
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        # str(error) would quote the line, which may be the secret
        raise ConfigError(f"{path}: cannot be read as an AWS profile file ({type(error).__name__})") from None
    return {section: dict(parser.items(section)) for section in parser.sections()}
