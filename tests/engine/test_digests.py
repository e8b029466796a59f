from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from paramdelta.engine.digests import LEAF, REGION, Digest, Digester

if TYPE_CHECKING:
    from collections.abc import Iterable

SIZES = [0, 1, 4096, LEAF - 1, LEAF, LEAF + 1, REGION - 1, REGION, REGION + 4097, 2 * REGION + 3 * LEAF]


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def by_definition(data: bytes) -> Digest:
    """What the module's first lines say, word for word."""
    regions = []
    for region in range(0, len(data), REGION):
        leaves = range(region, min(region + REGION, len(data)), LEAF)
        regions.append(sum(xxhash.xxh3_64_intdigest(data[at : at + LEAF], at // LEAF) for at in leaves) % 2**64)
    whole = xxhash.xxh3_128_hexdigest(b"".join(each.to_bytes(8, "little") for each in regions))
    return Digest(whole, tuple(f"{each:016x}" for each in regions))


def digest_of(data: bytes, pieces: Iterable[tuple[int, int]]) -> Digest:
    digester = Digester(len(data))
    for begin, end in pieces:
        digester.add(begin, memoryview(data)[begin:end])
    return digester.result()


@pytest.mark.parametrize("size", SIZES)
def test_in_one_piece_it_is_what_it_is_said_to_be(size: int) -> None:
    data = content(size)
    assert digest_of(data, [(0, size)]) == by_definition(data)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SIZES), st.sampled_from([512, 4096, 3 * 4096, LEAF, LEAF + 4096, REGION]), st.randoms())
def test_however_it_is_cut_and_in_whatever_order(size: int, piece: int, order: random.Random) -> None:
    data = content(size)
    pieces = [(begin, min(begin + piece, size)) for begin in range(0, size, piece)]
    order.shuffle(pieces)
    assert digest_of(data, pieces) == by_definition(data)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SIZES[1:]), st.data())
def test_one_flipped_bit_shows_in_its_region_and_nowhere_else(size: int, data: st.DataObject) -> None:
    good = bytearray(content(size))
    place = data.draw(st.integers(0, size - 1))
    before = digest_of(bytes(good), [(0, size)])
    good[place] ^= 1 << data.draw(st.integers(0, 7))
    after = digest_of(bytes(good), [(0, size)])
    assert before.whole != after.whole
    differing = [n for n, (one, other) in enumerate(zip(before.regions, after.regions, strict=True)) if one != other]
    assert differing == [place // REGION]


def test_leaves_that_change_places_show() -> None:
    data = content(2 * LEAF)
    swapped = data[LEAF:] + data[:LEAF]
    assert digest_of(data, [(0, len(data))]) != digest_of(swapped, [(0, len(data))])


def test_a_digest_of_half_a_file_is_none() -> None:
    digester = Digester(2 * LEAF)
    digester.add(4096, memoryview(content(LEAF)))
    with pytest.raises(ValueError, match="65536 bytes are missing"):
        digester.result()
