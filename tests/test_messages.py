"""The protocol between readers and fetcher, by bytes alone."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs import messages


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 1 << 62))
def test_requests_survive_the_wire(path, offset):
    need = messages.Need(id=5, attachment=1, path=path, offset=offset, length=4096)
    assert messages.decode_request(messages.encode(need)) == need


@given(st.binary(max_size=200))
def test_garbage_is_an_error_never_a_crash(data):
    for decode in (messages.decode_request, messages.decode_reply):
        try:
            decode(data)
        except msgspec.MsgspecError:
            continue
        except UnicodeDecodeError:
            continue


def test_a_reply_is_not_a_request():
    with pytest.raises(msgspec.ValidationError):
        messages.decode_request(messages.encode(messages.Done(id=1)))
