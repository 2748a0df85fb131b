"""A model sharded over two processes (fully_shard) learns and saves the same as in one process."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_program
from helpers import X, tiny_model
from transformers import AutoModelForCausalLM

from hf_clm.data.batch.collators import DataCollatorForPackedCausalLM
from hf_clm.model.attention import register
from hf_clm.model.loss import use_target_loss
from hf_clm.training.saving import without_copies

ROOT = Path(__file__).resolve().parents[2]
# Documents of the two processes, with 2 + 1 + 3 and 5 + 4 targets, so that a mean of means would be wrong.
DOCUMENTS = [
    [
        {"input_ids": [5, 6, 7, 8], "labels": [X, X, 7, 8]},
        {"input_ids": [9, 1], "labels": [X, 1]},
        {"input_ids": [2, 9, 2, 6], "labels": [X, 9, 2, 6]},
    ],
    [
        {"input_ids": [3, 3, 4, 4, 5, 250], "labels": [X, 3, 4, 4, 5, 250]},
        {"input_ids": [8, 7, 6, 5, 4], "labels": [X, 7, 6, 5, 4]},
    ],
]
TARGETS, STEPS, CLIP = 15, 4, 0.5
HEADS = {"tied": True, "untied": False}
CASES = [(head, memory) for head in HEADS for memory in ("plain", "checkpointing")]


def build(head: str) -> Any:
    return tiny_model("qwen2", tie_word_embeddings=HEADS[head]).train()


def build_optimizer(model: Any) -> torch.optim.Optimizer:
    """Uses a large eps: otherwise, rounding errors of gradients near zero would become full steps."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-4)


# --- the program that runs in each of the two processes


def main(rank: int, folder: Path) -> None:
    """Trains every case sharded; rank 0 writes losses, norms and models."""
    place = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    register()
    result = {case: train_spread(case, rank=rank, folder=folder) for case in CASES}
    if rank == 0:
        torch.save(result, folder / "result.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_spread(case: tuple[str, str], *, rank: int, folder: Path) -> list[tuple[float, float]]:
    """Returns the loss of both processes and the gradient norm before clipping, per step."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = build(case[0])
    model.set_attn_implementation("packed")
    if case[1] == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    target_loss = use_target_loss(model)
    spread(model)
    optimizer = build_optimizer(model)
    batch = DataCollatorForPackedCausalLM(with_targets=True)(DOCUMENTS[rank])
    batch.pop("padding_tokens", None)
    steps = []
    for _ in range(STEPS):
        with target_loss.measuring():  # 2: the processes average their gradients
            loss = 2 * model(**batch, use_cache=False, num_items_in_batch=TARGETS).loss
        loss.backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / 2
        torch.distributed.all_reduce(total)
        steps.append((total.item(), norm.full_tensor().item()))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "-".join(case), state_dict=without_copies(model, whole))
    return steps


def spread(model: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    pieces = [part.to_local().numel() for part in model.parameters()]
    assert sum(pieces) < 0.51 * model.num_parameters(), "nothing is spread"


# --- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_program(__file__, folder)
    return folder


def train_alone(head: str) -> tuple[list[tuple[float, float]], Any]:
    """Trains the same in one process with the stock model and loss, one document at a time."""
    model = build(head)
    optimizer, steps = build_optimizer(model), []
    for _ in range(STEPS):
        total = torch.zeros(())
        for document in DOCUMENTS[0] + DOCUMENTS[1]:
            logits = model(input_ids=torch.tensor([document["input_ids"]])).logits[0, :-1]
            targets = torch.tensor(document["labels"][1:])
            total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / TARGETS
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((total.item(), norm.item()))
    return steps, model


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_sharded_model_learns_and_saves_the_same_as_one_process(folder, case):
    expected, model = train_alone(case[0])
    result = torch.load(folder / "result.pt")[case]

    assert result == [pytest.approx(step, rel=1e-5) for step in expected]
    assert min(norm for _, norm in expected) > CLIP  # so clipping has an effect
    saved = AutoModelForCausalLM.from_pretrained(folder / "-".join(case)).state_dict()
    weights = model.state_dict()
    assert saved.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_a_tied_head_is_saved_once(folder, head):
    from safetensors import safe_open

    with safe_open(folder / f"{head}-plain" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert ("lm_head.weight" in names) == (head == "untied")
    assert "model.embed_tokens.weight" in names


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
