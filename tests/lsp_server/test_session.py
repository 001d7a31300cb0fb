"""Documents stay what the editor's are, in every encoding and with every line ending."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lsprotocol import types

from lsp_server.session import Document, Encoding, Session, offset_in, split_lines, units

TEXT = st.text(st.sampled_from("ab é🙂你\r\n\t\x0c\u2028"), max_size=30)
ENCODINGS = st.sampled_from([Encoding.Utf8, Encoding.Utf16, Encoding.Utf32])


def opened(text: str, encoding: Encoding = Encoding.Utf16) -> Document:
    return Document(types.TextDocumentItem("file:///a.py", "python", 0, text), encoding)


def place(text: str, offset: int, encoding: Encoding) -> types.Position:
    """The position of an offset, found the slow and obvious way."""
    lines = split_lines(text[:offset])
    if text[offset - 1 : offset + 1] == "\r\n":  # within a line ending: its start
        return place(text, offset - 1, encoding)
    return types.Position(len(lines) - 1, units(lines[-1], encoding))


@given(text=TEXT)
def test_lines_end_where_lsp_says_and_nowhere_else(text: str):
    lines = split_lines(text)
    assert "".join(lines) == text
    assert all(line.endswith(("\n", "\r")) for line in lines[:-1]) and not lines[-1].endswith(("\n", "\r"))
    assert len(lines) == 1 + text.replace("\r\n", "\n").replace("\r", "\n").count("\n")


@given(text=TEXT, edits=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9), TEXT), max_size=4), encoding=ENCODINGS)
def test_any_chain_of_edits_gives_the_text_a_string_would_have(text: str, edits: list[tuple[int, int, str]], encoding: Encoding):
    document = opened(text, encoding)
    for chosen, length, added in edits:
        start = chosen % (len(text) + 1)
        stop = min(start + length, len(text))
        # an edit cannot begin or end within \r\n
        if text[start - 1 : start + 1] == "\r\n":
            start -= 1
        if stop > start and text[stop - 1 : stop + 1] == "\r\n":
            stop -= 1
        change = types.Range(place(text, start, encoding), place(text, stop, encoding))
        document.change(types.TextDocumentContentChangePartial(range=change, text=added))
        text = text[:start] + added + text[stop:]
        assert document.text == text
        assert list(document.snapshot(types.Position(0, 0)).lines) == split_lines(text)
        assert document.chars == len(text)


@given(line=TEXT, encoding=ENCODINGS)
def test_offsets_and_units_are_inverse(line: str, encoding: Encoding):
    body = line.replace("\r", "").replace("\n", "")
    for offset in range(len(body) + 1):
        assert offset_in(body + "\n", units(body[:offset], encoding), encoding) == offset


@pytest.mark.parametrize(("encoding", "character", "column"), [(Encoding.Utf16, 1, 0), (Encoding.Utf8, 3, 0), (Encoding.Utf32, 1, 1)])
def test_a_position_within_a_character_means_its_start(encoding: Encoding, character: int, column: int):
    assert offset_in("🙂\n", character, encoding) == column


def test_a_whole_new_text_replaces_the_old_one():
    document = opened("a\nb\n")
    document.change(types.TextDocumentContentChangeWholeDocument(text="c\r\n"))
    assert document.text == "c\r\n" and document.snapshot(types.Position(0, 0)).newline == "\r\n"


def test_changes_to_a_document_that_was_never_opened_are_left_alone():
    session = Session()
    identifier = types.VersionedTextDocumentIdentifier(version=1, uri="file:///x")
    session.change(types.DidChangeTextDocumentParams(identifier, [types.TextDocumentContentChangeWholeDocument(text="x")]))
    session.close("file:///x")
    assert session.find("file:///x") is None


def test_a_snapshot_does_not_change_with_its_document():
    document = opened("a = 1\n")
    before = document.snapshot(types.Position(0, 5))
    document.change(types.TextDocumentContentChangeWholeDocument(text="b"))
    assert before.before == "a = 1" and before.after == ""
