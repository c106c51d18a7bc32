"""The rules of `fusestore.union`, one at a time."""

import stat

import pytest
from rig.layers import (
    MTIME_NS,
    Member,
    directory,
    file,
    hard_link,
    layer,
    opaque,
    symlink,
    whiteout,
)

from fusestore import union
from fusestore.errors import LayerRefused
from fusestore.layerindex import LayerIndex
from fusestore.union import LayerView, Lower, Merged, Ref, UpperEntry, check_lower_links, over

_ROOT = LayerIndex.ROOT


def _indexes(*layers: list[Member]) -> list[LayerIndex]:
    return [layer(*members).index for members in layers]


def _lower(*layers: list[Member]) -> Lower:
    return Lower(_indexes(*layers))


def _names(lower: Lower, path: bytes = b"") -> list[bytes]:
    return sorted(lower.listing(lower.walk(path)))


def _layer_of(lower: Lower, path: bytes) -> list[int]:
    return [ref.layer for ref in lower.walk(path)]


# Precedence


@pytest.mark.parametrize(
    ("bottom", "top", "expected"),
    [
        ([file(b"a")], [], [0]),
        ([file(b"a")], [file(b"a")], [1]),
        ([file(b"a")], [whiteout(b"a")], []),
        ([directory(b"a")], [whiteout(b"a")], []),
        ([directory(b"a")], [directory(b"a")], [1, 0]),
        ([directory(b"a")], [directory(b"a"), opaque(b"a")], [1]),
        ([directory(b"a")], [whiteout(b"a"), directory(b"a")], [1]),
        ([directory(b"a")], [file(b"a/x")], [1, 0]),
        ([file(b"a")], [directory(b"a")], [1]),
        ([symlink(b"a", b"b")], [directory(b"a")], [1]),
        ([directory(b"a")], [file(b"a")], [1]),
        ([], [whiteout(b"a")], []),
    ],
)
def test_the_topmost_layer_decides(bottom: list[Member], top: list[Member], expected: list[int]) -> None:
    assert _layer_of(_lower(bottom, top), b"a") == expected


@pytest.mark.parametrize("between", [file(b"d"), whiteout(b"d")])
def test_directories_do_not_merge_past_something_else(between: Member) -> None:
    lower = _lower([file(b"d/low")], [between], [file(b"d/top")])
    assert _names(lower, b"d") == [b"top"]


def test_an_opaque_directory_ends_merging_for_all_below_it() -> None:
    lower = _lower([file(b"d/1/x")], [directory(b"d"), opaque(b"d"), file(b"d/1/y")], [file(b"d/1/z")])
    assert _names(lower, b"d/1") == [b"y", b"z"]


def test_an_opaque_root_hides_all_below() -> None:
    lower = _lower([file(b"low")], [Member(b".wh..wh..opq", b"0"), file(b"top")])
    assert _names(lower) == [b"top"]


def test_a_whiteout_says_nothing_of_its_own_layer() -> None:
    assert _names(_lower([file(b"a")], [whiteout(b"a"), file(b"a")])) == [b"a"]


def test_what_a_whiteout_hid_stays_hidden_when_a_directory_comes_back() -> None:
    assert _names(_lower([file(b"d/old")], [whiteout(b"d")], [file(b"d/new")]), b"d") == [b"new"]


def test_lookup_and_listing_agree() -> None:
    lower = _lower(
        [file(b"d/a"), file(b"d/b"), directory(b"d/c")],
        [whiteout(b"d/a"), file(b"d/c/x"), hard_link(b"d/l", b"d/b")],
        [file(b"d/e"), whiteout(b"d/b")],
    )
    stack = lower.walk(b"d")
    found = {name: what.stack for name, what in lower.listing(stack).items()}
    assert found == {name: lower.lookup(stack, name) for name in (b"c", b"l", b"e")}


def test_listings_beyond_what_is_kept_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(union, "_KEPT", 2)
    paths = [b"d%d/f%d" % (number, number) for number in range(6)]
    lower = _lower([file(path) for path in paths])
    for path in paths * 2:
        top, name = path.split(b"/")
        assert list(lower.listing(lower.walk(top))) == [name]
        assert stat.S_ISREG(lower.attr(lower.walk(path)).mode)


def test_no_layers_are_an_empty_tree() -> None:
    lower = Lower(())
    assert (lower.root, lower.walk(b"a"), lower.listing(())) == ((), (), {})


def test_walk_follows_no_symbolic_link() -> None:
    assert _lower([file(b"d/a"), symlink(b"s", b"d")]).walk(b"s/a") == ()


# Attributes


