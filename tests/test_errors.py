"""The error tree: each error is also the builtin that callers catch, and crosses processes unharmed."""

import pickle

import pytest

from cachefs import errors
from cachefs.errors import CacheFSError


def tree(cls: type[CacheFSError] = CacheFSError) -> list[type[CacheFSError]]:
    ours = [child for child in cls.__subclasses__() if child.__module__ == errors.__name__]
    return [cls, *(c for child in ours for c in tree(child))]


@pytest.mark.parametrize("cls", tree())
def test_every_error_crosses_the_process_border(cls):
    error = cls("what happened to s3://b/x", path="b/x")
    for again in (errors.from_wire(errors.to_wire(error)), pickle.loads(pickle.dumps(error))):
        assert type(again) is cls
        assert (str(again), again.path, again.errno) == (str(error), "b/x", cls.errno)
    assert errors.errno_of(error) > 0


def test_strangers_travel_as_fetcher_errors():
    again = errors.from_wire(errors.to_wire(ZeroDivisionError("division")))
    assert type(again) is errors.FetcherError
    assert "ZeroDivisionError" in str(again)
    assert errors.from_wire(("FromTheFuture", "text", None)).message == "text"


def test_builtins_catch_them():
    assert issubclass(errors.ObjectNotFound, FileNotFoundError)
    assert issubclass(errors.OriginAccessDenied, PermissionError)
    assert issubclass(errors.OriginTimeout, TimeoutError)
    assert not issubclass(errors.OriginAccessDenied, FileNotFoundError), "wrong credentials are never 'not found'"
