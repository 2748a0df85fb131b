"""Runs recipes/accelerate/fsdp2.yaml end to end on the GPUs of this machine, and loads the saved model.

    python tests/benchmarks/gpu_fsdp2.py                    # one process per GPU
    python tests/benchmarks/gpu_fsdp2.py --file fsdp2_offload
    python tests/benchmarks/gpu_fsdp2.py --on_cpu           # tests/spread_on_cpu.py on two processes

Prints one JSON object: what was reached, and the gates. Written and run on a CPU; no figure of a GPU yet.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
LEARNED = [(f"say {n}\n", "xyz"[: n % 3 + 1] * n) for n in range(1, 9)]
RECIPE = """\
stage: sft
model: {name_or_path: model}
data:
  train: [{path: rows.jsonl, format: prompt_completion}]
  eval: [{path: rows.jsonl, format: prompt_completion}]
  max_length: 64
  max_leakage: 1.0
train:
  output_dir: run
  max_steps: 40
  learning_rate: 1e-2
  warmup_steps: 4
  per_device_train_batch_size: 1
  logging_steps: 10
  eval_strategy: "no"
  save_strategy: steps
  save_steps: 20
"""


def main() -> None:
    """Runs and resumes a run, and evaluates the saved model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", default="fsdp2", choices=("fsdp2", "fsdp2_offload"))
    parser.add_argument("--on_cpu", action="store_true", help="two processes without a GPU")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        launch(folder, options.file, on_cpu=options.on_cpu)
        facts = json.loads((folder / "run" / "run.json").read_text())
        metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        evaluations = [entry["eval_loss"] for entry in metrics if "eval_loss" in entry]
        opened = loss_of(folder / "run")
        saved = weights_of(folder / "run")
        forget_the_end(folder / "run")
        launch(folder, options.file, "--resume_from_checkpoint", "run/checkpoint-20", on_cpu=options.on_cpu)
        again = weights_of(folder / "run")
    largest = max(float((again[name] - part).abs().max()) for name, part in saved.items())
    speeds = [entry["tokens_per_second"] for entry in metrics if "tokens_per_second" in entry]
    found = {
        "device": "cpu" if options.on_cpu else torch.cuda.get_device_name(),
        "processes": facts["processes"],
        "eval_losses": evaluations,
        "loss_of_the_opened_model": opened,
        "largest_difference_after_resume": largest,
        "tokens_per_second": speeds[-1],
        "peak_memory_bytes": metrics[-1]["peak_memory_bytes"],
        "gates": {
            "learned": evaluations[-1] < 0.5 * evaluations[0],
            "opens_with_what_was_learned": abs(opened - evaluations[-1]) < 0.02,
            "resume_is_the_same": largest < 1e-3,
            "weights_are_float32": {part.dtype for part in saved.values()} == {torch.float32},
        },
    }
    print(json.dumps(found))


def prepare(folder: Path) -> None:
    """Writes a tiny model, rows and the recipe."""
    from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl

    save_folder(folder / "model", tiny_model(tie_word_embeddings=True), byte_tokenizer())
    write_jsonl(folder / "rows.jsonl", [{"prompt": first, "completion": then} for first, then in LEARNED])
    (folder / "recipe.yaml").write_text(RECIPE)


def launch(folder: Path, file: str, *words: str, on_cpu: bool) -> None:
    """Runs ``hf-clm train`` with accelerate, and prints its output to stderr."""
    processes = 2 if on_cpu else torch.cuda.device_count()
    assert processes, "no GPU; --on_cpu tries the script without one"
    program = [str(ROOT / "tests" / "spread_on_cpu.py")] if on_cpu else ["-m", "hf_clm"]
    config = str(ROOT / "recipes" / "accelerate" / f"{file}.yaml")
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", config]
    command += ["--num_processes", str(processes), *program, "train", "recipe.yaml", *words]
    command += ["--use_cpu", "true", "--bf16", "false"] if on_cpu else []
    settings = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=folder, env=os.environ | settings, stdout=sys.stderr, check=True)


def forget_the_end(run: Path) -> None:
    """Keeps only the first checkpoint."""
    shutil.rmtree(run / "checkpoint-40")
    (run / "model.safetensors").unlink()


def loss_of(run: Path) -> float:
    """Returns the loss of a saved model on each row alone. Bytes are their ids, and 256 is the end token."""
    model: Any = AutoModelForCausalLM.from_pretrained(run).eval()
    total, count = 0.0, 0
    for prompt, answer in LEARNED:
        ids = torch.tensor([[*prompt.encode(), *answer.encode(), 256]])
        with torch.no_grad():
            scores = model(ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
        total -= float(scores.gather(1, ids[0, len(prompt) :, None]).sum())
        count += len(answer) + 1
    return total / count


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of a saved model."""
    return AutoModelForCausalLM.from_pretrained(run).state_dict()


if __name__ == "__main__":
    main()
