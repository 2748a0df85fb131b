"""hf-clm why: the row that taught an answer is first and is proved; steps; runs without a record."""

import json
import re
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import build_recipe
from pyarrow import parquet
from safetensors.torch import load_file

from hf_clm.cli import main
from hf_clm.generation.load import load_run
from hf_clm.model.attention import NAME as PACKED
from hf_clm.pages.traces import Traces
from hf_clm.recipe.recipe import Recipe, load_recipe
from hf_clm.replay.replays import first_use, replaying
from hf_clm.replay.why import choose_records, prove, to_questions, to_records, trace
from hf_clm.run_folder import read_lines
from hf_clm.training.run import train

ROOT = Path(__file__).resolve().parents[2]
POEMS = [json.loads(line) for line in (ROOT / "data/sft/poems.jsonl").read_text("utf-8").splitlines()]
WORDS = ["sun", "moon", "river", "stone", "owl", "salt", "bread", "tower", "glass"]
RECORDS = [{"instruct": f"say {word}\n", "input": "", "label": word * 2} for word in WORDS]
SAVED = {"save_strategy": "steps", "save_total_limit": 9}


def ask(run: Path, **options: Any) -> Traces:
    """Traces the answers to prompts, with the defaults of the command line."""
    given = {"prompt": [], "answer": [], "prove": 3, "until": None, **options}
    return trace(Namespace(run=str(run), **given), load_recipe(run / "recipe.yaml"), page=run / "why.html")


