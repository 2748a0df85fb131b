"""How far a long command has come, on stderr: a bar on a terminal, else up to three lines."""

import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

SILENT_SECONDS = 10.0  # of a command whose stderr is a file: a shorter one prints nothing
QUARTERS = 4


def watched(batches: range, *, what: str) -> Iterator[int]:
    """Yields the first row of each batch, and shows how many rows are done and what time is left.

    Args:
        batches: ``range(0, rows, batch_size)``.
        what: is measured, such as "loss".
    """
    started, said, rows = time.monotonic(), 0, batches.stop
    with tqdm(total=rows, desc=what, unit="row", disable=not sys.stderr.isatty(), leave=False) as bar:
        for start in batches:
            yield start
            done = min(start + batches.step, rows)
            bar.update(done - start)
            seconds, quarter = time.monotonic() - started, done * QUARTERS // rows
            if bar.disable and said < quarter < QUARTERS and seconds > SILENT_SECONDS:
                said = quarter
                left = seconds / done * (rows - done)
                sys.stderr.write(f"{what}: {done:,} of {rows:,} rows in {seconds:.0f} s, {left:.0f} s left\n")
