"""LoRA: training, saving and loading, compared with plain peft."""

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import byte_tokenizer, save_folder, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_clm.errors import EnvironmentFault, ModelError, RecipeError
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.generate import generate
from hf_clm.generation.load import load_run
from hf_clm.model import adapters
from hf_clm.model.adapters import add_adapters, find_new_tokens, is_adapter, load_adapted
from hf_clm.model.build import weights_dtype
from hf_clm.model.load import is_adapted, takes_targets, without_adapters
from hf_clm.recipe.recipe import Recipe
from hf_clm.text.tokenizer import load_tokenizer
from hf_clm.training.arguments import resolve, training_arguments
from hf_clm.training.run import train

peft = pytest.importorskip("peft")

ROWS = [("say x\n", "xx"), ("say y\n", "yyyy"), ("say zz\n", "z")]
RECORDS = [{"prompt": prompt, "completion": completion} for prompt, completion in ROWS]
CHAT = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 4
SAMPLES = {"prompts": ["say x\n"], "max_new_tokens": 2}


def bytes_only() -> PreTrainedTokenizerFast:
    """A tokenizer of 257 tokens, the bytes and an end token; a pad token makes the embeddings grow."""
    content = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:1]
    for letter in ("<|pad|>", "<|im_start|>", "<|im_end|>"):
        del content["model"]["vocab"][letter]
    backend = type(byte_tokenizer().backend_tokenizer).from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def build_base(folder: Path, kind: str = "qwen2", **settings: Any) -> str:
    return save_folder(folder / "base", tiny_model(kind, vocab_size=257, **settings), bytes_only())


def build_recipe(
    folder: Path, records: list[Any] = RECORDS, *, base: str | None = None, **changes: Any
) -> Recipe:
    """Builds a recipe for three steps on all three rows with a constant learning rate."""
    settings = {"max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "seed": 42}
    settings |= {"per_device_train_batch_size": 3, "weight_decay": 0.0}
    return helpers.build_recipe(
        folder,
        records,
        model={"name_or_path": base or build_base(folder)} | changes.pop("model", {}),
        lora={"r": 4, "alpha": 8} | changes.pop("lora", {}),
        train=settings | changes.pop("train", {}),
        **changes,
    )


def read_losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(model, save_embedding_layers=False)


def load_saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_a_run_equals_a_training_loop_over_plain_peft(tmp_path, kind, options):
    """Each row alone: the sum over its targets, divided by all 10 targets (7 letters, 3 end tokens)."""
    recipe = build_recipe(tmp_path, base=build_base(tmp_path, kind), lora=options)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(258, mean_resizing=False)
    for table in (base.get_input_embeddings(), base.get_output_embeddings()):  # a row for the pad token
        table.weight.data[257] = table.weight.data[:257].mean(dim=0)
    torch.manual_seed(42)
    model = peft.get_peft_model(base, config)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(3):
        total = torch.zeros(())
        for prompt, completion in ROWS:
            ids = torch.tensor([[*prompt.encode(), *completion.encode(), 256]])
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")
        losses.append(total.item() / 10)
        optimizer.zero_grad()
        (total / 10).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    train(recipe)

    assert read_losses(tmp_path / "run") == pytest.approx(losses, rel=1e-5)
    assert losses[2] < losses[0]
    saved, own = load_saved(tmp_path / "run"), adapter_weights(model)
    assert sorted(saved) == sorted(own)
    for name, weight in saved.items():
        torch.testing.assert_close(weight, own[name], rtol=1e-4, atol=1e-5)


def test_a_new_pad_token_is_not_saved_with_the_adapter(tmp_path):
    """The base has 257 rows and the tokenizer 258 tokens, but no embedding rows are saved."""
    result = train(build_recipe(tmp_path, doctor={"round_trip": "start"}, samples=SAMPLES))

    saved = load_saved(tmp_path / "run")
    assert all(".lora_A." in name or ".lora_B." in name for name in saved)
    assert len(saved) == 28  # A and B of seven matrices in two layers
    assert result["trained_parameters"] == sum(weight.numel() for weight in saved.values()) == 4096
    assert result["proof"]["round_trip"]["logit_difference"] < 1e-5
    assert "library_name: peft" in (tmp_path / "run" / "README.md").read_text(
        "utf-8"
    )  # our model card, not that of peft


@pytest.mark.parametrize("is_tied", [True, False])
def test_new_chat_tokens_are_trained_and_loaded_in_a_new_process(tmp_path, is_tied):
    base = build_base(tmp_path, tie_word_embeddings=is_tied)
    chat = {"chat_template": "chatml"}

    result = train(build_recipe(tmp_path, CHAT, base=base, tokenizer=chat, doctor={"round_trip": "start"}))

    saved = load_saved(tmp_path / "run")
    rows = {name: list(weight.shape) for name, weight in saved.items() if "lora" not in name}
    tables = ["embed_tokens"] if is_tied else ["embed_tokens", "lm_head"]
    assert sorted(rows.values()) == [[2, 32]] * len(tables)  # <|im_start|> and <|im_end|>
    assert result["proof"]["round_trip"]["logit_difference"] < 1e-5
    run = load_run(str(tmp_path / "run"), device="cpu")
    assert run.model.config.vocab_size == 260
    assert is_adapted(run.model)


def test_new_tokens_exclude_those_of_the_base_and_the_pad_token(tmp_path):
    base = build_base(tmp_path)
    tokenizer = load_tokenizer(base, chat_template="chatml")

    assert tokenizer.get_added_vocab()["<|pad|>"] == 257
    assert find_new_tokens(tokenizer, base, revision=None) == [258, 259]
    assert find_new_tokens(load_tokenizer(base), base, revision=None) == []


def test_with_another_tokenizer_the_tokens_without_a_row_are_new(tmp_path):
    """The base has 257 rows and no tokenizer; 258 and 259 are the chat tokens, 257 is the pad token."""
    base = build_base(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / file).unlink()

    train(build_recipe(tmp_path, base=base, tokenizer={"name_or_path": str(tmp_path / "other")}))

    rows = {name: list(weight.shape) for name, weight in load_saved(tmp_path / "run").items()}
    assert sorted(shape for name, shape in rows.items() if "lora" not in name) == [[2, 32], [2, 32]]


def test_resuming_after_two_of_three_steps_gives_the_same_adapter(tmp_path):
    dropout = {"dropout": 0.3}
    steps = {"save_strategy": "steps", "save_steps": 2}
    train(build_recipe(tmp_path, lora=dropout, train=steps))
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    again = {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": checkpoint}
    torch.manual_seed(987)

    train(build_recipe(tmp_path, base=str(tmp_path / "base"), lora=dropout, train=again))

    whole, resumed = load_saved(tmp_path / "run"), load_saved(tmp_path / "again")
    started = load_saved(Path(checkpoint))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], started[name]) for name in whole)


