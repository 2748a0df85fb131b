"""loss.png and loss.pdf."""

from pathlib import Path

import pytest
from hf_clm.training.plots import write_loss_plots

TRAIN = [
    {"step": 1, "epoch": 0.5, "loss": 2.0, "tokens_seen": 50},
    {"step": 2, "epoch": 1.0, "loss": 1.0, "tokens_seen": 100},
]
EVALUATION = {"step": 2, "epoch": 1.0, "eval_loss": 1.5}


def size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


@pytest.mark.parametrize(
    "metrics",
    [TRAIN, [*TRAIN, EVALUATION], [TRAIN[0]], [{"step": 1, "epoch": 0.0, "loss": 2.0, "tokens_seen": 5}]],
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

    watched = {"step": 2, "epoch": 1.0, "eval_train_loss": 0.9}
    write_loss_plots([*TRAIN, EVALUATION, watched], tmp_path)

    axes = drawn[0].axes[0]
    curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert curves == {
        "training": ([0.5, 1.0], [2.0, 1.0]),
        "evaluation": ([1.0], [1.5]),
        "training rows, evaluated": ([1.0], [0.9]),
    }
    assert axes.child_axes[0].get_xlabel() == "tokens seen"
    assert axes.child_axes[0]._functions[0](0.5) == 50.0
