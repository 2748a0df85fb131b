"""Compares hf_clm with its peers on a pretrained model and real records: speed, memory and loss.

    python tests/benchmarks/real.py [--quick] [--case full lora] [--rounds 2] [--out FILE.json]

SmolLM2-135M-Instruct learns to write docstrings: of 1,000 functions of this Python's standard library, each
given by its signature. Everything else is as in peers.py.
"""

import json
import random
import sys
import sysconfig
import tempfile
from dataclasses import replace
from pathlib import Path

from cases import IGNORE, MAX_LENGTH, Case, Rows
from peers import compare_cases, parse, write_report
from transformers import AutoTokenizer

DATA = Path(__file__).parents[2] / "data"
MODEL = DATA / "local" / "smollm2-135m-instruct"
RECORDS = 1000
QUESTION = "Write the docstring of this Python function.\n\n{}"
FULL = Case(
    "full",
    "SmolLM2-135M-Instruct, full SFT",
    "sft",
    "llama",
    49_152,
    rows=RECORDS,
    steps=3,
    held_out=8,
    learning_rate=2e-5,
    folder=str(MODEL),
)
LORA = replace(FULL, name="lora", title="SmolLM2-135M-Instruct, LoRA", learning_rate=2e-4, lora=True)
CASES = {case.name: case for case in (FULL, LORA)}


def main() -> int:
    """Runs the benchmark that the command line selects."""
    options = parse(__doc__ or "", CASES, out="real-cpu.json", rounds=2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        file.write_text(json.dumps(build_real_rows()), encoding="utf-8")
        chosen = [replace(CASES[name], rows_file=str(file)) for name in options.case or CASES]
        return write_report(compare_cases(chosen, options), options)


def build_real_rows() -> Rows:
    """Returns the rows of 1,000 docstrings in random order, with labels in the answer only."""
    sys.path.insert(0, str(DATA))
    from build_corpus import read_modules

    modules, _ = read_modules(Path(sysconfig.get_path("stdlib")))
    entries = [entry for module in modules for entry in module.entries if entry.is_function]
    docstrings = {entry.signature: entry.docstring for entry in entries}
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [_to_row(tokenizer, *pair) for pair in docstrings.items()]
    rows = [row for row in rows if len(row["input_ids"]) <= MAX_LENGTH]
    return random.Random(0).sample(rows, RECORDS)


def _to_row(tokenizer, signature: str, docstring: str) -> dict[str, list[int]]:
    prompt = [{"role": "user", "content": QUESTION.format(signature)}]
    whole = [*prompt, {"role": "assistant", "content": docstring}]
    ids = tokenizer.apply_chat_template(whole, return_dict=False)
    start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
    return {"input_ids": ids, "labels": [IGNORE] * start + ids[start:]}


if __name__ == "__main__":
    sys.exit(main())
