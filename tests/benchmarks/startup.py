"""Measures the time from the start of the process to the first optimizer step, on a text file.

``python startup.py stock FOLDER`` is the script that a user of that trainer would write; the project's own
arm is ``hf-clm train``. Cold has read nothing before; warm finds what the run before it kept.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RECORDS, QUICK_RECORDS = 50_000, 500
WORDS, MEDIAN_WORDS, SPREAD = 20_000, 110, 0.8  # in the language, and in a record
MAX_LENGTH, BATCH, VOCAB = 512, 8, 8192
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": MAX_LENGTH,
}
NO_TRIALS = ("--doctor.round_trip", "off", "--eval_on_start", "false")  # which the peers do not do either
VALUES = {
    "per_device_train_batch_size": BATCH,
    "learning_rate": 1e-3,
    "max_steps": 100,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def write_corpus(folder: Path, records: int) -> dict[str, float]:
    """Writes rows.jsonl with prompts and completions of invented words, and a tokenizer trained on some."""
    from hf_clm.text.train_tokenizer import train_bpe

    draw = np.random.default_rng(0)
    syllables = np.array([a + b for a in "bcdfghklmnprstvz" for b in "aeiou"])
    words = ["".join(draw.choice(syllables, size)) for size in draw.integers(1, 5, WORDS)]
    lengths = np.clip(draw.lognormal(np.log(MEDIAN_WORDS), SPREAD, records), 4, 450).astype(int)
    drawn = np.minimum(draw.zipf(1.3, int(lengths.sum())), WORDS) - 1
    texts, at = [], 0
    for length in lengths.tolist():
        texts.append([words[number] for number in drawn[at : at + length].tolist()])
        at += length
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for text in texts:
            cut = max(1, len(text) // 3)
            record = {"prompt": " ".join(text[:cut]) + "\n", "completion": " ".join(text[cut:])}
            file.write(json.dumps(record) + "\n")
    sample = [" ".join(text) for text in texts[:2000]]
    tokenizer = train_bpe(sample, vocab_size=VOCAB)
    tokenizer.save_pretrained(folder / "tokenizer")
    tokens = [len(ids) for ids in tokenizer(sample)["input_ids"]]
    return {"records": records, "median_tokens": float(np.median(tokens))}


def stock(folder: Path) -> None:
    """Runs ``load_dataset``, ``map(batched=True)`` and ``Trainer``."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = tokenizer(batch["prompt"])["input_ids"]
        completions = tokenizer([text + tokenizer.eos_token for text in batch["completion"]])["input_ids"]
        pairs = list(zip(prompts, completions, strict=True))
        rows = [(prompt + completion)[:MAX_LENGTH] for prompt, completion in pairs]
        labels = [([-100] * len(prompt) + completion)[:MAX_LENGTH] for prompt, completion in pairs]
        return {"input_ids": rows, "labels": labels}

    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    Trainer(
        model=_model(tokenizer),
        args=TrainingArguments(output_dir=str(folder / "out"), **VALUES),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[_end_after_a_step()],
    ).train()


def trl(folder: Path) -> None:
    """Runs ``load_dataset`` and ``SFTTrainer`` with its best-fit packing."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    arguments = SFTConfig(output_dir=str(folder / "out"), packing=True, max_length=MAX_LENGTH, **VALUES)
    SFTTrainer(
        _model(tokenizer),
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[_end_after_a_step()],
    ).train()


def time_peer(name: str, folder: Path, *, limit: float) -> float:
    """Returns the seconds. The cache of ``datasets`` is in the folder."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, name, str(folder)]
    started = time.time()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=limit, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return float(done.stdout.split()[-1]) - started


def time_ours(folder: Path, *, limit: float, overrides: tuple[str, ...] = ()) -> float:
    """Returns the seconds until ``hf-clm train`` has logged its first step."""
    recipe = {
        "stage": "sft",
        "model": {"init": "scratch", "config": {"model_type": "qwen2", **SIZES}},
        "tokenizer": {"name_or_path": str(folder / "tokenizer")},
        "data": {
            "train": [str(folder / "rows.jsonl")],
            "max_length": MAX_LENGTH,
            "cache_dir": str(folder / "prepared"),
        },
        "train": {**VALUES, "output_dir": str(folder / "ours")},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    shutil.rmtree(folder / "ours", ignore_errors=True)
    log, metrics = folder / "ours.log", folder / "ours" / "metrics.jsonl"
    started = time.time()
    with log.open("w", encoding="utf-8") as out:
        command = [sys.executable, "-m", "hf_clm", "train", str(folder / "recipe.yaml"), *overrides]
        child = subprocess.Popen(command, stdout=out, stderr=out)
        while not (metrics.is_file() and '"loss"' in metrics.read_text(encoding="utf-8")):
            if child.poll() is not None or time.time() - started > limit:
                child.kill()
                raise RuntimeError(
                    (log.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1]
                )
            time.sleep(0.02)
        seconds = time.time() - started
        child.kill()
        child.wait()
    return seconds


def measure_startup(folder: Path, *, records: int, limit: float) -> dict[str, Any]:
    """Returns the cold and warm seconds of each arm, or why it failed."""
    facts: dict[str, Any] = write_corpus(folder, records)
    arms: dict[str, Callable[[], float]] = {
        "Trainer, datasets.map": lambda: time_peer("stock", folder, limit=limit),
        "TRL, packing bfd": lambda: time_peer("trl", folder, limit=limit),
        "hf-clm train, no round trip, no first evaluation": lambda: time_ours(
            folder, limit=limit, overrides=NO_TRIALS
        ),
        "hf-clm train, as it comes": lambda: time_ours(folder, limit=limit),
    }
    for arm, seconds in arms.items():
        for state in ("cold", "warm"):
            try:
                facts[f"{arm}, {state}"] = seconds()
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                facts[f"{arm}, {state}"] = f"failed: {error}"
        for kept in ("datasets", "prepared"):
            shutil.rmtree(folder / kept, ignore_errors=True)
    return facts


def _model(tokenizer: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen2", vocab_size=len(tokenizer), **SIZES, **ids)
    )


def _end_after_a_step() -> Any:
    from transformers import TrainerCallback

    class EndAfterAStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            print(time.time(), flush=True)
            os._exit(0)

    return EndAfterAStep()


if __name__ == "__main__":
    {"stock": stock, "trl": trl}[sys.argv[1]](Path(sys.argv[2]))
