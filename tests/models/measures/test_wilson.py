"""Wilson's interval, against its definition: the shares that a test of the normal approximation does not refuse."""

import math

import pytest

from models.measures.wilson import Z95, wilson


@pytest.mark.parametrize(("share", "trials"), [(0.5, 4), (0.917, 150), (0.03, 68), (1.0, 20), (0.0, 1)])
def test_the_ends_are_the_shares_from_which_what_was_seen_is_1_96_deviations_away(share, trials):
    for end in wilson(share, trials):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / trials))


def test_all_right_is_no_certainty_and_more_trials_are_narrower():
    low, high = wilson(1.0, 20)
    assert (round(low, 3), high) == (0.839, 1.0)
    assert wilson(1.0, 200)[0] > low


def test_no_trials_are_refused():
    with pytest.raises(ValueError, match="0 trials tell no share"):
        wilson(0.0, 0)
