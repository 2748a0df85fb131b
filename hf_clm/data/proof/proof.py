"""What is proved of a prepared set, for run.json and as lines to print."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.label.datasets import label_options
from hf_clm.data.label.labels import encode_prompts
from hf_clm.data.proof.balance import check_packing
from hf_clm.data.proof.certificate import Certificate
from hf_clm.data.proof.leakage import Leakage, check_leakage
from hf_clm.data.proof.ledger import Totals
from hf_clm.data.split import Split
from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Recipe
from hf_clm.recipe.sections import EVAL
from hf_clm.schema import TokenizedExample

COMPARED = 50  # rows whose prompt is rendered again as for generation


@dataclass
class Proof:
    """What was proved: for run.json, and as lines to print."""

    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def enter(self, name: str, certificate: Certificate, *, totals: Totals, compared: int) -> None:
        """What was proved of a split; ``compared``: prompts."""
        self.facts[name] = {"certificate": certificate.to_json(), "ledger": totals.to_json()}
        first, *others = totals.to_lines()
        self.lines += [f"{name:<10}{first}", *(f"{'':<10}{line}" for line in others)]
        seconds = f"{certificate.seconds:.1f} s, sha256 {certificate.content_hash[:12]}"
        self.lines.append(f"{'':<10}the labels of all {certificate.rows:,} rows are certified ({seconds})")
        if compared:
            self.lines.append(f"{'':<10}the first {compared} prompts are what generate is given")

    def enter_leakage(self, name: str, leakage: Leakage, *, max_leakage: float) -> None:
        """What was found of training rows in an evaluation set; raises DataError for too many."""
        of = "" if name == EVAL else f" of {name.removeprefix(EVAL + '_')}"
        if leakage.share:
            self.lines.append(f"note      {leakage.share:.1%} of the evaluation rows{of} are training rows")
        if leakage.prompts > len(leakage.exact) + len(leakage.normalised):
            share = leakage.prompts / leakage.rows
            self.lines.append(f"note      {share:.1%} of the evaluation prompts{of} are training prompts")
        check_leakage(leakage, max_leakage)
        found = {"exact": len(leakage.exact), "normalised": len(leakage.normalised)}
        found["prompts"] = leakage.prompts
        known = self.facts.get("leakage", {})  # of all sets together
        self.facts["leakage"] = {kind: count + known.get(kind, 0) for kind, count in found.items()}


def prove_split(
    proof: Proof,
    name: str,
    split: Split,
    recipe: Recipe,
    *,
    tokenizer: PreTrainedTokenizerFast,
    certified: Mapping[str, Any],
) -> None:
    """Enters what the blocks certified of a split, and proves what only the whole shows: packing, prompts.

    Args:
        certified: the seconds that it took, and the sha256 of all rows (``content``).

    Raises DataError for packed rows that are not their documents, and for a prompt that generation would not
    be given.
    """
    texts = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), repr(label_options(recipe)))
    digest = hashlib.sha256("\0".join((certified["content"], *texts)).encode()).hexdigest()
    again = int(split.ledger.numbers("proved_rows").sum())
    certificate = Certificate(len(split.rows), digest, certified["seconds"], again)
    if isinstance(split.dataset, PackedDataset):
        check_packing(split.dataset)
    compared = check_prompts(recipe, split, tokenizer=tokenizer) if recipe.stage == "sft" else 0
    proof.enter(name, certificate, totals=Totals(split.ledger), compared=compared)


def prove_mix(split: Split) -> list[str]:
    """Checks that the packed rows hold each row as often as it was drawn; the line to print.

    Raises DataError where they do not.
    """
    if split.mix is None or not isinstance(split.dataset, PackedDataset):
        return []
    check_packing(split.dataset, times=split.mix.times[split.stored.sources])
    return [f"{'mixed':<10}the packed rows hold each label as often as its row was drawn"]


def check_prompts(recipe: Recipe, split: Split, *, tokenizer: PreTrainedTokenizerFast) -> int:
    """Compares, for the first rows, the ids before the last target with those that ``generate`` is given.

    Returns how many were compared. Raises DataError for the first that differs.
    """
    rows, examples = split.rows.rows, split.examples
    compared = 0
    for number, example in enumerate(examples.examples[:COMPARED]):
        question = example.question
        if question is None or rows.fates[number].kind != "used":
            continue
        given = encode_prompts([question[0]], tokenizer, label_options(recipe))[0]
        last = int(np.searchsorted(rows.sources, number, side="right")) - 1
        found = rows[last]["input_ids"][: len(given)]
        if found != given and _ends_in_target(rows[last]):
            what = "the prompt in training is not the one that generate is given"
            got = repr(tokenizer.decode(found)[-60:])
            raise DataError(what, where=examples.places[number], got=got, fix="correct the chat template")
        compared += 1
    return compared


def _ends_in_target(row: TokenizedExample) -> bool:
    """False where the last turn is not learned, and so not in the row."""
    return row["labels"][-1] >= 0
