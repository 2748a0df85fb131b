"""The stages of gpu.py that check: versions, attention, the loss, and runs that are killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_clm.machine import measure_peak, nominal_peak, version_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "accelerate", "peft", "triton", "bitsandbytes", "numpy", "pydantic")
PACKAGES += ("datasets", "ruamel.yaml", "zstandard", "tokenizers", "safetensors")
WIDTHS = {64: True, 128: True, 100: False, 512: False}  # whether the fused kernel supports it
LENGTHS = (500, 17, 1, 300, 206)
ERROR = 2e-2  # of bfloat16 attention, relative: 8 bits
LOSS_ERROR, GRADIENT_ERROR = 1e-3, 2e-2
LEARNED = [(f"say {n}\n", "xyz"[n % 3] * 4) for n in range(1, 9)]
RECIPE = """\
stage: sft
model: {name_or_path: model}
data:
  train: [{path: rows.jsonl, format: prompt_completion}]
  eval: [{path: rows.jsonl, format: prompt_completion}]
  max_length: 64
  max_leakage: 1.0
doctor: {round_trip: end}
train:
  output_dir: run
  max_steps: 60
  learning_rate: 1e-2
  lr_scheduler_type: cosine
  warmup_steps: 4
  per_device_train_batch_size: 4
  logging_steps: 10
  eval_strategy: "no"
  save_strategy: steps
  save_steps: 20
