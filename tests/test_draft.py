"""``hf-clm train --model MODEL --data FILE``: what is chosen for a model and data, and why."""

import json
from pathlib import Path

import pytest
from helpers import byte_tokenizer, save_folder, tiny_model

from hf_clm.cli import main
from hf_clm.draft import DataSize, ModelSize, choose, learning_rate, measure_data, measure_model, open_recipe
from hf_clm.errors import DataError, ModelError, RecipeError

MODEL, DATA = "model.name_or_path", "data.train"
CHATS = DataSize(records=1200, tokens=400_000, length=300, is_text=False)
TEXTS = DataSize(records=50, tokens=4_000_000, length=90_000, is_text=True)
SMALL = ModelSize(parameters=135_000_000, positions=8192)


@pytest.fixture(autouse=True)
def _on_a_cpu_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_clm.draft.has_gpu", lambda: False)


def chosen(size=SMALL, data=CHATS, **given):
    values = {
        MODEL: "org/Small-135M",
        DATA: "chats.jsonl",
        **{k.replace("__", "."): v for k, v in given.items()},
    }
    return {choice.key: choice.value for choice in choose(values, size, data)}


def write(name: str, records: list[object]) -> str:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return name


def test_chats_are_fine_tuned_and_texts_are_read():
    assert (chosen()["stage"], chosen(data=TEXTS)["stage"]) == ("sft", "pretrain")
    assert chosen(data=TEXTS, stage="sft")["stage"] == "sft"


def test_the_values_for_a_small_model_and_1200_chats():
    values = chosen()

    assert values["data.max_length"] == 512  # the power of two above 300
    assert values["data.eval_fraction"] == 0.083  # 100 of 1,200
    assert values["train.num_train_epochs"] == 3
    assert values["train.learning_rate"] == 5e-5
    # 400,000 / 512 rows, three times, are 2,343: 16 a step give 146 steps
    assert (values["train.per_device_train_batch_size"], values["train.gradient_accumulation_steps"]) == (
        1,
        16,
    )
    assert values["train.output_dir"] == "runs/small-135m-chats"


def test_few_records_make_small_steps_rather_than_few():
    values = chosen(data=DataSize(records=48, tokens=2000, length=60, is_text=False))

    assert values["train.gradient_accumulation_steps"] == 1
    assert values["data.max_length"] == 256


@pytest.mark.parametrize(
    ("parameters", "is_adapted", "rate"),
    [
        (135_000_000, False, 5e-5),
        (500_000_000, False, 2e-5),
        (7_000_000_000, False, 1e-5),
        (135_000_000, True, 2e-4),
        (7_000_000_000, True, 1e-4),
    ],
)
def test_larger_models_learn_at_a_lower_rate_and_adapters_at_a_higher(parameters, is_adapted, rate):
    assert learning_rate(parameters, is_adapted=is_adapted) == pytest.approx(rate)


def test_a_large_model_gets_adapters_unless_told_otherwise():
    large = ModelSize(parameters=7_600_000_000, positions=32_768)

    assert chosen(large)["lora.r"] == 16 and chosen(large)["train.output_dir"].endswith("-lora")
    assert "lora.r" not in chosen(large, lora=False) and "lora.r" not in chosen()


def test_rows_are_no_longer_than_the_model_reads():
    assert chosen(ModelSize(parameters=1, positions=128))["data.max_length"] == 128


def test_processes_share_the_rows_of_a_step(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")

    assert chosen()["train.gradient_accumulation_steps"] == 4


def test_what_is_given_is_not_chosen_around():
    values = chosen(data__eval="held-out.jsonl", train__save_strategy="no", evaluation__generate=0)

    assert not values.keys() & {"data.eval_fraction", "train.save_steps", "evaluation.every"}
    assert values["train.eval_strategy"] == "steps"
    assert "train.eval_strategy" not in chosen(data__eval_fraction=0.0)


def test_a_model_and_data_are_measured_without_loading_them():
    folder = save_folder(Path("tiny"), tiny_model("gpt2", n_positions=64), byte_tokenizer())
    chats = write("chats.jsonl", [{"prompt": "abcd", "completion": "efgh"}] * 30)
    Path("story.txt").write_text("0123456789" * 40)

    # embeddings 260 x 32 and 64 x 32; two layers of 12,704; the last norm
    assert measure_model(folder) == ModelSize(parameters=8320 + 2048 + 2 * 12_704 + 64, positions=64)
    assert measure_data(chats) == DataSize(records=30, tokens=60, length=2, is_text=False)
    assert measure_data(["story.txt"]) == DataSize(records=1, tokens=100, length=100, is_text=True)
    assert measure_data([chats, "story.txt"]).is_text is False


def test_large_data_are_judged_by_their_first_records():
    size = measure_data(write("many.jsonl", [{"text": "x" * 40}] * 5000))

    assert size.records == pytest.approx(5000, rel=0.3)
    assert size.tokens == pytest.approx(50_000, rel=0.3)


def test_a_recipe_shows_where_each_value_comes_from_and_what_is_given_wins():
    folder = save_folder(Path("tiny"), tiny_model("qwen2"), byte_tokenizer())
    data = write("chats.jsonl", [{"prompt": "a", "completion": "b"}] * 30)
    words = ["--model", folder, "--data", data, "--learning_rate", "0.5", "--lora", "true"]
    words += ["--optimizer", "muon"]

    recipe = open_recipe("", words)

    assert recipe.model.name_or_path == folder and recipe.data.train[0].path == data
    assert recipe.train["learning_rate"] == 0.5 and recipe.lora is not None
    assert recipe.optimizer is not None and recipe.optimizer.name == "muon"
    assert recipe.places["train.learning_rate"] == "command line"
    assert recipe.places["data.eval_fraction"] == "chosen: held out, to see the loss on new data"


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--model", "x"], RecipeError, "needs a recipe, or a model and data: data is missing; fix: "),
        (
            ["--data", "x.jsonl"],
            RecipeError,
            "needs a recipe, or a model and data: a model is missing; fix: ",
        ),
        (["--model", "./none", "--data", "x.jsonl"], ModelError, "--model: no such folder; got './none'"),
        (["--model", "tiny", "--data", "x.jsonl"], DataError, "x.jsonl: no such file"),
        (
            ["--model", "tiny", "--data", "chats.jsonl", "--max_seq_length", "9"],
            RecipeError,
            "command line: ",
        ),
    ],
)
def test_what_is_missing_is_named(words, error, message):
    save_folder(Path("tiny"), tiny_model("qwen2"), byte_tokenizer())
    write("chats.jsonl", [{"prompt": "a", "completion": "b"}])

    with pytest.raises(error) as caught:
        open_recipe("", words)
    assert str(caught.value).startswith(message)


@pytest.mark.slow
def test_the_command_line_prints_what_was_chosen_and_writes_the_recipe(capsys):
    folder = save_folder(Path("tiny"), tiny_model("qwen2"), byte_tokenizer())
    data = write("chats.jsonl", [{"prompt": f"a{n}", "completion": f"b{n}"} for n in range(40)])
    words = ["--model", folder, "--data", data, "--max_steps", "2", "--use_cpu", "--doctor.round_trip", "off"]

    assert main(["train", *words]) == 0

    shown = capsys.readouterr().out
    assert shown.startswith("recipe    made for tiny and chats.jsonl; every value can be given instead\n")
    assert "          stage: sft " in shown and "num_train_epochs: 3.0" in shown
    assert main(["train", "runs/tiny-chats", "--overwrite"]) == 0
    assert main(["config", *words]) == 0
    assert "chosen: held out, to see the loss on new data" in capsys.readouterr().out
