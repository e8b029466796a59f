"""What the benchmark's fairness rests on."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from bench.run import balanced_order


@pytest.mark.parametrize("count", range(1, 9))
def test_everybody_follows_everybody_equally_often(count: int) -> None:
    rounds = [balanced_order(count, number) for number in range(2 * count if count % 2 else count)]
    assert all(sorted(order) == list(range(count)) for order in rounds)
    followed = Counter(pair for order in rounds for pair in pairwise(order))
    assert len(followed) == count * (count - 1)
    assert len(set(followed.values())) <= 1
