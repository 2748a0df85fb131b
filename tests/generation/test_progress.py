"""What an evaluation shows while it goes on."""

import io
import sys
from itertools import count

import pytest

from hf_clm.generation.progress import watched


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        (0.01, []),
        (1.0, [
            "loss: 276 of 1,100 rows in 69 s, 206 s left",
            "loss: 552 of 1,100 rows in 138 s, 137 s left",
            "loss: 828 of 1,100 rows in 207 s, 68 s left",
        ]),
    ],
    ids=["short", "long"],
)  # fmt: skip
def test_a_long_evaluation_says_three_times_in_a_file_how_far_it_is(seconds, lines, monkeypatch, capsys):
    clock = count()
    monkeypatch.setattr("hf_clm.generation.progress.time.monotonic", lambda: next(clock) * seconds)

    assert list(watched(range(0, 1100, 4), what="loss")) == list(range(0, 1100, 4))
    assert capsys.readouterr().err.splitlines() == lines


def test_on_a_terminal_a_bar_counts_the_rows(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)

    for start in watched(range(0, 10, 4), what="answers"):
        assert start in (0, 4, 8)

    assert "answers:   0%|" in shown.getvalue()
    assert "0/10 [" in shown.getvalue()
