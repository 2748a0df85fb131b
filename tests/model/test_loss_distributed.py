"""The loss in two processes equals that in one, with DDP and with FSDP2, which shards the head."""

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
# Two rows per process, with 2 + 1 and 5 + 4 targets, so that a mean of means would be wrong.
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


# --- the program that runs in each of the two processes


def main(rank: int, folder: Path) -> None:
    """Measures loss and gradients for every way to distribute the model; rank 0 writes them."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    result = {}
    for head in HEADS:
        for name, spread in (("ddp", to_ddp), ("fsdp2", to_fsdp2)):
            result[name, head] = measure(build(head), spread, rows=ROWS[2 * rank : 2 * rank + 2])
    if rank == 0:
        torch.save(result, folder / "result.pt")
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
    """Returns the loss of both processes and the complete gradient of each weight, after two passes.

    The processes average their gradients, so the loss is multiplied by their number, as in the Trainer.
    """
    target_loss = use_target_loss(model)
    wrapped = spread(model)
    for _ in range(2):  # in the second pass, FSDP2 has sharded the weights again
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
def result(tmp_path_factory) -> dict[tuple[str, str], tuple[float, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("distributed")
    run_program(__file__, folder)
    return torch.load(folder / "result.pt")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_have_the_loss_and_gradients_of_the_stock_model_in_one(result, name, head):
    model = build(head)
    assert why_not(model) == ""
    loss = model(**collate(ROWS), use_cache=False, num_items_in_batch=TARGETS).loss
    loss.backward()
    expected = {key: weight.grad for key, weight in model.named_parameters()}

    total, gradients = result[name, head]

    assert total == pytest.approx(loss.item(), rel=1e-5)
    assert gradients.keys() == expected.keys()
    assert ("lm_head.weight" in gradients) == (head == "untied")
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((gradients[key] - gradient).abs().max()) <= 1e-5 * scale, key


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
