"""Defaults that depend on the machine, and static shapes for compiled models."""

import pytest
import torch
from helpers import build_recipe, byte_tokenizer, document

from hf_clm.data.batch.collators import DataCollatorForPackedCausalLM, StaticShape, static_shape
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.label.datasets import SFTDataset
from hf_clm.data.prepared.sets import load_early
from hf_clm.model.build import build_tokenizer
from hf_clm.training.arguments import training_arguments
from hf_clm.training.run import train

ROWS = [
    {"text": "to be or not to be"},
    {"text": "that is the question"},
    {"text": "whether"},
    {"text": "it is"},
]


@pytest.mark.parametrize(
    ("instructions", "given", "expected"),
    [
        ("avx512_bf16", {}, True),
        ("", {}, False),
        ("avx512_bf16", {"bf16": False}, False),
        ("avx512_bf16", {"fp16": True}, False),
        ("", {"bf16": True}, True),
    ],
)
def test_bfloat16_is_the_default_if_the_cpu_supports_it(tmp_path, monkeypatch, instructions, given, expected):
    monkeypatch.setattr("hf_clm.machine.bf16_instructions", lambda: instructions)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    recipe = build_recipe(tmp_path, ROWS, stage="pretrain")
    values = {key: value for key, value in recipe.train.items() if key != "bf16"}

    arguments = training_arguments(recipe.model_copy(update={"train": values | given}))

    assert arguments.bf16 is expected


def test_a_static_shape_fits_the_fullest_batch():
    texts = ["a", "b", "c", "d", "eeeeeee", "ffffffff"]  # with the stop token 2, 2, 2, 2, 8 and 9 tokens
    dataset = SFTDataset([document(text) for text in texts], byte_tokenizer())
    packed = PackedDataset(dataset, max_length=10)

    shape = static_shape([packed], rows=2, target_share=0.5)

    assert sorted(map(len, packed.pieces)) == [1, 2, 3]  # 9; 8 + 2; 2 + 2 + 2
    assert shape == StaticShape(tokens=20, documents=7, max_length=10, targets=(11, 13, 20))
    batch = DataCollatorForPackedCausalLM(with_targets=True, static=shape)([packed[0], packed[1]])
    assert batch["input_ids"].shape == (1, 20)
    assert static_shape([dataset], rows=2, target_share=1.0) == StaticShape(18, 4, 9, targets=(18,))


def test_a_compiled_run_equals_an_uncompiled_one(tmp_path):
    losses = []
    for name in ("plain", "compiled"):
        folder = tmp_path / name
        folder.mkdir()
        compiled = {"torch_compile": name == "compiled", "torch_compile_backend": "aot_eager"}
        settings = {"max_steps": 3, **(compiled if name == "compiled" else {})}
        result = train(
            build_recipe(folder, ROWS, stage="pretrain", data={"packing": "best_fit"}, train=settings)
        )
        losses.append((result["loss_before"], result["loss_after"]))

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] < losses[0][0]


@pytest.mark.parametrize("trained", [False, True])
def test_the_tokens_of_a_template_are_added_to_the_tokenizer(trained, tmp_path):
    sizes = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 64}
    changes: dict = {"model": {"name_or_path": None, "init": "scratch", "config": sizes}} if trained else {}
    section = {"control_tokens": ["<sep>"], "train": {"vocab_size": 300} if trained else None}
    recipe = build_recipe(tmp_path, ROWS, stage="pretrain", tokenizer=section, **changes)
    arguments = training_arguments(recipe)

    tokenizer = build_tokenizer(recipe, load_early(recipe, 0), arguments=arguments)

    assert tokenizer.decode(tokenizer("<sep>")["input_ids"]) == "<sep>"
    assert len(tokenizer("<sep>")["input_ids"]) == 1
