"""Options of a storage as people write them: KEY=VALUE, with values that stand in a file or the environment.

A reference (key=@env:SECRET, key=@FILE) is no secret itself: it may be sent to another machine, which reads the value
from its own environment or its own file. That is how workers of batch work come by credentials.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from cachefs.errors import ConfigError
from cachefs.origin.redaction import without_secrets

# Larger than any key, token or service account file; what is larger is the wrong file.
SECRET_FILE_BYTES = 1024 * 1024


def options_given(texts: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(options, names of those whose value is a secret that stands in the text itself). Raises ConfigError."""
    options: dict[str, Any] = {}
    visible = []
    for text in texts:
        key, value, literal = _parse(text)
        _put(options, key, value)
        last = key.rpartition(".")[2]
        if literal and value and last not in without_secrets({last: value}):
            visible.append(key)
    return options, visible


def _parse(text: str) -> tuple[str, Any, bool]:
    """One option: name, value, and whether the value stands on the command line.

    Error messages never show the value, which may be a secret.
    """
    key, equals, value = text.partition("=")
    as_json = key.endswith(":")
    key = key.removesuffix(":").strip()
    if not equals or not all(key.split(".")):
        shown = f" {key!r}" if equals else ""
        raise ConfigError(f"--origin-option{shown}: write KEY=VALUE, such as endpoint_url=http://host:9000")
    if as_json:
        try:
            return key, json.loads(value), True
        except ValueError:
            raise ConfigError(f"--origin-option {key}: what follows := is not JSON") from None
    if value.startswith("@@"):
        return key, value[1:], True  # a value that begins with @
    if value.startswith("@env:"):
        return key, _from_environment(key, value.removeprefix("@env:")), False
    if value.startswith("@"):
        return key, _from_file(key, value.removeprefix("@")), False
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true", True
    return key, value, True


def _from_environment(key: str, name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise ConfigError(f"--origin-option {key}: the environment has no variable {name!r}") from None


def _from_file(key: str, name: str) -> str:
    """A file's text without the newline that editors put at its end."""
    try:
        with open(os.path.expanduser(name), "rb") as file:
            data = file.read(SECRET_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--origin-option {key}: {name}: cannot be read ({error.strerror})") from None
    if len(data) > SECRET_FILE_BYTES:
        raise ConfigError(f"--origin-option {key}: {name}: is larger than 1 MiB; is it the right file?")
    try:
        return data.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise ConfigError(f"--origin-option {key}: {name}: is not text in UTF-8") from None


def _put(options: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    place = options
    for name in outer:
        inner = place.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--origin-option {key}: {name} was given a plain value before")
        place = inner
    if isinstance(place.get(last), dict):
        raise ConfigError(f"--origin-option {key}: was given nested values before")
    place[last] = value