def test_an_implied_directory_is_as_the_layer_below_says() -> None:
    lower = _lower([directory(b"d", 0o700, uid=7)], [file(b"d/x")])
    attr = lower.attr(lower.walk(b"d"))
    assert (attr.mode, attr.uid, attr.mtime_ns) == (stat.S_IFDIR | 0o700, 7, MTIME_NS)


def test_an_opaque_marker_keeps_the_directory_itself() -> None:
    lower = _lower(
        [directory(b"d", 0o700, xattrs=((b"user.k", b"v"),)), directory(b"d/gone")], [opaque(b"d")]
    )
    stack = lower.walk(b"d")
    attr = lower.attr(stack)
    assert (attr.mode, attr.nlink, lower.xattrs(stack)) == (stat.S_IFDIR | 0o700, 2, ((b"user.k", b"v"),))


@pytest.mark.parametrize("path", [b"d", b""])
def test_a_directory_speaks_through_any_number_of_opaque_markers(path: bytes) -> None:
    marker = opaque(path) if path else Member(b".wh..wh..opq", b"0")
    told = directory(path or b".", 0o700, uid=7)
    lower = Lower([layer(told).index, *([layer(marker).index] * 2000)])
    attr = lower.attr(lower.walk(path))
    assert (stat.S_IMODE(attr.mode), attr.uid) == (0o700, 7)


def test_an_opaque_marker_in_an_opaque_directory_keeps_nothing() -> None:
    lower = _lower([directory(b"d", 0o700), directory(b"d/e", 0o700)], [opaque(b"d"), opaque(b"d/e")])
    assert lower.attr(lower.walk(b"d/e")).mode == stat.S_IFDIR | 0o755


def test_a_directory_that_no_layer_describes_has_defaults() -> None:
    lower = _lower([file(b"d/x")], [file(b"d/y")])
    attr = lower.attr(lower.walk(b"d"))
    assert (attr.mode, attr.uid, attr.gid, attr.mtime_ns) == (stat.S_IFDIR | 0o755, 0, 0, 0)


def test_link_counts_of_directories_count_merged_subdirectories() -> None:
    lower = _lower([directory(b"d/a"), directory(b"d/b")], [whiteout(b"d/a"), directory(b"d/c")])
    assert [lower.attr(lower.walk(path)).nlink for path in (b"", b"d", b"d/c")] == [3, 4, 2]


def test_overlayfs_xattrs_of_a_layer_are_not_shown() -> None:
    xattrs = ((b"trusted.overlay.opaque", b"y"), (b"user.overlay.redirect", b"/"), (b"user.k", b"v"))
    lower = _lower([file(b"a", xattrs=xattrs)])
    assert lower.xattrs(lower.walk(b"a")) == ((b"user.k", b"v"),)


# The upper


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (None, (False, b"d")),
        (UpperEntry(is_whiteout=True), None),
        (UpperEntry(), (True, b"")),
        (UpperEntry(is_directory=True), (True, b"d")),
        (UpperEntry(is_directory=True, is_opaque=True), (True, b"")),
        (UpperEntry(is_directory=True, redirect=b"/p/e"), (True, b"p/e")),
        (UpperEntry(is_directory=True, redirect=b"/e"), (True, b"e")),
        (UpperEntry(is_directory=True, redirect=b"e"), (True, b"e")),
        (UpperEntry(is_directory=True, redirect=b"/p/file"), (True, b"")),
        (UpperEntry(is_directory=True, redirect=b"/none"), (True, b"")),
        (UpperEntry(is_directory=True, is_opaque=True, redirect=b"/e"), (True, b"")),
    ],
)
def test_the_upper_over_a_lower_directory(
    entry: UpperEntry | None, expected: tuple[bool, bytes] | None
) -> None:
    lower = _lower([directory(b"d"), directory(b"e"), directory(b"p/e"), file(b"p/file")])
    merged = over(entry, lower, lower.root, b"d")
    if expected is None:
        assert merged is None
    else:
        in_upper, path = expected
        assert merged == Merged(in_upper, lower.walk(path) if path else ())


def test_an_upper_directory_does_not_merge_with_a_lower_file() -> None:
    lower = _lower([file(b"a")])
    assert over(UpperEntry(is_directory=True), lower, lower.root, b"a") == Merged(True, ())


def test_a_name_in_neither_is_missing() -> None:
    assert over(None, _lower([file(b"a")]), (Ref(0, _ROOT),), b"b") is None


# Hard links across layers