def test_activation_checkpointing_does_not_change_the_adapter(tmp_path):
    train(build_recipe(tmp_path))
    again = {"activation_checkpointing": True, "output_dir": str(tmp_path / "again")}

    train(build_recipe(tmp_path, base=str(tmp_path / "base"), train=again))

    whole, checkpointed = load_saved(tmp_path / "run"), load_saved(tmp_path / "again")
    for name in whole:
        torch.testing.assert_close(whole[name], checkpointed[name], rtol=1e-5, atol=1e-7)


def test_the_base_is_bfloat16_under_autocast_and_the_adapters_are_float32(tmp_path):
    """A dtype in the recipe takes precedence."""
    recipe = build_recipe(tmp_path, train={"bf16": True})
    arguments = training_arguments(recipe)

    assert weights_dtype(recipe, arguments) == "bfloat16"
    assert weights_dtype(recipe.model_copy(update={"lora": None}), arguments) == "float32"
    again = Recipe.model_validate(resolve(recipe, arguments).model_dump())  # as saved in recipe.yaml
    assert weights_dtype(again, arguments) == again.model.dtype == "bfloat16"
    explicit = build_recipe(tmp_path, model={"dtype": "float32"}, train={"bf16": True})
    assert weights_dtype(explicit, arguments) == "float32"
    assert weights_dtype(build_recipe(tmp_path), training_arguments(build_recipe(tmp_path))) == "float32"

    model = tiny_model().to(torch.bfloat16)
    adapted = add_adapters(model, base="m", r=2, target_modules=["q_proj"])

    kinds = {weight.dtype for name, weight in adapted.named_parameters() if "lora" in name}
    assert (kinds, adapted.dtype) == ({torch.float32}, torch.bfloat16)


