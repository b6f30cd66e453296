"""Bytes, versions and names from distributed storage: the only room that talks to an origin.

`OriginSpec` and `parse_origin` are for everybody and cheap; `open_origin` is for the fetcher process only, because
the client behind it (obstore) does not survive a fork. Both halves are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachefs.origin.contract import Origin as Origin
    from cachefs.origin.opening import open_origin as open_origin
    from cachefs.origin.spec import OriginSpec as OriginSpec
    from cachefs.origin.spec import forget_environment as forget_environment
    from cachefs.origin.spec import parse_origin as parse_origin

__all__ = ["Origin", "OriginSpec", "forget_environment", "open_origin", "parse_origin"]

_HOMES = {
    "Origin": "contract",
    "OriginSpec": "spec",
    "forget_environment": "spec",
    "open_origin": "opening",
    "parse_origin": "spec",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"cachefs.origin.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