def recipe_of(folder: Path, **train: Any) -> Recipe:
    """Returns the recipe of 12 steps of a tiny model without dropout: 9 records in epochs of 3 steps."""
    folder.mkdir(exist_ok=True)
    settings = {"max_steps": 12, "learning_rate": 1e-2, "save_steps": 4, **SAVED, **train}
    settings |= {"gradient_accumulation_steps": 2, "max_grad_norm": 1e9}
    return build_recipe(folder, RECORDS, train=settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with checkpoints at 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("run") / "all"
    train(recipe_of(folder))
    return folder / "run"


@pytest.fixture(scope="module")
def poems(tmp_path_factory) -> Path:
    """A run of a small model on the first 9 poems."""
    source = {"path": str(ROOT / "data/sft/poems.jsonl"), "format": "instruct", "limit": 9}
    folder = tmp_path_factory.mktemp("poems")
    words = ["--data.train", json.dumps([source]), "--output_dir", str(folder / "run"), "--samples", "null"]
    words += ["--model.config.hidden_size", "64", "--model.config.num_hidden_layers", "2"]
    words += ["--model.config.intermediate_size", "128", "--tokenizer.train", "{vocab_size: 512}"]
    words += ["--max_steps", "100", "--save_strategy", "steps", "--save_steps", "50"]
    words += ["--doctor.round_trip", "off", "--learning_rate", "4e-3", "--eval_steps", "100"]
    train(load_recipe(ROOT / "recipes/sft/poems.yaml", words))
    return folder / "run"


@pytest.mark.slow
def test_six_of_six_poems_are_proved_to_be_taught_by_their_own_record(poems):
    """And each of the other five records matters less than a tenth of that."""
    asked = POEMS[:6]

    traces = ask(
        poems,
        prompt=[f"{poem['instruct']}\n\n{poem['input']}" for poem in asked],
        answer=[poem["label"] for poem in asked],
        prove=1,
    )

    for number, answer in enumerate(traces.answers, start=1):
        first = answer.ranked[0]
        effects = {row.place: row.effect for row in answer.rows if row.effect is not None}
        own = effects.pop(f"{ROOT}/data/sft/poems.jsonl:{number}")
        assert first.place == f"{ROOT}/data/sft/poems.jsonl:{number}"
        assert first.effect == own
        assert max(map(abs, effects.values())) < own / 10
    assert traces.facts["baseline"].endswith("the answers are exactly as likely as by the saved model")
    assert "poems.jsonl:6" in (poems / "why.html").read_text("utf-8")


def test_the_documents_of_a_step_have_its_loss_and_its_gradient(run):
    """With one event for each step and no dropout, the log of the run has the same numbers."""
    (*_, logged) = [entry for entry in read_lines(run / "metrics.jsonl")[0] if entry["step"] == 8][:1]

    assert main(["why", str(run), "--step", "8"]) == 0

    page = (run / "step-8.html").read_text("utf-8")
    content = json.loads(re.search(r'id="data">(.*?)</script>', page)[1].replace("\\u003c", "<"))
    documents = [document for _, _, documents in content["rows"] for document in documents]
    weights = {f"{run.parent}/rows.jsonl:{n}": 2 * len(word) + 1 for n, word in enumerate(WORDS, start=1)}
    places = [document["place"] for document in documents]
    total = sum(document["loss"] * weights[place] for document, place in zip(documents, places, strict=True))
    assert len(documents) == 4
    assert total / sum(weights[place] for place in places) == pytest.approx(logged["loss"], rel=1e-5)
    assert [one["loss"] for one in documents] == sorted((one["loss"] for one in documents), reverse=True)


def test_a_step_of_one_document_has_the_gradient_norm_that_the_run_logged(tmp_path, capsys):
    settings = {"per_device_train_batch_size": 1, "save_strategy": "no", "learning_rate": 1e-2}
    train(build_recipe(tmp_path, RECORDS, train={**settings, "max_steps": 5, "max_grad_norm": 1e9}))
    logged = next(
        entry["grad_norm"]
        for entry in read_lines(tmp_path / "run/metrics.jsonl")[0]
        if entry["step"] == 4 and "grad_norm" in entry
    )
    capsys.readouterr()

    main(["why", str(tmp_path / "run"), "--step", "4"])

    norm = float(re.search(r"jsonl:\d+: loss [\d.]+, gradient norm ([\d.]+)", capsys.readouterr().out)[1])
    assert norm == pytest.approx(logged, abs=6e-4)


def test_a_record_changes_nothing_before_its_first_use_and_the_weights_with_it(run):
    with replaying(str(run), load_recipe(run / "recipe.yaml")) as replays:
        inputs, start, end = replays.inputs_of(replays.last), replays.states[0], replays.last
        firsts = [first_use(inputs, record) for record in range(len(RECORDS))]
        record = firsts.index(3)

        def weights(step: int, left_out: list[int]) -> np.ndarray:
            trainer = replays.replay(start, step, end=end, left_out=left_out)
            return np.concatenate([part.detach().numpy().ravel() for part in trainer.model.parameters()])

        assert sorted(firsts) == [1, 1, 1, 1, 2, 2, 2, 2, 3]  # 4 rows in a step, and 1 in the third
        assert (weights(2, [record]) == weights(2, [])).all()
        assert (weights(3, [record]) != weights(3, [])).any()


def test_a_record_that_is_first_used_after_the_last_step_has_no_effect(run):
    with replaying(str(run), load_recipe(run / "recipe.yaml")) as replays:
        inputs = replays.inputs_of(replays.last)
        late = next(n for n in range(len(RECORDS)) if first_use(inputs, n) == 3)
        question = to_questions(load_run(str(run), attention=PACKED), ["say sun"], ["sunsun"])

        effects = prove(replays, question, [late], end=replays.state_at(2, where="--until"))

    assert effects.of[late].tolist() == [0.0]


def test_without_trains_again_from_the_checkpoint_before_and_the_ledger_says_so(tmp_path, capsys):
    recipe = recipe_of(tmp_path, save_steps=2)
    train(recipe)
    run, other = tmp_path / "run", tmp_path / "other"
    with replaying(str(run), recipe) as replays:
        inputs = replays.inputs_of(replays.last)
        line = next(n for n in range(1, 10) if first_use(inputs, n - 1) == 3)
        trainer = replays.replay(replays.states[0], 12, end=replays.last, left_out=[line - 1])
        expected = {name: part.detach().clone() for name, part in trainer.model.state_dict().items()}

    assert main(["why", str(run), "--without", f"rows.jsonl:{line}", "--output_dir", str(other)]) == 0

    rows = parquet.read_table(other / "ledger.parquet").to_pylist()
    left_out = [row["source"] for row in rows if row["fate"] == "left out"]
    assert left_out == [f"{tmp_path}/rows.jsonl:{line}"]
    assert json.loads((other / "run.json").read_bytes())["train"]["fates"] == {"used": 8, "left out": 1}
    assert "trains from checkpoint-2" in capsys.readouterr().out
    saved = load_file(other / "model.safetensors")
    assert all((saved[name] == expected[name]).all() for name in saved)
    assert load_recipe(other / "recipe.yaml").data.without == [f"{tmp_path}/rows.jsonl:{line}"]


def test_a_run_without_checkpoints_is_refused_with_the_command_that_makes_them(tmp_path, capsys):
    train(recipe_of(tmp_path, save_strategy="no"))

    assert main(["why", str(tmp_path / "run"), "--prompt", "say sun"]) == 2

    error = capsys.readouterr().err
    assert "needs 2 saved states to rank rows at; got 1" in error
    command = shlex.split(error.partition("fix: ")[2])
    assert main(command[1:]) == 0
    assert (
        main(["why", f"{tmp_path}/run-traced", "--prompt", "say sun", "--answer", "sunsun", "--prove", "0"])
        == 0
    )
    assert "1  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--prompt", "b", "--answer", "c"], "--answer: needs one answer for each prompt"),
        (["--prompt", "a", "--until", "13"], "--until: the run has no such step; got 13 of 12 steps"),
        (["--step", "13"], "--step: the run has no such step; got 13 of 12 steps"),
        (["--without", "rows.jsonl:77"], "--without: no training record has this place; got rows.jsonl:77"),
        ([], "one of the arguments --prompt --step --without is required"),
        (["--prompt", "a", "--step", "3"], "not allowed with argument"),
    ],
)
def test_options_that_make_no_sense_are_refused(run, capsys, words, message):
    assert main(["why", str(run), *words]) == 2

    assert message in capsys.readouterr().err


def test_a_recipe_is_not_a_run(capsys):
    assert main(["why", "sft/poems", "--prompt", "a"]) == 2

    assert "sft/poems: no such folder; fix: name the output folder of a run" in capsys.readouterr().err


def test_a_record_counts_as_its_nearest_row():
    scores = np.array([[0.1, 0.5, -0.3, 0.2]], np.float32)

    assert to_records(scores, np.array([0, 0, 2, 3]), count=4).tolist() == [
        [0.5, -np.inf, np.float32(-0.3), np.float32(0.2)]
    ]


def test_the_first_records_of_each_question_are_proved_and_others_drawn_from_the_rest():
    scores = np.full((2, 40), 0.1)
    scores[0, 7], scores[1, 9], scores[0, 3] = 0.9, 0.8, -np.inf
    scores[:, 5] = 0.99

    chosen, others = choose_records(scores, count=1, left_out=[5])

    assert chosen == [7, 9]
    assert len(others) == 1
    assert not {*others} & {3, 5, 7, 9}
