"""Numbers as the geometry of a chart; places are percent of the plot, from the left and from the top."""

import pytest

from hf_clm.pages.charts import Axis, Rule, Series, Style, draw, nice_ticks, thin

STEP = Axis("step", "{:g}".format, least=1)
LOSS = Style("Loss", "nats", "{:g}".format)


def chart(*series: Series, rule: Rule | None = None, style: Style = LOSS):
    found = draw(style, series, axis=STEP, rule=rule)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 4, [0, 1, 2, 3, 4]),
        (0.3, 7.2, [0, 2, 4, 6, 8]),  # 0.3 is near 0, compared with 7.2
        (6.1, 7.2, [6, 6.5, 7, 7.5]),
        (0, 0.002, [0, 0.0005, 0.001, 0.0015, 0.002]),
        (-3, 5, [-4, -2, 0, 2, 4, 6]),
        (5, 5, [4.5, 4.75, 5, 5.25, 5.5]),
        (0, 0, [0, 0.25, 0.5, 0.75, 1]),
        (0, 360, [0, 100, 200, 300, 400]),
    ],
)
def test_an_axis_has_a_few_round_ticks_around_its_values(low, high, ticks):
    assert nice_ticks(low, high) == ticks


def test_an_axis_begins_at_0_where_that_is_asked():
    assert nice_ticks(90, 100, from_zero=True) == [0, 25, 50, 75, 100]


@pytest.mark.parametrize(
    ("high", "ticks"),
    [(1, [0, 1]), (3, [0, 1, 2, 3]), (10, [0, 5, 10]), (100, [0, 25, 50, 75, 100]), (2, [0, 1, 2])],
)
def test_there_is_no_half_step(high, ticks):
    assert nice_ticks(0, high, least=1) == ticks


@pytest.mark.parametrize(("low", "high"), [(1e-99, 1e-98), (-1e99, 1e99), (1e15, 1e15 + 1), (-2e-9, 3e-9)])
def test_no_range_is_too_small_or_too_large(low, high):
    ticks = nice_ticks(low, high)

    assert 3 <= len(ticks) <= 7
    assert ticks[0] <= low and high <= ticks[-1]


def test_a_line_runs_from_the_first_to_the_last_point():
    found = chart(Series("training", [(0, 4.0), (5, 1.0), (10, 0.0)]))

    assert [(line.name, line.path, line.band, line.dots) for line in found.lines] == [
        ("training", "M0 0L500 750L1000 1000", "", "")
    ]
    assert [(tick.place, tick.text) for tick in found.y_ticks] == [
        (100, "0"),
        (75, "1"),
        (50, "2"),
        (25, "3"),
        (0, "4"),
    ]
    assert [(tick.place, tick.text) for tick in found.x_ticks] == [
        (0, "0"),
        (50, "5"),
        (100, "10"),
    ]
    assert found.note == "nats, by step"


def test_few_values_are_dots_and_so_is_one_value_alone():
    found = chart(Series("evaluation", [(0, 4.0), (10, 0.0)], dots=True), Series("b", [(10, 4.0)]))

    assert [line.dots for line in found.lines] == ["M0 0h0M1000 1000h0", "M1000 0h0"]


def test_a_series_without_a_point_is_left_out_and_the_others_keep_their_colour():
    found = chart(Series("a", []), Series("b", [(1, 2.0)]))

    assert [(line.number, line.name) for line in found.lines] == [(1, "b")]
    assert draw(LOSS, [Series("a", [])], axis=STEP) is None


def test_the_pointer_reads_the_last_value_of_each_series_in_a_part():
    found = chart(Series("a", [(0, 4.0), (60, 1.0)]), Series("b", [(59.5, 2.0), (60, 3.0)]))

    assert [(reading.left, reading.x, reading.values) for reading in found.readings] == [
        (0, "step 0", [(0, "a", "4")]),
        (98.333, "step 60", [(0, "a", "1"), (1, "b", "3")]),
    ]


def test_a_level_is_drawn_where_it_is_near_the_values_and_named_where_it_is_not():
    values = Series("norm", [(0, 0.5), (10, 2.0)])
    near = chart(values, rule=Rule("clipped at 1", 1.0))
    far = chart(values, rule=Rule("clipped at 50", 50.0))

    assert (near.rule, near.rule_text) == (50, "clipped at 1")
    assert (far.rule, far.rule_text, far.y_ticks[-1].text) == (None, "clipped at 50, far above", "2")


def test_many_points_are_their_mean_in_a_band_that_keeps_every_spike():
    points = [(float(step), 1.0) for step in range(1000)]
    points[600] = (600.0, 9.0)

    groups = thin(points)
    found = chart(Series("training", points))

    assert [len(group) for group in groups] == [4] * 250
    assert found.y_ticks[-1].text == "10"
    assert found.lines[0].path.count("L") == 249
    assert " 700L" in found.lines[0].path  # the mean of 1, 1, 1 and 9 is 3 of 10
    assert " 100L" in found.lines[0].band  # 9 of 10
    assert found.lines[0].band.count("L") == 499


def test_500_points_are_drawn_as_they_are():
    found = chart(Series("training", [(float(step), 1.0) for step in range(500)]))

    assert found.lines[0].path.count("L") == 499
    assert found.lines[0].band == ""
