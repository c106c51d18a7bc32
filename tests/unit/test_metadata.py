"""The metadata document: `is_prefix` against an independent recogniser, and the rules of `merge`."""

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fusestore.errors import BadDocument, BadName, NotPermitted
from fusestore.metadata import DEPTH_MAX, DOCUMENT_MAX, Change, is_prefix, merge, parse_document, render

_TOKEN = re.compile(
    r'\s*(?:"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*\""
    r"|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null|[\[\]{},:])",
    re.ASCII,
)
_9F = b"\x9f\x80"
_ENDINGS = [
    "", '"', "x\"", "0", "0\"", "00\"", "000\"", "c00\"", "dc00\"",
    "udc00\"", "\\udc00\"", "n\"", "rue", "ue", "e",
    "alse", "lse", "se", "ull", "ll", "l", "0000\"", ".0", "e-400", "e-999", "-999",
]  # fmt: skip


def _stdlib_accepts(text: str) -> bool:
    """Whether the standard library takes it as an object; it is laxer than RFC 8259 in the ways undone
    here."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    def finite(literal: str) -> float:
        if float(literal) in (float("inf"), float("-inf")):
            raise ValueError(literal)
        return float(literal)

    try:
        value = json.loads(text, parse_constant=refuse, parse_float=finite)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict)


def _finishable(data: bytes) -> bool:
    """The oracle: tries to finish the text token by token. Slow, and for short texts only."""
    texts = []
    for tail in (b"", b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xa0\x80", b"\x90\x80\x80", b"\xbf\xbf", _9F):
        try:
            texts.append((data + tail).decode())
        except UnicodeDecodeError:
            continue
    return any(
        _stdlib_accepts(text + ending + member + closing)
        for text in texts
        for ending in _ENDINGS
        for member in ("", ":0", "0", '"":0', '"k":0')
        for closing in ("", _closing(text + ending + member))
    ) or (not data.strip(b" \t\r\n"))


def _closing(text: str) -> str:
    stack, position = [], 0
    while position < len(text) and (match := _TOKEN.match(text, position)):
        position = match.end()
        token = match.group().strip()
        if token in ("[", "{"):
            stack.append("]" if token == "[" else "}")
        elif token in ("]", "}") and stack:
            stack.pop()
    return "".join(reversed(stack))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", True),
        (b" \n\t", True),
        (b"{", True),
        (b" {", True),
        (b"[", False),
        (b'"a', False),
        (b"nul", False),
        (b"1", False),
        (b"\x0b{", False),
        (b"\xef\xbb\xbf{", False),
        (b"{,", False),
        (b'{"a', True),
        (b'{"a" 1', False),
        (b'{"a":', True),
        (b'{"a":-', True),
        (b'{"a":01', False),
        (b'{"a":+1', False),
        (b'{"a":1.', True),
        (b'{"a":1.e', False),
        (b'{"a":1e', True),
        (b'{"a":1e+', True),
        (b'{"a":1e308', True),
        (b'{"a":1e309', False),
        (b'{"a":1e309}', False),
        (b'{"a":-1e309,', False),
        (b'{"a":1e-999', True),
        (b'{"a":' + b"9" * 400, True),
        (b'{"a":' + b"9" * 400 + b".5", True),
        (b'{"a":' + b"9" * 400 + b".5,", False),
        (b'{"a":N', False),
        (b'{"a":-I', False),
        (b'{"a":tru', True),
        (b'{"a":trux', False),
        (b'{"a":1,}', False),
        (b'{"a":[1,2', True),
        (b'{"a":[1,2}', False),
        (b'{"a":1}', True),
        (b'{"a":1} \n', True),
        (b'{"a":1}}', False),
        (b'{"a":1}x', False),
        (b'{"a":"\n', False),
        (b'{"a":"\x7f', True),
        (b'{"a":"\\x', False),
        (b'{"a":"\\u12', True),
        (b'{"a":"\\u12g', False),
        (b'{"a":"\\\\u12g', True),
        (b'{"a":"\\ud800', True),
        (b'{"a":"\\ud800"', False),
        (b'{"a":"\\ud800x', False),
        (b'{"a":"\\ud800\\', True),
        (b'{"a":"\\ud800\\u', True),
        (b'{"a":"\\ud800\\ud', True),
        (b'{"a":"\\ud800\\udc', True),
        (b'{"a":"\\ud800\\u0', False),
        (b'{"a":"\\ud800\\udb', False),
        (b'{"a":"\\\\ud800\\u0', True),
        (b'{"a":"\\udc', False),
        (b'{"a":"\\udb', True),
        (b'{"a":"\xc3', True),
        (b'{"a":"\xe2\x82', True),
        (b'{"a":"\xe2(', False),
        (b'{"a":"\xc0', False),
        (b'{"a":"\xed\x9f', True),
        (b'{"a":"\xed\xa0', False),
        (b'{"a":"\xf4\x90', False),
        (b'{"a":1\xe2', False),
        (b"{\xe2", False),
        (b'{"a":' + b"[" * (DEPTH_MAX - 1), True),
        (b'{"a":' + b"[" * DEPTH_MAX, False),
        (b'{"a":' + b"[" * 100_000, False),
        (b'{"a":"' + b"x" * (DOCUMENT_MAX - 6), True),
        (b'{"a":"' + b"x" * (DOCUMENT_MAX - 5), False),
    ],
)
def test_prefixes(data: bytes, expected: bool) -> None:
    assert is_prefix(data) is expected


_PIECES = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"u", b"d", b"8", b"0", b"c", b"1", b".", b"e", b"-",
    b"+", b"t", b"r", b"null", b"true", b'"a":', b"\xe2", b"\x82", b"\xac", b"\xed", b"\xa0", b"\xf0", b" ",
    b"\n", b"\x00", b"\\ud83d", b"\\ude00", b"e400", b"NaN", b"/", b"b",
]  # fmt: skip


@given(st.lists(st.sampled_from(_PIECES), max_size=9).map(b"".join))
@example(b'\\"\\ud83d\\u')
@example(b'":"\\ud83d\\uc')
@example(b"\\u\\u")
def test_is_prefix_agrees_with_an_oracle_that_tries_endings(tail: bytes) -> None:
    for data in (b'{"a":' + tail, b'{"a":"' + tail, b"{" + tail):
        assert is_prefix(data) == _finishable(data), data


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), _JSON, max_size=4), st.booleans(), st.data())
def test_every_prefix_of_a_document_is_one(
    document: dict[str, Any], ascii_only: bool, data: st.DataObject
) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only).encode()
    assert parse_document(text) == document
    assert is_prefix(text[: data.draw(st.integers(0, len(text)))])


@given(st.binary(max_size=40) | st.lists(st.sampled_from(_PIECES), max_size=9).map(b"".join))
def test_what_parses_is_a_prefix_and_the_rest_is_bad(data: bytes) -> None:
    try:
        parse_document(data)
    except BadDocument:
        return
    assert is_prefix(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"1",
        b"{} x",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e400}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b'{"a":' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":"' + b"x" * DOCUMENT_MAX + b'"}',
    ],
)
def test_no_document(data: bytes) -> None:
    with pytest.raises(BadDocument):
        parse_document(data)


def test_the_last_of_two_equal_keys_counts() -> None:
    assert parse_document(b'{"a":1,"b":2,"a":3}') == {"a": 3, "b": 2}


BOUND = {"image-name": "app:1", "image-id": "f" * 64, "created-at": 1700000000, "mountlabel": "l", "x": 1}
UNBOUND = {"image-name": "", "image-id": "", "created-at": 1700000000}


@pytest.mark.parametrize(
    "new",
    [
        {},
        {"id": "c1", "name": "c1", "image-name": "app:1", "image-id": "f" * 64, "created-at": 1700000000},
        {"image-name": "", "image-id": ""},
        {"image-id": "sha256:" + "f" * 64},
    ],
)
def test_what_is_left_out_or_repeated_is_kept(new: dict[str, Any]) -> None:
    kept = {key: BOUND[key] for key in ("image-name", "image-id", "created-at")}
    assert merge(BOUND, new, "c1") == Change(kept, None, None, None, None)


@pytest.mark.parametrize(
    "new",
    [
        {"id": "c2"},
        {"created-at": 1},
        {"image-name": "other"},
        {"image-id": "e" * 64},
        {"image-id": "sha256:" + "e" * 64},
    ],
)
def test_what_may_not_change(new: dict[str, Any]) -> None:
    with pytest.raises(NotPermitted):
        merge(BOUND, new, "c1")


@pytest.mark.parametrize(
    "new",
    [
        {"id": 1},
        {"name": None},
        {"image-name": []},
        {"image-id": 0},
        {"created-at": "now"},
        {"created-at": True},
        {"created-at": 1.5},
        {"mountlabel": 5},
        {"mountlabel": "a\0b"},
        {"mountlabel": "a:b:c:s0\n"},
        {"mountlabel": "a\x1b[2J"},
        {"mountlabel": "a\x85"},
        {"mountlabel": "x" * 5000},
        {"mounted": "true"},
        {"mounted": 1},
        {"mounted": None},
    ],
)
def test_wrong_types(new: dict[str, Any]) -> None:
    with pytest.raises(BadDocument):
        merge(BOUND, new, "c1")


def test_a_name_that_cannot_be_one() -> None:
    with pytest.raises(BadName):
        merge(BOUND, {"name": "a/b"}, "c1")


def test_binding_is_asked_for_only_while_unbound() -> None:
    change = merge(UNBOUND, {"image-name": "app:1"}, "c1")
    assert (change.image_name, change.image_id) == ("app:1", None)


def test_a_new_name_is_reported_and_not_stored_yet() -> None:
    change = merge({**BOUND, "name": "web"}, {"name": "db"}, "c1")
    assert (change.name, change.document["name"]) == ("db", "web")


def test_the_label_left_out_is_empty() -> None:
    assert "mountlabel" not in merge(BOUND, {}, "c1").document


def test_users_keys_are_replaced_in_their_order() -> None:
    document = merge(BOUND, {"z": 1, "created-at": 1700000000, "a": {"c": 1, "b": 2}}, "c1").document
    assert json.dumps(document).endswith('"z": 1, "a": {"c": 1, "b": 2}}')


def test_shown() -> None:
    document = {**BOUND, "name": "web", "z": "é", "a": [1]}
    assert render(document, "c1", mounted=True).decode() == (
        '{\n  "id": "c1",\n  "name": "web",\n  "image-name": "app:1",\n  "image-id": "' + "f" * 64 + '",\n'
        '  "created-at": 1700000000,\n  "mountlabel": "l",\n  "mounted": true,\n  "x": 1,\n  "z": "é",\n'
        '  "a": [\n    1\n  ]\n}\n'
    )


def test_an_empty_label_is_not_shown() -> None:
    assert b"mountlabel" not in render(UNBOUND, "c1", mounted=False)


def test_what_is_shown_can_be_written_back_unchanged() -> None:
    document = {**BOUND, "name": "web"}
    shown = parse_document(render(document, "c1", mounted=False))
    assert merge(document, shown, "c1") == Change(document, None, None, None, False)
