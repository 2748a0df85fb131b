"""Numbers as people read them."""

import pytest

from hf_clm.pages import figures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00025, "0.00025"),
        (1.98e-5, "1.98e-05"),
        (4.62416, "4.624"),
        (-3.5, "-3.5"),
        (6843.2, "6,843"),
        (151936, "151,936"),
        (2_500_000, "2.5M"),
        (50_000_000_000, "50B"),
    ],
)
def test_a_number_is_short(value, text):
    assert figures.to_short(value) == text


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (figures.to_loss, 4.62416, "4.6242"),
        (figures.to_count, 29110.4, "29,110"),
        (figures.to_percent, 0.15195, "15.2%"),
        (figures.to_percent, 0.0025, "0.25%"),
        (figures.to_percent, 1, "100%"),
        (figures.to_gigabytes, 1_234_567_890, "1.23 GB"),
    ],
)
def test_a_number_has_its_unit(write, value, text):
    assert write(value) == text
