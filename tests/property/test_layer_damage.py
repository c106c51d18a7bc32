"""LayerIndex: whatever the bytes are, StoreDamaged is all that comes of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rig.indexes import decoded_pages, repacked, touch_everything
from rig.tars import entry

from fusestore.errors import StoreDamaged
from fusestore.layer import LayerBuilder, LayerIndex
from fusestore.nodes import Extent


def sound() -> bytes:
    builder = LayerBuilder()
    for found in (
        entry(b"d/f", xattrs=((b"user.a", b"b"),), size=9, data=(Extent(1, 2, 512), Extent(5, 1, 514))),
        entry(b"d/g", b"1", link=b"d/f"),
        entry(b"d/lower", b"1", link=b"x/y"),
        entry(b"d/.wh.gone"),
        entry(b"s", b"2", link=b"d"),
        *(entry(b"m/%d" % number) for number in range(520)),
    ):
        builder.add(found)
    return builder.finish(4096)


SOUND = sound()
HEAD, PAGES = decoded_pages(SOUND)
DAMAGE = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4
)


def damaged(data: bytes, damage: list[tuple[int, bytes]]) -> bytes:
    changed = bytearray(data)
    for place, value in damage:
        place %= len(data)
        changed[place : place + len(value)] = value
    return bytes(changed[: len(data)])


def test_it_is_sound_to_begin_with() -> None:
    assert not touch_everything(SOUND, most=600)


@settings(deadline=None)
@given(DAMAGE)
def test_damage_anywhere_is_found(damage: list[tuple[int, bytes]]) -> None:
    data = damaged(SOUND, damage)
    # A frame of zstd has bits that decoders ignore.
    assert touch_everything(data) or decoded_pages(data) == (HEAD, PAGES)


@settings(deadline=None)
@given(st.integers(0, len(SOUND) - 1))
def test_truncation_is_found_when_opened(length: int) -> None:
    with pytest.raises(StoreDamaged):
        LayerIndex(SOUND[:length])


@settings(deadline=None)
@given(DAMAGE, DAMAGE, DAMAGE)
def test_lies_under_right_checksums_raise_nothing_else(
    head: list[tuple[int, bytes]], blocks: list[tuple[int, bytes]], records: list[tuple[int, bytes]]
) -> None:
    touch_everything(repacked(HEAD, [damaged(PAGES[0], blocks), damaged(PAGES[1], records)]))
    touch_everything(repacked(HEAD[:16] + damaged(HEAD[16:], head), PAGES))


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_junk_is_no_index(junk: bytes) -> None:
    with pytest.raises(StoreDamaged):
        LayerIndex(junk)