"""


def versions(*, is_miniature: bool) -> dict[str, Any]:
    """Returns the versions, the device, and its FLOP/s in a large matrix product."""
    import torch

    device = torch.device("cpu" if is_miniature else "cuda")
    facts: dict[str, Any] = {"name": "CPU", "capability": None, "memory_bytes": None}
    if not is_miniature:
        found = torch.cuda.get_device_properties(0)
        facts = {"name": found.name, "capability": [found.major, found.minor]}
        facts |= {"memory_bytes": found.total_memory, "cuda": torch.version.cuda}
    measured = measure_peak(device, torch.bfloat16, seconds=0.1 if is_miniature else 1.0)
    return {
        "python": sys.version.split()[0],
        **{name: version_of(name) for name in PACKAGES},
        "device": facts,
        "peak_flops_per_second": measured,
        "nominal_flops_per_second": nominal_peak(device),
    }


def varlen(*, is_miniature: bool) -> dict[str, Any]:
    """Compares packed attention, forward and backward, with float32 SDPA of each document alone."""
    import torch

    device = torch.device("cpu" if is_miniature else "cuda")
    results = {str(width): _compare_attention(width, device) for width in WIDTHS}
    gates = {f"exact_{width}": part["error"] <= ERROR for width, part in results.items()}
    gates["isolated"] = all(part["leak"] == 0 for part in results.values())
    routes = {width: results[str(width)]["fused"] for width in WIDTHS}
    gates["routes"] = routes == (dict.fromkeys(WIDTHS, False) if is_miniature else WIDTHS)
    return {"widths": results, "gates": gates}


def _compare_attention(width: int, device: Any) -> dict[str, Any]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from torch.utils._python_dispatch import TorchDispatchMode

    from hf_clm.data.batch.collators import DataCollatorForPackedCausalLM
    from hf_clm.model.attention import packed_attention

    called: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called[func.name()] += 1
            return func(*args, **(kwargs or {}))

    rows = [{"input_ids": [0] * length, "labels": [0] * length} for length in LENGTHS]
    batch = DataCollatorForPackedCausalLM()(rows)
    options = {k: v for k, v in batch.items() if k not in ("input_ids", "labels", "position_ids")}
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    draw = torch.Generator(device).manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), width) for heads in (4, 2, 2)]
    states = [torch.randn(shape, generator=draw, device=device).bfloat16() for shape in shapes]
    module = torch.nn.Module()
    module.is_causal, module.training = True, True

    def packed(*parts: Any) -> Any:
        return packed_attention(module, *parts, None, scaling=width**-0.5, **options)[0][0]

    ours = [part.clone().requires_grad_() for part in states]
    truth = [part.float().requires_grad_() for part in states]
    with Counting():
        output = packed(*ours)
    edges = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    alone = [
        scaled_dot_product_attention(
            *(part[:, :, a:b] for part in truth), is_causal=True, scale=width**-0.5, enable_gqa=True
        )
        for a, b in pairwise(edges)
    ]
    expected = torch.cat(alone, dim=2)[0].transpose(0, 1)
    towards = torch.randn(expected.shape, generator=draw, device=device)
    (output.float() * towards).sum().backward()
    (expected * towards).sum().backward()
    pairs = [(output, expected), *((a.grad, b.grad) for a, b in zip(ours, truth, strict=True))]
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in pairs]
    changed = [part.clone() for part in states]
    for part in changed:
        part[:, :, : LENGTHS[0]] = 1.0
    with torch.no_grad():
        leak = float((packed(*changed) - packed(*states))[LENGTHS[0] :].abs().max())
    fused = called["torch_attn::_varlen_attn"] > 0
    return {"error": max(errors), "errors": errors, "leak": leak, "fused": fused}


def loss(*, is_miniature: bool) -> dict[str, Any]:
    """Compares the loss at the targets with that of transformers: value, gradients and peak memory."""
    vocabularies = (512, 2048) if is_miniature else (50_304, 151_936)
    results = {str(size): _compare_loss(size, is_miniature=is_miniature) for size in vocabularies}
    gates = {}
    for size, part in results.items():
        gates[f"loss_{size}"] = part["loss_error"] <= LOSS_ERROR
        gates[f"gradients_{size}"] = max(part["gradient_errors"].values()) <= GRADIENT_ERROR
        peaks = part["peak_memory_bytes"]
        gates[f"memory_{size}"] = peaks["ours"] < peaks["stock"] if peaks["ours"] else None
    return {"vocabularies": results, "gates": gates}


def _compare_loss(vocabulary: int, *, is_miniature: bool) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_clm.data.batch.collators import DataCollatorForPackedCausalLM
    from hf_clm.model.loss import use_target_loss

    tokens, device = (256, "cpu") if is_miniature else (8192, "cuda")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 14, "num_key_value_heads": 2}
    sizes |= {"hidden_size": 896, "intermediate_size": 1024, "max_position_embeddings": tokens}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", vocab_size=vocabulary, tie_word_embeddings=False, **sizes)
    model = AutoModelForCausalLM.from_config(config).to(device)
    target_loss = use_target_loss(model.train())
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = DataCollatorForPackedCausalLM(with_targets=True)([{"input_ids": ids, "labels": ids}])
    targets = {key: batch[key].to(device) for key in ("logits_to_keep", "shift_labels")}
    inputs = {key: batch[key].to(device) for key in ("input_ids", "labels")}

    def measure(inputs: dict[str, Any]) -> tuple[float, dict[str, Any], int]:
        model.zero_grad()
        if not is_miniature:
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast(device, dtype=torch.bfloat16):
            result = model(**inputs, use_cache=False).loss
        result.backward()
        gradients = {name: part.grad.clone() for name, part in model.named_parameters()}
        peak = 0 if is_miniature else torch.cuda.max_memory_allocated()
        return result.item(), gradients, peak

    value, gradients, peak = measure(inputs)
    with target_loss.measuring():
        our_value, ours, our_peak = measure(inputs | targets)
    names = {"head": "lm_head.weight", "embeddings": "model.embed_tokens.weight"}
    names["layer"] = "model.layers.0.mlp.down_proj.weight"
    errors = {
        short: float((ours[name] - gradients[name]).norm() / gradients[name].norm())
        for short, name in names.items()
    }
    peaks = {"ours": our_peak, "stock": peak}
    difference = abs(our_value - value) / value
    return {"loss_error": difference, "gradient_errors": errors, "peak_memory_bytes": peaks}


def train(kind: str, folder: Path, *, is_miniature: bool) -> dict[str, Any]:
    """Trains a tiny model by heart, kills and resumes another run, and compares both; asks for an answer.

    kind: ``train``; ``fsdp2``, with recipes/accelerate/fsdp2.yaml on one process; ``qlora``.
    """
    if kind == "qlora" and version_of("bitsandbytes") is None:
        return {"error": "bitsandbytes is not installed"}
    for name in ("first", "second"):
        _write_inputs(folder / name)
    command, changes = _command(kind, is_miniature=is_miniature)
    words = [*command, "train", "recipe.yaml", *changes]
    first, second = (folder / name / "run" for name in ("first", "second"))
    killed = _start(words, second.parent)
    straight = _start(words, first.parent)
    if kind == "train":
        while killed.poll() is None and not (second / "checkpoint-20").is_dir():
            time.sleep(0.01)
        killed.kill()
        killed.wait()
        assert killed.returncode == -signal.SIGKILL, "the run ended before it was killed"
    else:
        _end(killed, second.parent)
    _end(straight, first.parent)
    resumed = words
    if kind != "train":  # a launcher's processes survive it: as if the end had been lost
        shutil.rmtree(second / "checkpoint-60")
        for path in second.glob("*model.safetensors"):
            path.unlink()
        resumed = [*words, "--resume_from_checkpoint", "run/checkpoint-40"]
    _end(_start(resumed, second.parent), second.parent)
    evaluations, speed, peak = _figures(first)
    prompt, completion = LEARNED[4]
    words = [sys.executable, "-m", "hf_clm", "generate", "run", "--prompt", prompt, "--json"]
    words += ["--max_new_tokens", "16", *(["--device", "cpu"] if is_miniature else [])]
    answer = json.loads(_end(_start(words, first.parent), first.parent).splitlines()[-1])
    difference = _largest_difference(first, second)
    record = json.loads((first / "run.json").read_text())
    gates = {
        "learned": evaluations[-1] < (0.9 if kind == "qlora" else 0.5) * evaluations[0],
        "resume_is_the_same": difference < 1e-3,
        "answers": None if kind == "qlora" else answer["text"] == completion,
        "opens_the_same": None if kind != "train" else bool(record["proof"].get("round_trip")),
    }
    return {
        "processes": record["processes"],
        "eval_losses": evaluations,
        "largest_difference_after_resume": difference,
        "answer": answer,
        "round_trip": record["proof"].get("round_trip"),
        "tokens_per_second": speed,
        "peak_memory_bytes": peak,
        "gates": gates,
    }


def _write_inputs(folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl

    folder.mkdir()
    model = tiny_model(tie_word_embeddings=True, hidden_size=64)
    save_folder(folder / "model", model, byte_tokenizer())
    write_jsonl(folder / "rows.jsonl", [{"prompt": first, "completion": then} for first, then in LEARNED])
    (folder / "recipe.yaml").write_text(RECIPE)


def _command(kind: str, *, is_miniature: bool) -> tuple[list[str], list[str]]:
    """Returns the beginning of the command, and changes of the recipe."""
    program, changes = ["-m", "hf_clm"], []
    if is_miniature:
        changes = ["--use_cpu", "true", "--bf16", "false"]
    if kind == "qlora":
        changes += ["--lora.quantize", "4bit", "--lora.r", "16", "--doctor.round_trip", "off"]
    if kind != "fsdp2":
        return [sys.executable, *program], changes
    config = str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")
    words = ["-m", "accelerate.commands.launch", "--config_file", config]
    words += ["--num_processes", "2" if is_miniature else "1"]
    program = [str(ROOT / "tests" / "spread_on_cpu.py")] if is_miniature else program
    return [sys.executable, *words, *program], [*changes, "--doctor.round_trip", "off"]


def _start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    settings["HF_CLM_CACHE"] = str(folder / "cache")
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            words, cwd=folder, env=os.environ | settings, stdout=subprocess.PIPE, stderr=log, text=True
        )


def _end(process: subprocess.Popen[str], folder: Path) -> str:
    """Waits for a process and returns its output. Raises RuntimeError with the end of its log if it fails."""
    output = process.communicate()[0]
    if process.returncode:
        log = (folder / "log.txt").read_text(errors="replace")
        raise RuntimeError(f"exit code {process.returncode}: {log[-1200:]}")
    return output


def _figures(run: Path) -> tuple[list[float], float, int]:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [entry["eval_loss"] for entry in metrics if "eval_loss" in entry]
    speeds = [entry["tokens_per_second"] for entry in metrics if "tokens_per_second" in entry]
    return evaluations, speeds[-1], metrics[-1]["peak_memory_bytes"]


def _largest_difference(first: Path, second: Path) -> float:
    from safetensors.torch import load_file

    (one,), (other,) = (sorted(run.glob("*model.safetensors")) for run in (first, second))
    before, after = load_file(one), load_file(other)
    return max(float((before[name].float() - after[name].float()).abs().max()) for name in before)
