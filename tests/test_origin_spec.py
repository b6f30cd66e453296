"""Which origin a URL and its options mean, what of that is secret, and where S3 credentials come from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cachefs.errors import CacheFSError, ConfigError, UnsupportedOrigin
from cachefs.origin import OriginSpec, forget_environment, open_origin, parse_origin
from cachefs.origin.redaction import plain_url, without_secrets
from cachefs.origin.s3_settings import S3Settings
from cachefs.origin.sigv4 import Keys

SECRETS = ("KEYID4711", "SECRET4711", "TOKEN4711")
S3_USER = {"key": "KEYID4711", "secret": "SECRET4711", "token": "TOKEN4711"}


# --- URLs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "protocol", "path"),
    [
        ("s3://b/p/", "s3", "b/p"),
        ("s3a://b", "s3", "b"),
        ("s3://b/a?b#c d", "s3", "b/a?b#c d"),
        ("s3://", "s3", ""),
        ("gs://b/x", "gs", "b/x"),
        ("gcs://b/x", "gs", "b/x"),
        ("az://c/x", "az", "c/x"),
        ("/data/x", "file", "/data/x"),
        ("/data/./x/", "file", "/data/x"),
        ("file:///data/x", "file", "/data/x"),
        ("https://h:8443/d/x.jpg?sig=1", "https", "https://h:8443/d/x.jpg?sig=1"),
        ("http://h/d/", "http", "http://h/d"),
        ("memory://a/b", "memory", "/a/b"),
    ],
)
def test_a_url_is_an_origin_and_a_path(url: str, protocol: str, path: str) -> None:
    spec, found = parse_origin(url, {})
    assert (spec.protocol, found) == (protocol, path)


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_origin("data/x", {})[1] == str(tmp_path / "data/x")


def test_azure_account_in_the_url() -> None:
    spec, path = parse_origin("abfss://train@lake.dfs.core.windows.net/imagenet/a", {})
    assert path == "train/imagenet/a"
    assert spec.identity == "az lake"


def test_a_password_in_an_http_url_never_becomes_a_path() -> None:
    spec, path = parse_origin("https://user:SECRET4711@h/d/x", {})
    assert path == "https://h/d/x"
    assert spec.options["headers"]["Authorization"].startswith("Basic ")
    assert "SECRET4711" not in repr(spec) + json.dumps(dict(spec.redacted().options))


def test_chained_url_as_in_fsspec() -> None:
    spec, path = parse_origin("zip://a/b.jpg::s3://bucket/x.zip", {"s3": {"endpoint_url": "http://e", **S3_USER}})
    assert (spec.protocol, path) == ("zip", "a/b.jpg")
    assert spec.options["fo"] == "bucket/x.zip"
    assert spec.options["target_protocol"] == "s3"
    assert spec.options["target_options"]["secret"] == "SECRET4711"
    assert not any(secret in spec.identity for secret in SECRETS)
    assert "bucket/x.zip" in spec.identity
    assert "http://e" in spec.identity


@pytest.mark.parametrize("url", ["s4://b", "zip://a::s4://b/x.zip", "hdsf://h/x"])
def test_unknown_scheme_is_named(url: str) -> None:
    with pytest.raises(UnsupportedOrigin, match=r"(s4|hdsf)://"):
        parse_origin(url, {})


def test_a_cache_is_no_origin() -> None:
    with pytest.raises(UnsupportedOrigin, match="not an origin"):
        parse_origin("cachefs://b", {})


def test_a_known_scheme_without_its_package_says_what_to_install() -> None:
    from importlib.util import find_spec

    if find_spec("smbprotocol"):
        pytest.skip("smbprotocol is installed here")
    with pytest.raises(UnsupportedOrigin, match=r"smb://.*smbprotocol"):
        parse_origin("smb://host/share/x", {})


def test_options_nested_under_the_protocol_are_its_options() -> None:
    assert parse_origin("s3://b", {"s3": {"anon": True}})[0].options == {"anon": True}


# --- identity and secrets -------------------------------------------------------------------------------------


def spec_of(protocol: str, options: dict[str, Any], environ: dict[str, str] | None = None) -> OriginSpec:
    return OriginSpec(protocol, options, {"HOME": "/nonexistent", **(environ or {})})


def test_identity_names_the_endpoint_and_not_the_user() -> None:
    first = spec_of("s3", {"endpoint_url": "http://h:9000/", **S3_USER})
    second = spec_of("s3", {"client_kwargs": {"endpoint_url": "HTTP://H:9000"}, "anon": True})
    from_environment = spec_of("s3", {}, {"AWS_ENDPOINT_URL": "http://other", "AWS_ENDPOINT_URL_S3": "http://h:9000"})
    assert first.identity == second.identity == from_environment.identity == "s3 http://h:9000"
    assert first.identity != spec_of("s3", {"endpoint_url": "http://h:9001"}).identity
    assert spec_of("s3", {}).identity == "s3"


def test_identity_of_file_systems_of_others_has_their_address() -> None:
    first = spec_of("sftp", {"host": "h", "username": "u", "password": "SECRET4711"})
    assert first.identity == spec_of("sftp", {"host": "h", "username": "v", "timeout": 3}).identity
    assert first.identity != spec_of("sftp", {"host": "other"}).identity
    assert "SECRET4711" not in first.identity


@pytest.mark.parametrize(
    "spec",
    [
        spec_of("s3", {**S3_USER, "client_kwargs": {"endpoint_url": "http://h", "aws_session_token": "TOKEN4711"}}),
        spec_of("s3", {}, {"AWS_SECRET_ACCESS_KEY": "SECRET4711", "AWS_ENDPOINT_URL": "http://h", "AWS_REGION": "r"}),
        spec_of("gs", {"token": "TOKEN4711"}),
        spec_of("gs", {"token": {"private_key": "SECRET4711"}}),
        spec_of("az", {"connection_string": "AccountName=lake;AccountKey=SECRET4711;BlobEndpoint=http://h/lake"}),
        spec_of("az", {"account_name": "lake", "account_key": "SECRET4711"}),
        spec_of("https", {"headers": {"Authorization": "Bearer TOKEN4711"}}),
        spec_of("zip", {"fo": "b/x.zip", "target_protocol": "s3", "target_options": S3_USER}),
        spec_of("sftp", {"host": "h", "password": "SECRET4711", "key_filename": "/k"}),
        spec_of("webdav", {"base_url": "https://user:SECRET4711@h/", "auth": ("user", "SECRET4711")}),
    ],
    ids=lambda spec: spec.protocol,
)
def test_redacted_is_the_same_origin_without_secrets(spec: OriginSpec) -> None:
    redacted = spec.redacted()
    assert redacted.identity == spec.identity
    shown = repr(redacted) + repr(spec) + spec.identity + repr(redacted.options) + repr(redacted.environ)
    assert not any(secret in shown for secret in SECRETS)


def test_what_is_no_secret_stays() -> None:
    options = {"anon": True, "token": "anon", "host": "h", "key_filename": "/k", "use_ssl": False, "secret": "x"}
    assert without_secrets(options) == {k: v for k, v in options.items() if k != "secret"}


def test_fingerprint_tells_users_apart() -> None:
    one = spec_of("s3", S3_USER)
    assert one.fingerprint() == spec_of("s3", dict(S3_USER)).fingerprint()
    others = [
        spec_of("s3", {**S3_USER, "secret": "x"}),
        spec_of("s3", {}, {"AWS_ACCESS_KEY_ID": "a"}),
        spec_of("s3", {}),
    ]
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_signed_urls_lose_their_signature_in_messages() -> None:
    assert plain_url("https://u:p@h/x?X-Amz-Signature=1#f") == "https://h/x"


def test_capture_takes_the_credentials_of_its_protocol_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEYID4711")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "SECRET4711")
    monkeypatch.setenv("UNRELATED_PASSWORD", "x")
    environ = OriginSpec.capture("s3", {}).environ
    assert environ["AWS_ACCESS_KEY_ID"] == "KEYID4711"
    assert not {"AZURE_STORAGE_ACCOUNT_KEY", "UNRELATED_PASSWORD"} & set(environ)
    assert OriginSpec.capture("file", {}).environ == {}


def test_the_fetchers_own_credentials_can_be_forgotten() -> None:
    environ = {"AWS_SECRET_ACCESS_KEY": "x", "GOOGLE_APPLICATION_CREDENTIALS": "x", "PATH": "/bin", "HOME": "/root"}
    forget_environment(environ)
    assert environ == {"PATH": "/bin", "HOME": "/root"}


# --- S3: options, environment, profiles -----------------------------------------------------------------------


def settings(options: dict[str, Any], environ: dict[str, str] | None = None) -> S3Settings:
    return S3Settings.make(options, {"HOME": "/nonexistent", **(environ or {})})


@pytest.mark.parametrize(
    "options",
    [
        {"key": "K", "secret": "S", "token": "T", "endpoint_url": "http://h", "client_kwargs": {"region_name": "r"}},
        {"access_key_id": "K", "secret_access_key": "S", "session_token": "T", "endpoint": "http://h/", "region": "r"},
        {"username": "K", "password": "S", "token": "T", "client_kwargs": {"endpoint_url": "http://h"}, "region": "r"},
    ],
    ids=["s3fs", "object_store", "aliases"],
)
def test_every_spelling_means_the_same(options: dict[str, Any]) -> None:
    found = settings(options)
    assert (found.keys, found.endpoint, found.region) == (Keys("K", "S", "T"), "http://h", "r")
    assert not found.anon
    assert not found.virtual


def test_s3fs_extras() -> None:
    found = settings(
        {
            "anon": "true",
            "requester_pays": True,
            "default_block_size": 1,
            "client_kwargs": {"verify": False},
            "config_kwargs": {"s3": {"addressing_style": "virtual"}, "read_timeout": 7, "signature_version": "s3v4"},
            "connect_timeout": 2,
            "retry_timeout": 0,
        }
    )
    assert (found.anon, found.requester_pays, found.verify, found.virtual) == (True, True, False, True)
    assert (found.patience.retry, found.patience.connect, found.patience.read) == (0, 2, 7)
    assert found.keys is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keey": "K"}, "keey"),
        ({"client_kwargs": {"regoin": "r"}}, "regoin"),
        ({"config_kwargs": {"proxies": {}}}, "proxies"),
        ({"config_kwargs": {"s3": {"addressing_style": "auot"}}}, "addressing_style"),
        ({"key": "K"}, "key and secret"),
        ({"endpoint_url": "h:9000"}, "http://"),
        ({"version_aware": True}, "version_aware"),
        ({"anon": "perhaps"}, "anon"),
        ({"read_timeout": "soon"}, "read_timeout"),
        ({"profile": "nobody"}, "nobody"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        settings(options)


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ("gs", {"tokenn": "x"}),
        ("az", {"account_name": "a", "acount_key": "x"}),
        ("https", {"heders": {}}),
        ("file", {"colour": 1}),
        ("https", {"client_kwargs": {"heders": 1}}),
    ],
)
async def test_unknown_options_of_other_origins_are_named(protocol: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"tokenn|acount_key|heders|colour"):
        open_origin(spec_of(protocol, options))


PROFILES = {
    "config": "[default]\nregion = from-default\n[profile lab]\nregion = lab-1\nservices = ours\n"
    "[services ours]\ns3 =\n  endpoint_url = http://lab:9000\n[profile sso]\nsso_session = corp\n",
    "credentials": "[default]\naws_access_key_id = DK\naws_secret_access_key = DS%\n"
    "[lab]\naws_access_key_id = LK\naws_secret_access_key = LS\naws_session_token = LT\n",
}


@pytest.fixture
def home(tmp_path: Path) -> str:
    (tmp_path / ".aws").mkdir()
    for name, text in PROFILES.items():
        (tmp_path / ".aws" / name).write_text(text)
    return str(tmp_path)


def test_profile_files(home: str) -> None:
    found = settings({}, {"HOME": home})
    assert (found.keys, found.region) == (Keys("DK", "DS%"), "from-default")
    found = settings({"profile": "lab"}, {"HOME": home})
    assert (found.keys, found.region, found.endpoint) == (Keys("LK", "LS", "LT"), "lab-1", "http://lab:9000")
    assert settings({}, {"HOME": home, "AWS_PROFILE": "lab"}).keys == Keys("LK", "LS", "LT")
    assert spec_of("s3", {"profile": "lab"}, {"HOME": home}).identity == "s3 http://lab:9000"


def test_order_of_credentials(home: str) -> None:
    environ = {"HOME": home, "AWS_ACCESS_KEY_ID": "EK", "AWS_SECRET_ACCESS_KEY": "ES", "AWS_SESSION_TOKEN": "ET"}
    assert settings({}, environ).keys == Keys("EK", "ES", "ET")
    # A token of the environment does not go with a key of the options.
    assert settings({"key": "OK", "secret": "OS"}, environ).keys == Keys("OK", "OS", "")
    assert settings({"profile": "lab"}, environ).keys == Keys("LK", "LS", "LT")
    assert settings({"anon": True}, environ).keys is None


def test_files_elsewhere(home: str) -> None:
    moved = Path(home) / "elsewhere"
    os.rename(Path(home) / ".aws/credentials", moved)
    assert settings({}, {"HOME": home, "AWS_SHARED_CREDENTIALS_FILE": str(moved)}).keys == Keys("DK", "DS%")


def test_a_broken_profile_file_is_named_and_not_quoted(home: str) -> None:
    (Path(home) / ".aws/credentials").write_text("aws_secret_access_key = SECRET4711\n")
    with pytest.raises(ConfigError, match="credentials") as caught:
        settings({}, {"HOME": home})
    assert "SECRET4711" not in str(caught.value)


async def test_a_profile_that_logs_in_by_itself_needs_botocore(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefs.origin.s3_keys.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sso.*cachefs-sidecar\[s3\]"):
        open_origin(spec_of("s3", {"profile": "sso"}, {"HOME": home}))


def test_errors_of_this_room_are_of_the_tree() -> None:
    assert issubclass(UnsupportedOrigin, CacheFSError)
    assert issubclass(UnsupportedOrigin, ValueError)
