"""DeepSpeed's ZeRO-2 and ZeRO-3 on two CPU processes: the metrics of DDP, a complete model, exact resuming.

Requires the package (pip install 'hf_clm[deepspeed]') and a C++ compiler for its extensions.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from launched import launch, prepare, read_metrics, torchrun
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.large

WORDS = ("--samples", "null", "--max_steps", "6", "--save_steps", "3", "--save_total_limit", "5")


def run(folder: Path, monkeypatch: Any, *words: str, stage: int) -> dict[str, Any]:
    """Returns the weights after 6 steps on two processes, with growing embeddings. Stage 0 is DDP."""
    if not folder.exists():
        prepare(folder, vocab_size=256)
    names = (
        "USE_DEEPSPEED",
        "DEEPSPEED_ZERO_STAGE",
        "DEEPSPEED_ZERO3_INIT",
        "DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    )
    for name, value in zip(names, ("true", str(stage), "true", "true"), strict=True):
        if stage:
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        else:
            monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_SIZE", "2")  # DeepSpeed's name for LOCAL_WORLD_SIZE

    done = launch(torchrun(), folder, *WORDS, *words)

    assert done.returncode == 0, done.stderr
    return load_file(folder / "run" / "model.safetensors")


@pytest.mark.parametrize("stage", [2, 3])
def test_it_trains_like_ddp_and_resumes_exactly(tmp_path, monkeypatch, stage):
    run(tmp_path / "ddp", monkeypatch, stage=0)
    weights = run(tmp_path / "zero", monkeypatch, stage=stage)

    ddp, zero = (read_metrics(tmp_path / name) for name in ("ddp", "zero"))
    for key in ("loss", "grad_norm", "eval_loss", "token_accuracy"):
        result = [entry[key] for entry in zero if key in entry]
        assert result == pytest.approx([entry[key] for entry in ddp if key in entry], rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "zero" / "run")
    assert model.get_input_embeddings().weight.shape == (260, 32)
    assert (tmp_path / "zero" / "run" / "checkpoint-3" / f"global_step{3}").is_dir()

    (tmp_path / "zero" / "run").rename(tmp_path / "zero" / "whole")
    again = ("--resume_from_checkpoint", os.path.join("whole", "checkpoint-3"))
    resumed = run(tmp_path / "zero", monkeypatch, *again, stage=stage)
    assert [name for name, weight in weights.items() if not weight.equal(resumed[name])] == []
