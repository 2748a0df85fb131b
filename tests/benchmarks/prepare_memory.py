"""Measures peak memory and time of ``hf-clm prepare``, and of the first step after it, for sizes of the text.

    .venv/bin/python -m tests.benchmarks.prepare_memory --work /tmp/sizes --gigabytes 0.2 1 2

Writes synthetic text (words of syllables, few common and many rare), trains a byte-level BPE of 4,096 tokens
on its begin, and runs each command in a process of its own. ``train`` makes one step with a model of one
layer: what it takes is start-up. Prints JSON, and keeps it in ``results/prepare_memory.json``.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "prepare_memory.json"
# Ways to prepare: one process with one thread, with the threads of the tokenizer, and Ray on all cores.
WAYS = {"thread": ([], "false"), "threads": ([], "true"), "ray": (["--ray", "local"], "true")}
WORDS, PER_DOCUMENT = 40_000, 320  # distinct words; words per document, about 2 kB


def main() -> None:
    """Measures every size and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for text and prepared data")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.05, 0.2, 1.0, 2.0])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for gigabytes in options.gigabytes:
        rows.append(measure(options.work, gigabytes))
        RESULTS.write_text(
            json.dumps({"cores": os.cpu_count(), "sizes": rows}, indent=2) + "\n", encoding="utf-8"
        )
        print(json.dumps(rows[-1]), flush=True)


def measure(work: Path, gigabytes: float) -> dict[str, Any]:
    """Measures one size: writes, prepares, trains a step on, and removes the text."""
    text, tokenizer = work / "text.jsonl", work / "tokenizer"
    documents = write_text(text, round(gigabytes * 1e9))
    if not tokenizer.exists():
        sample = work / "sample.jsonl"
        sample.write_text("".join(text.open(encoding="utf-8").readlines(4_000_000)), encoding="utf-8")
        run(["train-tokenizer", str(sample), "--output_dir", str(tokenizer)], work)
    recipe = work / "recipe.yaml"
    recipe.write_text(
        "stage: pretrain\n"
        "model: {init: scratch, config: {model_type: gpt2, n_layer: 1, n_embd: 32, n_head: 2}}\n"
        f"tokenizer: {{name_or_path: {tokenizer}}}\n"
        f"data: {{train: {text}, max_length: 1024, cache_dir: {work / 'cache'}}}\n"
        f"train: {{output_dir: {work / 'run'}, max_steps: 1, per_device_train_batch_size: 1}}\n"
        "doctor: {round_trip: 'off'}\n"
        "overwrite: true\n",
        encoding="utf-8",
    )
    found: dict[str, Any] = {"text_bytes": text.stat().st_size, "documents": documents}
    found |= {f"prepare_{name}": value for name, value in run(["prepare", str(recipe)], work).items()}
    time.sleep(11)  # after this, the hash of the text is cached
    run(["train", str(recipe)], work)
    found |= {f"first_step_{name}": value for name, value in run(["train", str(recipe)], work).items()}
    (store,) = (path for path in (work / "cache").iterdir() if not path.name.startswith("."))
    found["stored_bytes"] = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    shutil.rmtree(store)
    for way, (words, threads) in WAYS.items():
        used = run(["prepare", str(recipe), *words], work, TOKENIZERS_PARALLELISM=threads)
        found[f"{way}_seconds"] = used["seconds"]
        shutil.rmtree(store)
    text.unlink()
    return found


def write_text(path: Path, size: int) -> int:
    """Writes documents of ``size`` bytes in total; returns their number."""
    draw = np.random.default_rng(0)
    syllables = [first + vowel for first in "bcdfghklmnprstvw" for vowel in "aeiou"]
    words = ["".join(draw.choice(syllables, count)) for count in draw.integers(1, 5, WORDS)]
    shares = 1 / (np.arange(WORDS) + 10.0)
    documents, written = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            lengths = draw.geometric(1 / PER_DOCUMENT, 1000)
            numbers = draw.choice(WORDS, int(lengths.sum()), p=shares / shares.sum()).tolist()
            for last, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True):
                text = " ".join([words[number] for number in numbers[last - length : last]])
                written += file.write(f'{{"text": "{text}."}}\n')
                documents += 1
    return documents


def run(words: list[str], work: Path, **environment: str) -> dict[str, Any]:
    """Returns the seconds and peak memory of a command, and writes its output to a file."""
    code = "import sys; from hf_clm.cli import main; sys.exit(main(sys.argv[1:]))"
    started = time.monotonic()
    with (work / "output.txt").open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=output,
            stderr=output,
        )
        _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, (
        words,
        (work / "output.txt").read_text(encoding="utf-8")[-2000:],
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert isinstance(used, resource.struct_rusage)
    return {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_rss_mb": round(used.ru_maxrss * unit / 1e6),
    }


if __name__ == "__main__":
    main()
