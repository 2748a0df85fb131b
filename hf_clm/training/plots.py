"""loss.png and loss.pdf: training and evaluation loss over epochs, with the tokens seen on a second axis."""

from pathlib import Path
from typing import Any


def write_loss_plots(metrics: list[dict[str, Any]], folder: Path) -> None:
    """Draws the entries of ``metrics.jsonl`` as picture and as PDF. Nothing where there is no loss yet."""
    from matplotlib.figure import Figure  # half a second to import, and no global state as pyplot has

    train = [entry for entry in metrics if "loss" in entry]
    evaluated = [entry for entry in metrics if "eval_loss" in entry]
    if not train:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(_column(train, "epoch"), _column(train, "loss"), label="training", linewidth=1.2)
    if evaluated:
        axes.plot(
            _column(evaluated, "epoch"),
            _column(evaluated, "eval_loss"),
            "o--",
            label="evaluation",
            markersize=4,
        )
    if watched := [entry for entry in metrics if "eval_train_loss" in entry]:
        points = _column(watched, "epoch"), _column(watched, "eval_train_loss")
        axes.plot(*points, "s:", label="training rows, evaluated", markersize=3)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss (nats per token)")
    highest = max(_column(train, "loss") + _column(evaluated, "eval_loss"))
    axes.set_ylim(0, 1.05 * highest)
    axes.grid(alpha=0.3)
    axes.legend()
    last = train[-1]
    if last["epoch"] > 0:
        rate = last["tokens_seen"] / last["epoch"]
        top = axes.secondary_xaxis("top", functions=(lambda x: x * rate, lambda x: x / rate))
        top.set_xlabel("tokens seen")
    for name in ("loss.png", "loss.pdf"):
        figure.savefig(folder / name, dpi=130)


def _column(entries: list[dict[str, Any]], key: str) -> list[float]:
    return [entry.get(key, 0.0) for entry in entries]
