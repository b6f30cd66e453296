"""How a worker reaches the origin, without a secret in what is sent to it.

A task of Dask passes a scheduler, lies in its memory, and may be shown by its dashboard and logs. So it has only where
the origin is, and references to secrets (secret=@env:SECRET, key=@FILE), which each worker follows on its own machine;
what the environment of a worker says of credentials is its own. Processes of this machine are handed everything, over
a socket that only they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from cachefs.errors import ConfigError
from cachefs.origin import Origin, OriginSpec, open_origin
from cachefs.origin.given import options_given

# Which endpoint is meant is said by whoever starts the work; who asks there is the worker's own affair.
_WHERE = frozenset(
    {
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "GOOGLE_BASE_URL",
        "STORAGE_EMULATOR_HOST",
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ENDPOINT",
    }
)


class Reach(msgspec.Struct, frozen=True):
    """identity: of the origin that is meant. given: options as they were written, references unresolved.

    whole: options and environ are all there is; else the worker adds what its own environment says.
    """

    identity: str
    protocol: str
    options: dict[str, Any]
    environ: dict[str, str]
    given: list[str] = []
    whole: bool = False

    def __repr__(self) -> str:
        return f"Reach({self.identity!r})"

    def spec(self) -> OriginSpec:
        """The origin as this process reaches it. Raises ConfigError when that is another origin than was meant."""
        if self.whole:
            return OriginSpec(self.protocol, self.options, self.environ)
        options, _ = options_given(self.given)
        own = OriginSpec.capture(self.protocol, _merged(self.options, options))
        environ = {name: value for name, value in own.environ.items() if name not in _WHERE}
        spec = OriginSpec(own.protocol, own.options, environ | self.environ)
        if spec.identity != self.identity:
            raise ConfigError(
                f"a worker reaches the origin {spec.identity!r} where {self.identity!r} is meant: give the endpoint "
                "with --origin-option endpoint_url=..., so that all of them use the same"
            )
        return spec

    def open(self) -> Origin:
        """Raises ConfigError, UnsupportedOrigin."""
        return open_origin(self.spec())


def reach_of(spec: OriginSpec, given: Sequence[str], *, private: bool) -> Reach:
    """private: nobody but processes of this user sees it. Raises ConfigError for secrets that would be seen by others,
    and for what cannot be sent."""
    if private:
        return Reach(spec.identity, spec.protocol, dict(spec.options), dict(spec.environ), whole=True)
    bare = spec.redacted()
    references = [text for text in given if _is_reference(text)]
    followed = {text.partition("=")[0].removesuffix(":").strip() for text in references}
    sent = dict(_leaves(bare.options))
    secret = sorted(
        name
        for name, value in _leaves(spec.options)
        if name not in followed and (name not in sent or sent[name] != value)
    )
    if secret:
        raise ConfigError(
            f"{', '.join(secret)}: would be seen by whoever may look at the scheduler; give each as KEY=@env:NAME or "
            "KEY=@FILE, which every worker reads on its own machine, or leave them to the workers' environment"
        )
    environ = {name: value for name, value in bare.environ.items() if name in _WHERE}
    return Reach(spec.identity, spec.protocol, _without(bare.options, followed), environ, references)


def _is_reference(text: str) -> bool:
    name, _, value = text.partition("=")
    return value.startswith("@") and not value.startswith("@@") and not name.endswith(":")


def _leaves(options: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything that is no mapping."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value


def _without(options: Mapping[str, Any], names: set[str], above: str = "") -> dict[str, Any]:
    """What a worker reads for itself need not be sent: a file's text that looks like no secret might be one."""
    kept: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            kept[name] = _without(value, names, f"{above}{name}.")
        elif above + name not in names:
            kept[name] = value
    return kept


def _merged(options: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(options)
    for name, value in more.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return merged
