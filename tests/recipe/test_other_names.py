"""The options of TRL, axolotl, LLaMA-Factory, litgpt and transformers 4 are answered with ours."""

import re

import pytest

from hf_clm.errors import RecipeError
from hf_clm.recipe.other_names import IS_KEY, TOOLS, advise
from hf_clm.recipe.recipe import load_recipe, recipe_fields

WORDS = re.compile(r"\b(?:[a-z_]+\.)+[a-z_]+\b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_seq_length", "5"], "--max_seq_length is a name of TRL; fix: use --data.max_length"),
        (["--model_revision", "x"], "--model_revision is a name of TRL; fix: use --model.revision"),
        (["--dataset_name", "x"], "--dataset_name is a name of TRL; fix: use --data.train"),
        (["--use_peft"], "--use_peft is a name of TRL; fix: use --lora true, or add a section lora to the"),
        (["--load_in_4bit"], "--load_in_4bit is a name of TRL; fix: use --lora.quantize 4bit"),
        (["--sample_packing"], "--sample_packing is a name of axolotl; fix: remove it: rows are packed"),
        (["--micro_batch_size", "2"], "--micro_batch_size is a name of axolotl; fix: use --per_device"),
        (["--cutoff_len", "2"], "--cutoff_len is a name of LLaMA-Factory; fix: use --data.max_length"),
        (["--use_muon"], "--use_muon is a name of LLaMA-Factory; fix: use --optimizer.name muon"),
        (["--loraplus_lr_ratio", "16"], "--loraplus_lr_ratio is a name of axolotl; fix: use optimizer"),
        (["--out_dir", "x"], "--out_dir is a name of litgpt; fix: use --output_dir"),
        (["--lr", "1"], "--lr is a name of other trainers; fix: use --learning_rate"),
        (["--evaluation_strategy", "no"], "--evaluation_strategy is a name of transformers 4; fix: use --"),
        (["--train.max_length", "5"], "train.max_length is a name of TRL; fix: use data.max_length"),
        (["--lora.lora_r", "5"], "lora.lora_r is a name of TRL; fix: use lora.r"),
        (["--data.dataset", "x"], "data.dataset is a name of LLaMA-Factory; fix: use data.train"),
        (["--max-seq-length", "5"], "--max-seq-length is a name of TRL; fix: use --data.max_length"),
    ],
)  # fmt: skip
def test_a_name_of_another_tool_is_told_ours(words, message):
    with pytest.raises(RecipeError) as error:
        load_recipe("sft/poems", words)

    assert str(error.value).startswith(f"command line: {message}")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("--max_seq_len", None),  # 0.7 like max_steps, which is something else
        ("--lora_layers", None),
        ("--learning-rate", "learning_rate"),
        ("--num_train_epoch", "num_train_epochs"),
        ("--data.learning_rate", "train.learning_rate"),  # the same name in another section
        ("--data.packin", "packing"),
        ("--lora.dropuot", "dropout"),
        ("--model.packing_", None),
    ],
)
def test_only_a_typing_error_or_the_same_name_is_suggested_from_another_section(name, suggestion):
    with pytest.raises(RecipeError) as error:
        load_recipe("sft/poems", [name, "5"])

    found = re.search(r"did you mean '(.*?)'", str(error.value))
    assert (found[1] if found else None) == suggestion


def test_every_advice_names_keys_that_exist():
    known = recipe_fields()
    wrong = []
    for tool, names in TOOLS.items():
        for name, advice in names.items():
            keys = [advice] if IS_KEY.fullmatch(advice) else WORDS.findall(advice)
            wrong += [(tool, name, key) for key in keys if key not in known]
    assert not wrong


def test_no_table_advises_on_a_key_of_the_recipe():
    """A field of TrainingArguments that another tool has too is simply a key."""
    fields = {key.removeprefix("train.") for key in recipe_fields() if key.startswith("train.")}

    assert [name for names in TOOLS.values() for name in names if name in fields] == []
    assert advise("data.max_length") is None and advise("samples.lr") is None


def test_gradient_checkpointing_is_the_older_spelling_of_activation_checkpointing():
    recipe = load_recipe("sft/poems", ["--gradient_checkpointing"])

    assert recipe.train["activation_checkpointing"] is True
    assert "gradient_checkpointing" not in recipe.train


def test_both_spellings_at_once_are_refused():
    from hf_clm.api import to_recipe

    train = {"output_dir": "r", "gradient_checkpointing": True, "activation_checkpointing": False}
    with pytest.raises(RecipeError, match="is activation_checkpointing, which is given too; fix: remove one"):
        to_recipe({"stage": "sft", "model": {"name_or_path": "m"}, "data": {"train": "a"}, "train": train})
