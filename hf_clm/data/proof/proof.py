"""Proves a prepared set and reports the result for run.json and as lines to print."""

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

COMPARED_PROMPTS = 50  # rows whose prompt is rendered again as for generation


@dataclass
class ProofReport:
    """The results, for run.json (``facts``) and as lines to print."""

    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def enter(self, name: str, certificate: Certificate, *, totals: Totals, compared: int) -> None:
        """Adds the results of a split. ``compared`` is the number of compared prompts."""
        self.facts[name] = {"certificate": certificate.to_json(), "ledger": totals.to_json()}
        seconds = f"{certificate.seconds:.1f} s, sha256 {certificate.content_hash[:12]}"
        lines = [*totals.to_lines(), f"the labels of all {certificate.rows:,} rows are certified ({seconds})"]
        if compared:
            lines.append(f"the first {compared} prompts equal the input of generate")
        width = max(10, len(name) + 1)
        self.lines += [f"{'' if number else name:<{width}}{line}" for number, line in enumerate(lines)]

    def enter_leakage(self, name: str, leakage: Leakage, *, max_leakage: float) -> None:
        """Adds the leakage of an evaluation set. Raises DataError if there is too much."""
        of = "" if name == EVAL else f" of {name.removeprefix(EVAL + '_')}"
        if leakage.share:
            self.lines.append(f"note      {leakage.share:.1%} of the evaluation rows{of} are training rows")
        if leakage.prompts > len(leakage.exact) + len(leakage.normalised):
            share = leakage.prompts / leakage.rows
            self.lines.append(f"note      {share:.1%} of the evaluation prompts{of} are training prompts")
        check_leakage(leakage, max_leakage)
        counts = {"exact": len(leakage.exact), "normalised": len(leakage.normalised)}
        counts["prompts"] = leakage.prompts
        totals = self.facts.get("leakage", {})  # of all evaluation sets
        self.facts["leakage"] = {kind: count + totals.get(kind, 0) for kind, count in counts.items()}


def prove_split(
    proof: ProofReport,
    name: str,
    split: Split,
    recipe: Recipe,
    *,
    tokenizer: PreTrainedTokenizerFast,
    certified: Mapping[str, Any],
) -> None:
    """Adds the certificate of a split's blocks, and checks its packing and its prompts.

    Args:
        certified: the time it took in seconds, and the sha256 of all rows (``content``).

    Raises DataError if packed rows differ from their documents, or a prompt differs from that of generation.
    """
    digest = content_hash(certified["content"], recipe, tokenizer)
    again = int(split.ledger.numbers("proved_rows").sum())
    certificate = Certificate(len(split.rows), digest, certified["seconds"], again)
    if isinstance(split.dataset, PackedDataset):
        check_packing(split.dataset)
    compared = check_prompts(recipe, split, tokenizer=tokenizer) if recipe.stage == "sft" else 0
    proof.enter(name, certificate, totals=Totals(split.ledger), compared=compared)


def content_hash(rows: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns the hash of certified labels: of the rows, given as their sha256, and of what made them."""
    texts = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), repr(label_options(recipe)))
    return hashlib.sha256("\0".join((rows, *texts)).encode()).hexdigest()


def prove_mix(split: Split) -> list[str]:
    """Checks that the packed rows contain each row as often as it was drawn; returns lines to print.

    Raises DataError if they do not.
    """
    if split.mix is None or not isinstance(split.dataset, PackedDataset):
        return []
    check_packing(split.dataset, times=split.mix.times[split.stored.sources])
    return [f"{'mixed':<10}the packed rows contain each label as often as its row was drawn"]


def check_prompts(recipe: Recipe, split: Split, *, tokenizer: PreTrainedTokenizerFast) -> int:
    """Compares, for the first rows, the ids before the last target with the input of ``generate``.

    Returns the number of compared rows. Raises DataError for the first one that differs.
    """
    rows, examples = split.rows.rows, split.examples
    compared = 0
    for number, example in enumerate(examples.examples[:COMPARED_PROMPTS]):
        question = example.question
        if question is None or rows.fates[number].kind != "used":
            continue
        prompt = encode_prompts([question[0]], tokenizer, label_options(recipe))[0]
        last = int(np.searchsorted(rows.sources, number, side="right")) - 1
        ids = rows[last]["input_ids"][: len(prompt)]
        if ids != prompt and _ends_in_target(rows[last]):
            what = "the prompt in training differs from the input of generate"
            got = repr(tokenizer.decode(ids)[-60:])
            raise DataError(what, where=examples.places[number], got=got, fix="correct the chat template")
        compared += 1
    return compared


def _ends_in_target(row: TokenizedExample) -> bool:
    """Returns False if the last turn is not a target and therefore not in the row."""
    return row["labels"][-1] >= 0
