"""What a refusal looks like to a client and in the log."""

import logging
import sys

import pytest
from lsprotocol import types

from lsp_server.activity import Refused, is_news, refused
from lsp_server.errors import Refusal, Stale, Unusable


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (Refusal("No."), types.LSPErrorCodes.RequestFailed),
        (Unusable("No."), types.LSPErrorCodes.RequestFailed),
        (Stale("No."), types.LSPErrorCodes.ContentModified),
    ],
)
def test_a_refusal_has_its_sentence_and_a_code_that_clients_know(refusal: Refusal, code: types.LSPErrorCodes):
    assert refused(refusal).to_response_error().message == "No." and refused(refusal).code == code


@pytest.mark.parametrize(("error", "told"), [(Refused("No."), False), (ValueError("broken"), True)])
def test_the_log_tells_what_broke_and_not_what_was_refused(error: Exception, told: bool):
    try:
        raise error
    except type(error):
        record = logging.LogRecord("pygls", logging.ERROR, "", 0, "Exception occurred", (), sys.exc_info())
    assert is_news(record) is told
