"""Leaves out every record of a run in turn, and measures what that does to every answer.

    python tests/benchmarks/leave_out.py RUN --out effects.json [--records 48]

For the poems recipe (48 records, 1,200 steps) it takes about 1.5 hours on one core. The file has what each
replay measured, so a script that was stopped continues with the next one.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from hf_clm.evaluation.likelihood import measure_rows
from hf_clm.recipe.recipe import load_recipe
from hf_clm.replay.replays import Replays, first_use, replaying


def measure(replays: Replays, left_out: list[int]) -> list[float]:
    """Returns the log-probability of each record's targets after a replay of the run without some records."""
    end = replays.last
    inputs = replays.inputs_of(end)
    first = min((first_use(inputs, record) for record in left_out), default=1)
    begin = max((s for s in replays.states if s.is_resumable and s.step < first), key=lambda s: s.step)
    trainer = replays.replay(begin, end.step, end=end, left_out=left_out)
    rows = inputs.prepared.splits["train"].rows
    assert len(rows) == len(inputs.prepared.splits["train"].ledger), "one row for each record"
    return [float(-measure_rows(trainer.model, [rows[i]])[0][0].sum()) for i in range(len(rows))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--records", type=int, help="leave out the first N records only")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    with replaying(options.run, load_recipe(Path(options.run) / "recipe.yaml")) as replays:
        if "nothing" not in found:
            found["nothing"] = measure(replays, [])
        for record in range(options.records or len(found["nothing"])):
            if str(record) in found:
                continue
            started = time.monotonic()
            found[str(record)] = measure(replays, [record])
            options.out.write_text(json.dumps(found))
            own = found["nothing"][record] - found[str(record)][record]
            print(f"without record {record}: {own:+.2f} nats, {time.monotonic() - started:.0f} s", flush=True)
    effects = np.array([np.subtract(found["nothing"], found[key]) for key in found if key != "nothing"])
    numbers = range(len(effects))
    own = effects[numbers, numbers]
    others = np.abs(effects[~np.eye(*effects.shape, dtype=bool)])
    right = sum(effects[:, i].argmax() == i for i in numbers)
    print(f"{right} of {len(effects)} answers depend most on their own record")
    print(f"own record: {own.min():.1f} to {own.max():.1f} nats, median {np.median(own):.1f}")
    print(f"other records: median {np.median(others):.3f}, largest {others.max():.2f}")
    print(f"largest share of another record in its answer: {(others.max() / own.min()):.3f}")


if __name__ == "__main__":
    main()