def test_the_inner_model_of_adapters_is_found():
    model = tiny_model()

    adapted = add_adapters(model, base="m", r=2, target_modules="all-linear")

    assert without_adapters(adapted) is model is without_adapters(model)
    assert (is_adapted(adapted), is_adapted(model)) == (True, False)
    assert takes_targets(adapted) is True
    assert next(name for name, weight in model.named_parameters() if weight.requires_grad).endswith(
        "q_proj.lora_A.default.weight"
    )


def test_a_run_generates_the_answers_of_plain_peft(tmp_path):
    train(build_recipe(tmp_path, train={"max_steps": 8}))
    ids = torch.tensor([[*b"say y\n"]])
    plain = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run"
    )
    expected = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)[0, 6:]

    run = load_run(str(tmp_path / "run"), attention="sdpa", device="cpu")
    answer = generate(run.model, run.tokenizer, prompts=["say y\n"], decoding=Decoding(4))[0]

    kept = [token for token in expected.tolist() if token < 256]
    assert answer.text == bytes(kept).decode("utf-8", "replace")
    assert is_adapter(str(tmp_path / "run")) and not is_adapter(str(tmp_path / "base"))


def test_a_base_in_a_relative_folder_is_found_from_another_folder(tmp_path, monkeypatch):
    build_base(tmp_path)
    monkeypatch.chdir(tmp_path)
    adapted = add_adapters(
        AutoModelForCausalLM.from_pretrained("base"), base="base", r=2, target_modules="all-linear"
    )
    adapted.save_pretrained("adapter", save_embedding_layers=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    adapted = load_adapted("../adapter", load_tokenizer(str(tmp_path / "base")), attention="sdpa")

    assert is_adapted(adapted)


@pytest.mark.parametrize("key", ["target_modules", "modules_to_save"])
def test_an_unknown_module_is_an_error_with_the_nearest_name(key):
    with pytest.raises(ModelError) as caught:
        add_adapters(tiny_model(), base="m", **{"r": 2, "target_modules": ["q_proj"], key: ["o_prj"]})

    assert str(caught.value) == (
        f"lora.{key}: the model has no such module; got 'o_prj'; fix: use one of down_proj, gate_proj, "
        "k_proj, o_proj, q_proj, up_proj, v_proj; did you mean 'o_proj'?"
    )


def test_missing_requirements_are_reported_before_a_model_is_loaded(tmp_path, monkeypatch):
    quantized = build_recipe(tmp_path, lora={"quantize": "4bit"})
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)

    with pytest.raises(
        EnvironmentFault, match=r"^lora.quantize: needs the package bitsandbytes; fix: pip inst"
    ):
        train(quantized)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(EnvironmentFault, match=r"lora requires the package peft; fix: pip install"):
        adapters.import_peft()


def test_lora_needs_a_pretrained_model(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "stage: sft\nmodel: {init: scratch, config: {model_type: gpt2}}\ntokenizer: {train: {}}\n"
        "data: {train: [a.jsonl]}\nlora: {r: 4}\n"
    )
    from hf_clm.recipe.recipe import load_recipe

    with pytest.raises(RecipeError, match=r"recipe.yaml:5: lora needs model.init: pretrained; got scratch"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "lora.target_modules"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora.target_modules"),
        ({"target_modules": ["model.embed_tokens"]}, "lora.target_modules"),
        ({"target_modules": "all-linear", "modules_to_save": ["lm_head"]}, "lora.modules_to_save"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
            "lora.modules_to_save",
        ),
    ],
)
def test_tied_layers_cannot_be_adapted(options, place):
    """Merging into one of them would change the other too (peft #2018, #2777)."""
    with pytest.raises(ModelError, match="embed_tokens and lm_head share their weights") as caught:
        add_adapters(tiny_model(tie_word_embeddings=True), base="x", **options)

    assert caught.value.where == place
    assert add_adapters(tiny_model(tie_word_embeddings=False), base="x", **options)


def test_tied_layers_are_rejected_before_the_data_are_read(tmp_path):
    model = save_folder(tmp_path / "tied", tiny_model(tie_word_embeddings=True), byte_tokenizer())
    lora = {"target_modules": ["q_proj", "lm_head"]}
    recipe = helpers.build_recipe(tmp_path, [], model={"name_or_path": model}, lora=lora)
    (tmp_path / "rows.jsonl").unlink()

    with pytest.raises(ModelError, match=r"^lora.target_modules: model.embed_tokens and lm_head share"):
        train(recipe)
