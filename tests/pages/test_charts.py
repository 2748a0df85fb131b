"""What matplotlib draws: the SVG of report and compare, loss.png and loss.pdf."""

import re
from pathlib import Path

import pytest

from hf_clm.pages.charts import Chart, Series, to_series, write_loss_plots
from hf_clm.run_folder import METRICS

TRAIN = [
    {"step": 1, "epoch": 0.5, "loss": 2.0, "tokens_seen": 50},
    {"step": 2, "epoch": 1.0, "loss": 1.0, "tokens_seen": 100},
]
EVALUATION = {"step": 2, "epoch": 1.0, "eval_loss": 1.5}


def chart(*values: float, key: str = "loss", **more) -> Chart:
    return Chart(METRICS[key], [Series("training", list(enumerate(values)))], **more)


def ticks(one: Chart) -> list[str]:
    return re.findall("<text[^>]*>(.*?)</text>", one.to_svg())


def test_a_chart_follows_the_colours_of_its_page_and_holds_nothing_that_its_policy_refuses():
    svg = chart(4.0, 1.0, level=("clipped at 1", 1.0)).to_svg()

    assert svg.startswith('<svg class="plot" viewBox="0 0 340 190" aria-hidden="true">')
    assert 'stroke="var(--s0)"' in svg and 'stroke="var(--line)"' in svg and 'fill="var(--quiet)"' in svg
    assert "#" not in re.sub(r"url\(#|href=\"#", "", svg)
    assert not re.search(r"style|font|<script|<image|<g id|http://(?!www.w3.org)", svg)


@pytest.mark.parametrize(
    ("one", "shown"),
    [
        (chart(4.0, 0.1, 1.0), ["0", "1", "2", "0", "1", "2", "3", "4"]),  # steps, then losses
        (chart(1.2, 1.1), ["0", "1", "1.1", "1.125", "1.15", "1.175", "1.2"]),
        (chart(0.9, 0.95, key="token_accuracy"), ["0", "1", "0%", "20%", "40%", "60%", "80%", "100%"]),
        (chart(2e9, 3e9, key="peak_memory_bytes"), ["0", "1", "0 GB", "1 GB", "2 GB", "3 GB"]),
        (chart(0.0, 0.0, key="learning_rate")._replace(axis="hours"), None),
    ],
)
def test_an_axis_has_a_few_round_ticks_and_begins_at_0_where_that_helps(one, shown):
    assert ticks(one) == shown if shown else len(ticks(one)) > 3


def test_a_level_is_drawn_where_it_is_near_the_values_and_named_where_it_is_not():
    near, far = chart(0.5, 2.0, level=("clipped at 1", 1.0)), chart(0.5, 2.0, level=("clipped at 50", 50.0))

    assert "var(--on-bad)" in near.to_svg()
    assert "var(--on-bad)" not in far.to_svg()


def test_evaluations_are_markers_and_a_seventh_line_is_dashed():
    lines = [Series(str(number), [(0, 1.0), (1, number)], dots=number == 1) for number in range(7)]
    svg = Chart(METRICS["loss"], lines).to_svg()

    assert svg.count("stroke-dasharray") == 1
    assert svg.count("<use") == 2


@pytest.mark.parametrize(
    ("evaluations", "training", "lines"),
    [
        ([(0, 7.0), (9, 1.0)], [], 0),  # before and after: no diagonal
        ([(0, 7.0), (5, 2.0), (9, 1.0)], [], 1),
        ([(0, 7.0), (5, 2.0), (9, 1.0)], [(1, 6.0), (9, 1.0)], 1),  # the line is that of the training
    ],
)
def test_markers_are_joined_where_there_are_several_and_no_line_shows_the_way(evaluations, training, lines):
    series = [Series("training", training), Series("evaluation", evaluations, dots=True)]
    svg = Chart(METRICS["loss"], series).to_svg()

    drawn = re.findall(r'<path d="M [^"]*" [^>]*stroke="var\(--s[01]\)"[^>]*stroke-linecap', svg)
    assert len(drawn) == lines
    assert svg.count("<use") == len(evaluations)


def test_a_hundred_thousand_points_are_a_small_picture():
    assert len(chart(*(step % 97 for step in range(100_000))).to_svg()) < 50_000


def test_training_is_drawn_beside_every_evaluation_that_logs_the_figure():
    metrics = [*TRAIN, EVALUATION, {"step": 2, "eval_train_loss": 0.9, "eval_news_loss": 3.0}]

    assert to_series(metrics, "loss", sets=["news", "silent"]) == [
        Series("training", [(1, 2.0), (2, 1.0)]),
        Series("evaluation", [(2, 1.5)], dots=True),
        Series("evaluation on training rows", [(2, 0.9)], dots=True),
        Series("news", [(2, 3.0)], dots=True),
    ]


def size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


@pytest.mark.parametrize(
    "metrics",
    [[*TRAIN, EVALUATION], [TRAIN[0]], [{"step": 1, "epoch": 0.0, "loss": 2.0, "tokens_seen": 5}]],
)
def test_the_plot_is_a_png_and_a_pdf(tmp_path, metrics):
    write_loss_plots(metrics, tmp_path)

    assert size(tmp_path / "loss.png") == (1040, 585)
    assert (tmp_path / "loss.pdf").read_bytes().startswith(b"%PDF-")


def test_without_a_training_loss_there_is_no_plot(tmp_path):
    write_loss_plots([EVALUATION], tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_both_curves_and_the_tokens_are_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *args, **kwargs: drawn.append(figure)
    )

    write_loss_plots([*TRAIN, EVALUATION], tmp_path)

    axes = drawn[0].axes[0]
    curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert curves == {"training": ([0.5, 1.0], [2.0, 1.0]), "evaluation": ([1.0], [1.5])}
    assert axes.child_axes[0].get_xlabel() == "tokens seen"
    assert axes.child_axes[0]._functions[0](0.5) == 50.0
