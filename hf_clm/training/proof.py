"""What a run proves before its first step: labels, ledger, loss, and that what it saves opens again."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerFast

from hf_clm.chat_template import stop_token_ids
from hf_clm.config import Recipe
from hf_clm.data.build import Split
from hf_clm.data.certificate import Certificate, LabelOptions, certify
from hf_clm.data.ledger import build_ledger, check_balance, check_leakage, measure_leakage, write_ledgers
from hf_clm.data.packing import PackedDataset
from hf_clm.doctor.round_trip import FOLDER, RoundTrip, start_round_trip
from hf_clm.doctor.selftest import SelfTest, self_test
from hf_clm.training.callbacks import write_line
from hf_clm.training.trainer import CLMTrainer


@dataclass
class Proof:
    """What was proved: for run.json, and as lines to print."""

    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def prove_data(
    recipe: Recipe,
    splits: Mapping[str, Split],
    *,
    tokenizer: PreTrainedTokenizerFast,
    output_dir: Path,
) -> Proof:
    """Certifies the labels of every row, balances and writes the ledger, compares the sets.

    Args:
        splits: train and, if there is one, eval.

    Raises DataError for labels that are not certified, a ledger that does not balance, and training rows
    among the evaluation rows.
    """
    proof, ledgers = Proof(), {}
    for name, split in splits.items():
        certificate = certify_split(recipe, split, tokenizer=tokenizer)
        certificate.require()
        packed = split.dataset if isinstance(split.dataset, PackedDataset) else None
        examples = split.examples
        lost = {"unreadable": examples.report.bad_lines, "duplicates": examples.duplicates}
        ledger = build_ledger(split.rows.rows, examples.places, packed=packed, **lost)
        check_balance(ledger, split.rows.rows, packed=packed)
        ledgers[name] = ledger
        proof.facts[name] = {"certificate": certificate.to_json(), "ledger": ledger.totals()}
        heads = [name, *[""] * len(ledger.rows)]
        proof.lines += [f"{head:<10}{line}" for head, line in zip(heads, ledger.to_lines(), strict=False)]
        seconds = f"{certificate.seconds:.1f} s, sha256 {certificate.content_hash[:12]}"
        proof.lines.append(f"{'':<10}the labels of all {certificate.rows:,} rows are certified ({seconds})")
    write_ledgers(ledgers, output_dir / "ledger.parquet")
    if "eval" in splits:
        train, evaluation = splits["train"].examples, splits["eval"].examples
        leakage = measure_leakage(train.examples, evaluation.examples, places=evaluation.places)
        if leakage.share:
            proof.lines.append(f"note      {leakage.share:.1%} of the evaluation rows are training rows")
        check_leakage(leakage, recipe.data.max_leakage)
        proof.facts["leakage"] = {"exact": len(leakage.exact), "normalised": len(leakage.normalised)}
    return proof


def certify_split(recipe: Recipe, split: Split, *, tokenizer: PreTrainedTokenizerFast) -> Certificate:
    """The certificate of a tokenized set under the recipe's label options."""
    options = LabelOptions(
        stage=recipe.stage,
        train_on=recipe.data.train_on,
        special_tokens_in_text=recipe.data.special_tokens_in_text,
        overflow=recipe.resolved_overflow,
        stop_ids=tuple(stop_token_ids(tokenizer)),
    )
    places, examples = split.examples.places, split.examples.examples
    return certify(split.rows.rows, examples, tokenizer=tokenizer, options=options, places=places)


def prove_model(
    trainer: CLMTrainer, recipe: Recipe, *, split: Split, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Tests the loss on the real model and data while a fresh process opens the saved model. Rank 0 only.

    Returns what run.json holds of it; a test that was turned off, or cannot be made, says so.
    Raises ModelError where a test fails.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return {"self_test": "off: the model is sharded", "round_trip": "off: the model is sharded"}
    proof: dict[str, Any] = {"self_test": "off", "round_trip": recipe.doctor.round_trip}
    folder = Path(str(trainer.args.output_dir)) / FOLDER
    trip: RoundTrip | None = None
    try:
        if recipe.doctor.round_trip == "start":
            trainer.save_model(str(folder), _internal_call=True)
            trip = start_round_trip(folder, split.dataset[0]["input_ids"])
        if recipe.doctor.self_test:
            result = measure_self_test(trainer, split, tokenizer=tokenizer)
            result.require()
            proof["self_test"] = result.to_json()
            write_line(f"loss      packed, padded and alone are one: tested on {result.documents} documents")
        if trip is not None:
            proof["round_trip"] = finish_round_trip(trainer, trip, tokenizer=tokenizer)
    finally:
        if trip is not None and trip.process.poll() is None:
            trip.process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    return proof


def measure_self_test(trainer: CLMTrainer, split: Split, *, tokenizer: PreTrainedTokenizerFast) -> SelfTest:
    """The self-test of the loss as this run computes it."""
    arguments = trainer.args
    autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    pad: Any = tokenizer.pad_token_id
    model, examples = (cast(Any, part) for part in (trainer.model, split.rows))
    return self_test(model, examples, pad_token_id=pad, autocast=autocast)


def prove_saved(trainer: CLMTrainer, *, split: Split, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The round trip of the final model (``doctor.round_trip: end``)."""
    trip = start_round_trip(Path(str(trainer.args.output_dir)), split.dataset[0]["input_ids"])
    return finish_round_trip(trainer, trip, tokenizer=tokenizer)


def finish_round_trip(
    trainer: CLMTrainer, trip: RoundTrip, *, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Compares, and prints that the saved model opens."""
    found = trip.finish(trainer.accelerator.unwrap_model(trainer.model), tokenizer)
    write_line(
        "opens     with plain from_pretrained in a fresh process, with the same logits, tokens and template"
    )
    return found
