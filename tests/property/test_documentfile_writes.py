"""However a document is cut into writes, it is committed whole, once, and nothing else ever is."""

import json
import os
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fusestore.documentfile import DocumentWriter
from fusestore.errors import BadDocument
from fusestore.inodes import Branch, Node, Steps, run
from fusestore.metadata import parse_document
from fusestore.nodes import Inode

NODE = Node(Branch(), Inode(7))

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(st.text(), values, max_size=4).flatmap(
    lambda value: st.builds(
        lambda ascii, end: json.dumps(value, ensure_ascii=ascii).encode(errors="replace") + end,
        st.booleans(),
        st.sampled_from([b"", b"\n", b" \n\t"]),
    )
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


class Written:
    """A handle, what was committed through it, and what the file would hold on an ordinary file system."""

    def __init__(self, flags: int) -> None:
        self.commits: list[bytes] = []
        self.handle = DocumentWriter(NODE, os.O_RDWR | flags, b'{"old": 1}', self._commit, "container a")
        self.end = 0

    def _commit(self, data: bytes) -> Steps[None]:
        yield lambda: None
        self.commits.append(data)

    def write(self, piece: bytes) -> None:
        if not piece:
            return  # The kernel asks nobody.
        run(self.handle.write(self.end, piece))
        self.end += len(piece)


@given(documents, st.lists(st.integers(min_value=0)), st.sampled_from([os.O_TRUNC, os.O_APPEND]))
def test_any_cut_of_a_document_commits_it_once(data: bytes, places: list[int], flags: int) -> None:
    written = Written(flags)
    for piece in cut(data, places):
        written.write(piece)
    run(written.handle.flush())
    written.handle.close()
    assert [parse_document(commit) for commit in written.commits] == [parse_document(data)]


@given(
    st.binary(max_size=40) | documents.map(lambda data: data[:-1]) | documents.map(lambda data: data + b"}"),
    st.lists(st.integers(min_value=0)),
)
def test_what_is_no_document_is_refused_by_flush_at_the_latest(data: bytes, places: list[int]) -> None:
    try:
        parse_document(data)
        is_document = True
    except BadDocument:
        is_document = False
    written = Written(os.O_TRUNC)
    refused = False
    try:
        for piece in cut(data, places):
            written.write(piece)
        run(written.handle.flush())
    except BadDocument:
        refused = True
    assert refused == (not is_document)