def test_a_link_into_a_lower_layer_is_that_file() -> None:
    lower = _lower([file(b"a"), directory(b"d")], [hard_link(b"d/b", b"a")])
    assert lower.walk(b"d/b") == lower.walk(b"a") != ()


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ([[file(b"a"), hard_link(b"b", b"a")]], [b"a", b"b"]),
        ([[file(b"a")], [hard_link(b"b", b"a")]], [b"a", b"b"]),
        ([[file(b"a")], [hard_link(b"b", b"a"), whiteout(b"a")]], [b"b"]),
        ([[file(b"a"), hard_link(b"b", b"a")], [whiteout(b"b")]], [b"a"]),
        ([[file(b"a"), hard_link(b"b", b"a")], [file(b"b", b"other")]], [b"a"]),
        ([[file(b"a")], [hard_link(b"b", b"a")], [hard_link(b"c", b"b")]], [b"a", b"b", b"c"]),
        ([[file(b"a")], [hard_link(b"b", b"a"), whiteout(b"a")], [hard_link(b"c", b"b")]], [b"b", b"c"]),
        ([[file(b"a")], [hard_link(b"b", b"a")], [whiteout(b"b")]], [b"a"]),
        ([[file(b"d/a")], [hard_link(b"b", b"d/a")], [whiteout(b"d")]], [b"b"]),
    ],
)
def test_link_counts_count_the_names_that_show(layers: list[list[Member]], names: list[bytes]) -> None:
    lower = _lower(*layers)
    shown = [lower.walk(name) for name in names]
    assert len(set(shown)) == 1
    assert lower.attr(shown[0]).nlink == len(names)
    assert lower.paths(shown[0][0]) == tuple(names)


def test_a_link_over_lower_directories_hides_them() -> None:
    lower = _lower([file(b"a"), file(b"d/x")], [hard_link(b"d", b"a")])
    assert lower.walk(b"d") == lower.walk(b"a")


def test_a_directory_over_a_link_ends_there() -> None:
    lower = _lower([file(b"a"), file(b"d/x")], [hard_link(b"d", b"a")], [file(b"d/y")])
    assert _names(lower, b"d") == [b"y"]


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ([[file(b"a")], [hard_link(b"b", b"none")]], "nothing"),
        ([[hard_link(b"b", b"none")]], "nothing"),
        ([[directory(b"d")], [hard_link(b"b", b"d")]], "a directory"),
        ([[file(b"a")], [whiteout(b"a")], [hard_link(b"b", b"a")]], "nothing"),
    ],
)
def test_links_that_lead_nowhere_are_refused(layers: list[list[Member]], complaint: str) -> None:
    with pytest.raises(LayerRefused, match=complaint):
        check_lower_links(_indexes(*layers))


def test_links_that_lead_somewhere_are_taken() -> None:
    check_lower_links(_indexes([file(b"a")], [hard_link(b"b", b"a")], [hard_link(b"c", b"b")]))


# Paths


def test_the_path_of_a_directory_is_that_in_the_image() -> None:
    lower = _lower([directory(b"a/b")], [file(b"a/b/c/x")])
    assert [lower.directory_path(lower.walk(path)) for path in (b"", b"a/b", b"a/b/c")] == [
        b"",
        b"a/b",
        b"a/b/c",
    ]


# One layer alone


def _view(number: int, *layers: list[Member]) -> LayerView:
    return LayerView(_indexes(*layers), number)


def test_a_layer_alone_shows_its_whiteouts() -> None:
    view = _view(1, [file(b"a")], [whiteout(b"a"), file(b"b")])
    assert _names(view) == [b"a", b"b"]
    attr = view.attr(view.walk(b"a"))
    assert (attr.mode, attr.rdev) == (stat.S_IFCHR, 0)


@pytest.mark.parametrize("number", [0, 2])
def test_a_layer_alone_shows_no_other(number: int) -> None:
    view = _view(number, [file(b"d/0")], [file(b"d/1")], [file(b"d/2")])
    assert _names(view, b"d") == [b"%d" % number]


def test_a_layer_alone_shows_opaque_directories_in_both_spellings() -> None:
    view = _view(0, [directory(b"d"), opaque(b"d")])
    assert view.xattrs(view.walk(b"d")) == ((b"trusted.overlay.opaque", b"y"), (b"user.overlay.opaque", b"y"))


def test_a_layer_alone_implies_directories_by_itself() -> None:
    view = _view(1, [directory(b"d", 0o700)], [file(b"d/x")])
    assert view.attr(view.walk(b"d")).mode == stat.S_IFDIR | 0o755


def test_a_layer_alone_finds_what_its_links_lead_to_in_the_whole_image() -> None:
    layers = [file(b"d/a")], [file(b"d/other")], [hard_link(b"b", b"d/a")]
    assert _view(2, *layers).walk(b"b") == _lower(*layers).walk(b"d/a") != ()


def test_a_layer_alone_counts_its_own_names_of_a_file() -> None:
    view = _view(1, [file(b"a")], [hard_link(b"b", b"a"), hard_link(b"c", b"a")])
    assert view.attr(view.walk(b"b")).nlink == 2
