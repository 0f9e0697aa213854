"""Parameters of test matrices, most of which are long tests."""

import pytest


def one_of_each(firsts, seconds, short, others=pytest.mark.long) -> list:
    """Parameters (first, second) of all combinations. Those that are not in `short` get the marks `others`.

    short: a set of combinations in which each of `firsts` and each of `seconds` comes.
    """
    assert {first for first, _ in short} == set(firsts) and {second for _, second in short} == set(seconds)
    marks = {True: (), False: others}
    return [
        pytest.param(first, second, marks=marks[(first, second) in short]) for first in firsts for second in seconds
    ]
