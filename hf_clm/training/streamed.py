"""What a run over a stream says at its end: what was read, and what became of it, on all processes."""

from collections import Counter
from typing import Any

from accelerate.utils import gather_object

from hf_clm.data.prepared.division import furthest
from hf_clm.data.prepared.stream import StreamedRows
from hf_clm.training.trainer import CLMTrainer


def stream_totals(trainer: CLMTrainer) -> dict[str, Any] | None:
    """Shards, passes of the slowest and the fastest of them, documents by their fate; None without a stream.

    Counted are the blocks that were begun. Every process has to ask.
    """
    rows = trainer.train_dataset
    if not isinstance(rows, StreamedRows):
        return None
    found = furthest(gather_object([position for position in rows.positions.values() if position.steps]))
    epochs, fates = [min(place.epoch for place in position.places) for position in found], Counter()
    for place in (place for position in found for place in position.places):
        fates.update(place.counts)
    everyone = len(found) == rows.plan.shards  # else a shard was not asked yet
    passes = [min(epochs) if everyone else 0, max(epochs, default=0)]
    return {
        "shards": rows.plan.shards,
        "shuffle_buffer": rows.identity["documents"],
        "passes": passes,
        "documents": sum(fates.values()),
        "fates": dict(sorted(fates.items())),
    }
