"""The loss in two processes: DDP averages gradients as one process has them, FSDP2 shards the head."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_program
from helpers import X, tiny_model

from hf_clm.data.batch.collators import DataCollatorForCausalLM
from hf_clm.model.loss import use_target_loss, why_not

ROOT = Path(__file__).resolve().parents[2]
HEADS = {"tied": True, "untied": False}
# Of each process two rows: 2 + 1 and 5 + 4 targets, so that a mean of means would be off.
ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [X, X, 7, 8]},
    {"input_ids": [9, 1], "labels": [X, 1]},
    {"input_ids": [3, 3, 4, 4, 5, 250], "labels": [X, 3, 4, 4, 5, 250]},
    {"input_ids": [8, 7, 6, 5, 4], "labels": [X, 7, 6, 5, 4]},
]
TARGETS = 12


def build(head: str) -> Any:
    return tiny_model("qwen2", tie_word_embeddings=HEADS[head]).train()


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return DataCollatorForCausalLM(257)(rows)


# --- in each of the two processes: this file is run as a program


def main(rank: int, folder: Path) -> None:
    """Writes loss and gradients of every way to spread a model over the processes; by rank 0."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    found = {}
    for head in HEADS:
        for name, spread in (("ddp", to_ddp), ("fsdp2", to_fsdp2)):
            found[name, head] = measure(build(head), spread, rows=ROWS[2 * rank : 2 * rank + 2])
    if rank == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def to_ddp(model: Any) -> Any:
    return torch.nn.parallel.DistributedDataParallel(model)


def to_fsdp2(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def measure(model: Any, spread: Any, *, rows: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of both processes, and the whole gradient of each weight, after two passes over the rows.

    The processes average their gradients, so the loss is multiplied by their number, as the Trainer does it.
    """
    target_loss = use_target_loss(model)
    wrapped = spread(model)
    for _ in range(2):  # the second pass finds the weights of FSDP2 sharded again
        wrapped.zero_grad()
        with target_loss.measuring():
            loss = 2 * wrapped(**collate(rows), use_cache=False, num_items_in_batch=TARGETS).loss
        loss.backward()
    total = loss.detach() / 2
    torch.distributed.all_reduce(total)
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    whole = {
        name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
        for name, grad in gradients.items()
    }
    return total.item(), whole


# --- the tests


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[str, str], tuple[float, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("distributed")
    run_program(__file__, folder)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_have_the_loss_and_gradients_of_the_stock_model_in_one(found, name, head):
    model = build(head)
    assert why_not(model) == ""
    loss = model(**collate(ROWS), use_cache=False, num_items_in_batch=TARGETS).loss
    loss.backward()
    expected = {key: weight.grad for key, weight in model.named_parameters()}

    total, gradients = found[name, head]

    assert total == pytest.approx(loss.item(), rel=1e-5)
    assert gradients.keys() == expected.keys()
    assert ("lm_head.weight" in gradients) == (head == "untied")
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((gradients[key] - gradient).abs().max()) <= 1e-5 * scale, key


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
