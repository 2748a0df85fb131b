"""Training on a GPU, with fake tensors: which operators run, and where a step would wait for the GPU."""

from collections import Counter
from typing import Any

import pytest
import torch
from benchmarks.gpu_checks import varlen
from fake_cuda.device import FakeGpu, to_fake_gpu
from helpers import build_recipe, byte_tokenizer, read_split, save_folder, tiny_model
from transformers import TrainerCallback

from hf_clm.model.build import build_model, build_model_config
from hf_clm.training.arguments import training_arguments
from hf_clm.training.assemble import build_trainer

pytestmark = [
    pytest.mark.fake_cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="see make test-fake-cuda"),
]
RECORDS = [{"prompt": "say " + "x" * n, "completion": "y" * (3 * n)} for n in [*range(1, 13)] * 8]
VARLEN = ["torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"]
# The kind of model, its settings, and changes of the recipe. All have 2 layers, and steps of 2 micro-batches.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2": ("qwen2", {}, {}),
    "gpt2": ("gpt2", {}, {}),
    "lora": ("qwen2", {}, {"lora": {"r": 4}}),
    "muon": ("qwen2", {}, {"optimizer": {"name": "muon"}}),
    "dropout": ("gpt2", {"attn_pdrop": 0.1}, {}),  # which the fused kernel does not support
}


class Recording(TrainerCallback):
    """Keeps what happens from the end of the first step to that of the third, the last but one."""

    def __init__(self, gpu: FakeGpu):
        self.gpu = gpu

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.gpu.forget()
        if state.global_step == 3:
            self.reads, self.waits = list(self.gpu.reads), list(self.gpu.waits)
            self.operators = Counter(self.gpu.operators)


@pytest.fixture(scope="module", params=CASES)
def steps(request, tmp_path_factory) -> Recording:
    """Two complete optimizer steps of a run, with everything that the Trainer does in between."""
    folder = tmp_path_factory.mktemp("run")
    kind, settings, changes = CASES[request.param]
    model = save_folder(folder / "model", tiny_model(kind, **settings), byte_tokenizer())
    values = {"use_cpu": False, "bf16": True, "max_steps": 4, "gradient_accumulation_steps": 2}
    values |= {"logging_steps": 1000, "logging_first_step": False, "eval_strategy": "no"}
    values |= {"eval_on_start": False}
    sections = {"model": {"name_or_path": model}, "data": {"packing": "best_fit"}, "train": values}
    recipe = build_recipe(folder, RECORDS, **sections, **changes)
    arguments, tokenizer = training_arguments(recipe), byte_tokenizer()
    split = read_split(recipe, tokenizer)
    config = build_model_config(recipe, tokenizer)
    on_cpu = build_model(recipe, tokenizer, config=config, arguments=arguments)
    with FakeGpu() as gpu:
        fake, splits = to_fake_gpu(on_cpu), {"train": split}
        trainer = build_trainer(fake, arguments, recipe=recipe, tokenizer=tokenizer, splits=splits)
        recording = Recording(gpu)
        trainer.add_callback(recording)
        trainer.train()
    return recording


def test_each_layer_of_each_micro_batch_calls_the_fused_kernel_if_it_supports_the_model(steps, request):
    is_supported = "dropout" not in request.node.callspec.id

    calls = [steps.operators[name] for name in VARLEN]
    assert calls == ([8, 8] if is_supported else [0, 0])  # 2 layers x 2 micro-batches x 2 steps


def test_each_step_updates_with_the_fused_optimizer(steps):
    assert steps.operators["aten::_fused_adamw_"] in (2, 4)  # one or two groups: some weights do not decay


def test_a_step_reads_no_value_of_the_gpu(steps):
    assert steps.reads == []


def test_a_step_does_not_wait_for_its_batches_to_be_copied(steps):
    assert steps.waits == []


def test_the_script_for_a_gpu_finds_the_fused_kernel_where_the_head_width_allows_it():
    with FakeGpu():
        found = varlen(is_miniature=False)

    fused = {width: part["fused"] for width, part in found["widths"].items()}
    assert fused == {"64": True, "128": True, "100": False, "512": False}
