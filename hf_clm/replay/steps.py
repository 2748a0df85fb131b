"""``hf-clm why --step`` and ``--without``: what happened at a step, and a run without a record."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from hf_clm.data.batch.packing import RowPiece
from hf_clm.data.label.labels import slice_row
from hf_clm.data.split import Split, find_records
from hf_clm.evaluation.likelihood import predict_targets
from hf_clm.pages.documents import Reader, pieces_of
from hf_clm.pages.labels import write_labels
from hf_clm.pages.rows import Document, Row
from hf_clm.recipe.recipe import Recipe
from hf_clm.recipe.sections import TRAIN
from hf_clm.replay.replays import Replays, first_use, replaying, step_rows
from hf_clm.schema import IGNORE_INDEX, TokenizedExample
from hf_clm.training.output import is_in_use
from hf_clm.training.run import run
from hf_clm.training.trainer import CLMTrainer

SHOWN_DOCUMENTS = 10  # in the terminal


@dataclass(frozen=True)
class DocumentLoss:
    """A document of a step: its loss and its gradient.

    nll     the sum of the losses of its targets, each times its weight, in nats
    weight  the sum of the weights of its targets
    norm    the Euclidean norm of the gradient of ``nll``, over all trained weights
    """

    piece: RowPiece
    row: TokenizedExample
    nll: float
    weight: float
    norm: float


def inspect_step(options: Namespace, recipe: Recipe) -> list[str]:
    """Measures each document of a step with the model before it, writes the page, and returns lines to print.

    Raises RecipeError for a step that the run does not have.
    """
    page = options.html or Path(options.run) / f"step-{options.step}.html"
    with replaying(options.run, recipe) as replays:
        end = replays.state_at(options.step, where="--step")
        inputs = replays.inputs_of(end)
        numbers = step_rows(inputs, options.step)
        trainer = replays.model_at(options.step - 1)
        split = inputs.prepared.splits[TRAIN]
        reader = Reader(split, inputs.tokenizer, recipe=inputs.settled)
        measured = measure_documents(trainer, split, numbers.tolist())
        weight = sum(one.weight for one in measured)
        loss = sum(one.nll for one in measured) / weight if weight else 0.0
        rows = [_annotated(reader, number, one, weight=weight) for number, one in enumerate(measured)]
        rows = sorted(rows, key=lambda row: -(row.documents[0].loss or 0.0))
        facts = {"step": f"{options.step:,} of {replays.run.record.steps:,}, {len(rows)} documents"}
        facts |= {"loss": f"{loss:.4f} before the step, without dropout"} | _logged_at(replays, options.step)
        if replays.arguments.process_index == 0:
            facts = {"from": options.run, **facts}
            title = f"Step {options.step:,}"
            write_labels(page, rows, vocabulary=reader.vocabulary, facts=facts, title=title)
    lines = [f"{name:<9} {value}" for name, value in facts.items()]
    lines += [f"{row.documents[0].place}: {row.documents[0].note}" for row in rows[:SHOWN_DOCUMENTS]]
    return [*lines, f"wrote {page}: {len(rows)} documents, worst first"]


def measure_documents(trainer: CLMTrainer, split: Split, numbers: Sequence[int]) -> list[DocumentLoss]:
    """Measures the documents of training rows one by one, without dropout.

    The gradient is that of a document's share of the step: of its loss, divided by the weights of all.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    measured = []
    model.eval()
    for piece in (piece for number in numbers for piece in pieces_of(split, number)):
        row = slice_row(split.rows[piece[0]], start=piece[1], stop=piece[2])
        with trainer.compute_loss_context_manager():
            logits, targets, weights = predict_targets(model, [row])
        weights = weights * (targets != IGNORE_INDEX)
        nll = (cross_entropy(logits.float(), targets, reduction="none") * weights).sum()
        gradients = torch.autograd.grad(nll, trained, allow_unused=True)
        squares = [part.double().square().sum() for part in gradients if part is not None]
        norm = float(torch.stack(squares).sum().sqrt())
        measured.append(DocumentLoss(piece, row, float(nll.detach()), float(weights.sum()), norm))
    return measured


def train_without(options: Namespace, recipe: Recipe) -> list[str]:
    """Trains again from the last checkpoint before the first use of a record, without it, into a new folder.

    If the folder has a part of that training already, resumes it.
    """
    with replaying(options.run, recipe) as replays:
        inputs = replays.inputs_of(replays.last)
        split = inputs.prepared.splits[TRAIN]
        (record,) = find_records(split, [options.without], where="--without")
        place, first = split.ledger.places[record], first_use(inputs, record)
        begin = replays.last_before(first)
    name = place.rpartition(":")[2].strip().replace(" ", "-")
    folder = Path(options.output_dir or f"{replays.run.path.resolve()}-without-{name}")
    replays.say(f"without   {place}, which step {first:,} is the first to use: trains from {begin.name}")
    checkpoint = str(begin.folder) if begin.folder and not is_in_use(folder) else None
    train = {**recipe.train, "output_dir": str(folder), "resume_from_checkpoint": checkpoint}
    train["push_to_hub"] = False  # the repository is that of the complete run
    data = recipe.data.model_copy(update={"without": [*recipe.data.without, place]})
    run(recipe.model_copy(update={"data": data, "train": train, "resume_override": ["data.without"]}))
    return []


def _annotated(reader: Reader, number: int, document: DocumentLoss, *, weight: float) -> Row:
    """Returns a measured document as a row of the page. ``weight``: the sum of all weights of the step."""
    ids, labels = (np.array(document.row[name]) for name in ("input_ids", "labels"))
    row = reader.annotate(Row(number, ids, labels, (Document(0, len(ids)),)), [document.piece])
    loss = document.nll / document.weight if document.weight else 0.0
    note = f"loss {loss:.3f}, gradient norm {document.norm / weight if weight else 0.0:.3f}"
    return replace(row, documents=(replace(row.documents[0], loss=loss, note=note),))


def _logged_at(replays: Replays, step: int) -> dict[str, str]:
    """Returns what the run logged at a step; it logs the mean over the steps since the event before."""
    entry = next((one for one in replays.run.metrics if one["step"] == step and "loss" in one), {})
    keys = ("loss", "grad_norm", "learning_rate")
    logged = [f"{key} {entry[key]:.4g}" for key in keys if key in entry]
    return {"logged": ", ".join(logged)} if logged else {}
