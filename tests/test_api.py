"""``hf_clm.train`` in Python: what can be passed, what comes back, and that it is the run of a recipe."""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from helpers import byte_tokenizer, save_folder, tiny_model
from transformers import TrainerCallback, pipeline

import hf_clm
from hf_clm.api import to_recipe
from hf_clm.errors import DataError, RecipeError
from hf_clm.recipe.recipe import load_recipe
from hf_clm.recipe.sections import Lora
from hf_clm.schema import Chat
from hf_clm.training.run import train as train_recipe

RECORDS = [
    {"prompt": f"What is {number} and one?", "completion": f"It is {number + 1}."} for number in range(12)
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHORT_RUN = {
    "max_steps": 2,
    "bf16": False,
    "use_cpu": True,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "doctor": {"round_trip": "off", "self_test": False},
    "data": {"max_length": 128, "eval_fraction": 0.0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return save_folder(folder, tiny_model("qwen2"), tokenizer)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def to_chat(record):
    """The question alone, without the answer's full stop."""
    answer = record["completion"].rstrip(".")
    return Chat([{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": answer}])


def to_record(record):
    """A record of another format: the question shouted."""
    return {"prompt": record["prompt"].upper(), "completion": record["completion"]}


class CountingCallback(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


class TaggingTrainer(hf_clm.CLMTrainer):
    def log(self, logs, *args, **kwargs):
        super().log({**logs, "tag": 7.0}, *args, **kwargs)


def guessed_share(prediction):
    """Token accuracy from the logits, by hand: a position predicts the token after it."""
    guesses, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
    return {"guessed": float((guesses == labels)[labels != -100].mean())}


# --- what comes back


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    counting = CountingCallback()
    folder = tmp_path_factory.mktemp("runs") / "all"
    run = hf_clm.train(
        model=model,
        train_dataset=RECORDS[:10],
        eval_dataset=RECORDS[10:],
        callbacks=[counting],
        compute_metrics=guessed_share,
        trainer_class=TaggingTrainer,
        optimizers=lambda model: (torch.optim.SGD(model.parameters(), lr=0.05), None),
        output_dir=folder,
        eval_strategy="steps",
        eval_steps=1,
        evaluation={"generate": 0, "every": 1, "max_new_tokens": 128},
        **SHORT_RUN,
    )
    return run, counting


def test_a_run_returns_its_model_tokenizer_trainer_metrics_and_folder(run):
    run, _ = run

    assert run.folder.name == "all" and (run.folder / "model.safetensors").is_file()
    assert run.record.status == "done" and run.record.steps_done == 2
    assert isinstance(run.trainer, TaggingTrainer)
    assert math.isfinite(run.metrics["eval_loss"]) and run.metrics["eval_token_accuracy"] >= 0
    assert run.tokenizer.pad_token_id == 257


def test_callbacks_see_every_step_and_a_trainer_of_ones_own_logs(run):
    run, counting = run

    assert counting.steps == 2
    entries = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(entry["tag"] == 7.0 for entry in entries if "loss" in entry or "eval_loss" in entry)


def test_the_optimizer_of_a_function_is_the_one_that_trains(run):
    optimizer = run[0].trainer.optimizer

    assert isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.SGD)


def test_compute_metrics_sees_the_logits_of_every_position(run):
    metrics = run[0].metrics

    assert metrics["eval_guessed"] == pytest.approx(metrics["eval_token_accuracy"], abs=1e-9)


def test_the_model_can_be_asked_at_once_and_evaluated_again_afterwards(run):
    run, _ = run
    messages = [{"role": "user", "content": "What is 3 and one?"}]

    answer = run.answer("What is 3 and one?", hf_clm.Decoding(max_new_tokens=4))
    asked = pipeline("text-generation", model=run.model, tokenizer=run.tokenizer)
    by_transformers = asked(messages, max_new_tokens=4)[0]["generated_text"][-1]["content"]

    assert answer == by_transformers == run.answer(messages, hf_clm.Decoding(max_new_tokens=4))
    assert run.trainer.evaluate()["eval_loss"] == run.metrics["eval_loss"]  # in the attention of training


def test_a_run_that_is_done_is_opened_from_its_folder(model):
    first = hf_clm.train(model=model, train_dataset=RECORDS, output_dir="runs/again", **SHORT_RUN)
    second = hf_clm.train(model=model, train_dataset=RECORDS, output_dir="runs/again", **SHORT_RUN)

    assert second.trainer is None and second.metrics == first.metrics
    ids = torch.tensor([[72, 105]])
    with torch.no_grad():
        assert torch.equal(first.model(ids).logits, second.model(ids).logits)


# --- what can be passed


def test_records_in_memory_are_the_run_of_a_file(model, tmp_path):
    """The same rows give the same loss, whether they come as dictionaries, a Dataset or a path."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    given = {
        "dictionaries": RECORDS,
        "generator": (record for record in RECORDS),
        "dataset": datasets.Dataset.from_list(RECORDS),
        "path": "rows.jsonl",
    }
    losses = {}
    for name, rows in given.items():
        run = hf_clm.train(model=model, train_dataset=rows, output_dir=f"runs/{name}", **SHORT_RUN)
        losses[name] = run.metrics["eval_loss"]

    assert len(set(losses.values())) == 1, losses


def test_a_format_may_be_a_function(model):
    run = hf_clm.train(model=model, train_dataset=RECORDS, format=to_chat, output_dir="runs/own", **SHORT_RUN)

    assert run.record.format == f"{__name__}:to_chat"
    learned = Path("runs/own/label_rows.jsonl").read_text()
    assert "It is 1" in learned and "It is 1." not in learned


def test_a_format_function_may_return_a_record_of_a_format(model):
    hf_clm.train(model=model, train_dataset=RECORDS, format=to_record, output_dir="runs/dict", **SHORT_RUN)

    assert "WHAT IS 0 AND ONE?" in Path("runs/dict/label_rows.jsonl").read_text()


def test_a_function_of_a_script_is_part_of_what_decides_the_prepared_set(tmp_path):
    """``__main__`` cannot be imported by others, and an edited function must not find the old rows."""
    program = (
        "from hf_clm.data.read.formats import custom_modules\n"
        "MARK = {mark!r}\n"
        "WORDS = {{'a', 'b', 'c'}}\n"
        "def helper(text, mode={mode!r}): return MARK + text.{method}() if text in WORDS else mode\n"
        "def read(record): return helper(record['text'])\n"
        "print(custom_modules(['__main__:read']))\n"
    )
    found = set()
    edits = [
        ("a", "x", "upper"),
        ("b", "x", "upper"),
        ("a", "y", "upper"),
        ("a", "x", "lower"),
        ("a", "x", "upper"),
    ]
    for mark, mode, method in edits:
        (tmp_path / "script.py").write_text(program.format(mark=mark, mode=mode, method=method))
        done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=True)
        found.add(done.stdout)

    assert len(found) == 4, "three edits, and the same program twice, in which a set has another order"


def test_sections_are_merged_and_keywords_win(model):
    Path("r.yaml").write_text(
        f"stage: sft\nmodel: {{name_or_path: {model}}}\n"
        "data: {train: rows.jsonl, max_length: 64, packing: none}\ntrain: {output_dir: runs/r, seed: 3}\n"
    )
    recipe = to_recipe(
        "r.yaml", keys={"data": {"max_length": 32}, "lora": Lora(r=4), "learning_rate": 1e-3, "train.seed": 5}
    )

    assert (recipe.data.max_length, recipe.data.packing) == (32, "none")
    assert recipe.lora == Lora(r=4)
    assert (recipe.train["learning_rate"], recipe.train["seed"]) == (1e-3, 5)
    assert recipe.places["data.max_length"] == "hf_clm.train"


def test_a_recipe_may_be_nested_keys_or_a_recipe():
    keys = {"stage": "sft", "model": {"name_or_path": "m"}, "data": {"train": "a.jsonl"}}
    keys["train"] = {"output_dir": Path("runs") / "x"}

    recipe = to_recipe(keys, keys={"lora": True})
    again = to_recipe(recipe, keys={"num_train_epochs": 2})

    assert recipe.train["output_dir"] == "runs/x" and recipe.lora == Lora()
    assert again.train == {"output_dir": "runs/x", "num_train_epochs": 2.0} and again.lora == Lora()


def test_evaluation_sets_have_names_and_formats_stay_with_paths():
    recipe = to_recipe(
        {"stage": "sft", "model": {"name_or_path": "m"}, "train": {"output_dir": "r"}},
        train_dataset=["a.jsonl", Path("b.jsonl")],
        eval_dataset={"chat": RECORDS, "text": {"path": "t.txt", "format": "text"}},
    )

    assert [source.path for source in recipe.data.train] == ["a.jsonl", "b.jsonl"]
    assert recipe.data.eval_sets == ["eval_chat", "eval_text"]
    assert recipe.data.eval[0].path.endswith(".jsonl") and recipe.data.eval[1].format == "text"


def test_new_data_keep_the_columns_of_a_recipe_and_not_its_format_alone():
    """The records tell their own format; a template or columns are not in them."""
    assert to_recipe("sft/poems", train_dataset="mine.jsonl").data.train[0].format is None
    assert to_recipe("sft/poems", train_dataset=RECORDS).data.train[0].format is None
    assert to_recipe("sft/mrpc", train_dataset="train.tsv").data.train[0].template is not None


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lerning_rate": 1}, "hf_clm.train: no such keyword 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"max_seq_length": 5}, "hf_clm.train: max_seq_length is a name of TRL; fix: use data.max_length"),
        ({"max_steps": "four"}, "hf_clm.train: train.max_steps: expected a whole number; got 'four'"),
        ({"data": {"max_lenght": 1}}, "hf_clm.train: data.max_lenght is not a key of a recipe; did you mean"),
        ({"format": lambda record: record}, "hf_clm.train: cannot find a function by its name; got"),
    ],
    ids=["misspelt", "TRL", "type", "section", "lambda"],
)
def test_a_wrong_keyword_is_named(arguments, message):
    with pytest.raises(RecipeError) as error:
        to_recipe("sft/poems", train_dataset="a.jsonl", keys=arguments)

    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"text": "a"}, "b"], "train_dataset[1]: expected a dictionary; got str; fix: one dictionary"),
        ([{"text": object()}], "train_dataset[0]: cannot be written as JSON"),
        ([{"text": math.nan}], "train_dataset[0]: cannot be written as JSON"),
        ([], "train_dataset: no records; got nothing"),
        (
            {"prompt": "a", "completion": "b"},
            "train_dataset: expected records, got one dictionary; fix: pass a list of dictionaries",
        ),
        (5, "train_dataset: no records; got int; fix: a path, dictionaries, or a datasets.Dataset"),
        (
            datasets.DatasetDict(test=datasets.Dataset.from_list(RECORDS)),
            "train_dataset: several datasets; got DatasetDict; fix: pass one of them: train_dataset=data",
        ),
        (
            datasets.Dataset.from_list(RECORDS).to_iterable_dataset(),
            "train_dataset: a stream may have no end; got IterableDataset; fix: pass dataset.take(N)",
        ),
    ],
    ids=["no dictionary", "no JSON", "NaN", "empty", "one", "number", "several", "stream"],
)
def test_a_wrong_dataset_is_named(given, message):
    with pytest.raises(DataError) as error:
        to_recipe("sft/poems", train_dataset=given)

    assert str(error.value).startswith(message)
    assert not list(Path().rglob(".train_dataset*"))


def test_another_trainer_and_an_optimizer_that_is_none_are_refused(model):
    from transformers import Trainer

    with pytest.raises(RecipeError, match="trainer_class: not a subclass of CLMTrainer; got Trainer; fix: "):
        hf_clm.train(model=model, train_dataset=RECORDS, trainer_class=Trainer, **SHORT_RUN)
    with pytest.raises(RecipeError, match="optimizers: the function returned no optimizer; got str; fix: "):
        hf_clm.train(
            model=model, train_dataset=RECORDS, optimizers=lambda model: ("adamw", None), **SHORT_RUN
        )


def test_a_mistake_in_the_data_is_told_before_torch_is_imported():
    program = (
        "import sys, hf_clm\n"
        "try: hf_clm.train('sft/poems', train_dataset=[{'instruct': 'a'}])\n"
        "except hf_clm.errors.DataError: print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"


# --- the package


def test_the_names_for_type_checkers_are_the_public_names():
    tree = ast.parse(Path(hf_clm.__file__).read_text())
    named = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_clm")
        for alias in node.names
        if alias.asname
    }

    assert named == hf_clm.PUBLIC_NAMES
    assert (Path(hf_clm.__file__).parent / "py.typed").is_file()


def test_the_recipe_of_a_run_in_python_runs_again_from_its_file(model):
    run = hf_clm.train(model=model, train_dataset=RECORDS, output_dir="runs/first", **SHORT_RUN)
    again = train_recipe(load_recipe("runs/first", ["--output_dir", "runs/second"]))

    assert again["evaluated"]["eval_loss"][1] == run.metrics["eval_loss"]


def test_a_run_that_is_done_is_not_returned_for_other_data(model):
    hf_clm.train(model=model, train_dataset=RECORDS, output_dir="runs/data", **SHORT_RUN)

    with pytest.raises(RecipeError, match="runs/data: this run is already done, and its data have changed"):
        hf_clm.train(model=model, train_dataset=RECORDS[:6], output_dir="runs/data", **SHORT_RUN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"callbacks": CountingCallback},
            "callbacks: expected a list; got type; fix: callbacks=[callback, ...]",
        ),
        (
            {"optimizers": (None, None)},
            "optimizers: expected a function from the model to (optimizer, schedule",
        ),
    ],
)
def test_the_usual_mistakes_of_objects_are_named_before_anything_is_loaded(arguments, message):
    with pytest.raises(RecipeError) as error:
        hf_clm.train(model="none", train_dataset=RECORDS, **arguments)

    assert str(error.value).startswith(message)


def test_metrics_that_are_no_numbers_are_named(model):
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "output_dir": "runs/metrics",
    }
    with pytest.raises(RecipeError, match=r"^compute_metrics: expected a dictionary of numbers; got 'x'$"):
        hf_clm.train(
            model=model,
            train_dataset=RECORDS[:10],
            eval_dataset=RECORDS[10:],
            compute_metrics=lambda prediction: {"name": "x"},
            **{**SHORT_RUN, **arguments, "data": {"max_length": 128}},
        )
