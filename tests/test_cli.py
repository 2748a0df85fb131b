"""The command line: the output and exit code of each command."""

import json
import os
import re
import subprocess
import sys
import time
from argparse import SUPPRESS
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import byte_tokenizer, save_folder, tiny_model, write_jsonl
from report_runs import write_run
from transformers import TrainingArguments

from hf_clm.cli import COMMANDS, main
from hf_clm.data.batch.collators import DataCollatorForPackedCausalLM
from hf_clm.data.label.datasets import SFTDataset
from hf_clm.data.read.formats import to_example
from hf_clm.errors import EnvironmentFault
from hf_clm.generation.decoding import SETTINGS
from hf_clm.model.attention import NAME, register
from hf_clm.options import Parser
from hf_clm.training.trainer import CLMTrainer

ROOT = Path(__file__).resolve().parents[1]
RECORDS = [
    {"instruct": "one", "input": "", "label": "first"},
    {"instruct": "two", "input": "x", "label": "second"},
    {"instruct": "three", "input": "", "label": "third answer"},
    {"instruct": "four", "input": "", "label": "四"},
]
RECIPE = """\
stage: sft
model: {name_or_path: model}
data:
  train: [{path: say.jsonl, format: instruct}]
  max_length: 64
doctor: {round_trip: "off"}
train: {output_dir: run, use_cpu: true, max_steps: 2, save_strategy: "no"}
"""


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> str:
    """The folder of a run with a model that has memorised four records."""
    folder, tokenizer, model = (
        tmp_path_factory.mktemp("learned"),
        byte_tokenizer(),
        tiny_model(hidden_size=64),
    )
    register()
    model.set_attn_implementation(NAME)
    rows = SFTDataset([to_example(record, format="instruct", where="here") for record in RECORDS], tokenizer)
    settings = {"use_cpu": True, "max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    settings |= {
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder), logging_strategy="no", **settings)
    CLMTrainer(model, arguments, data_collator=DataCollatorForPackedCausalLM(), train_dataset=rows).train()
    save_folder(folder, model, tokenizer)
    facts = {"status": "done", "format": "instruct", "stage": "sft", "max_length": 64}
    (folder / "run.json").write_text(json.dumps(facts))
    return str(folder)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with a recipe, its data and its model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    write_jsonl(tmp_path / "say.jsonl", RECORDS)
    save_folder(tmp_path / "model", tiny_model(), byte_tokenizer())
    return tmp_path


def failure(words: list[str], capsys) -> tuple[int, str]:
    """Returns the exit code and stderr, which must be one line without a traceback."""
    capsys.readouterr()
    code = main(words)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.startswith("error: "), shown
    return code, shown.removeprefix("error: ").rstrip("\n")


def generated(words: list[str], capsys) -> list[str]:
    capsys.readouterr()
    assert main(["generate", *words, "--device", "cpu"]) == 0
    return capsys.readouterr().out.splitlines()


# --- help and mistakes


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(words, capsys):
    assert main(words) == 0

    shown = capsys.readouterr().out
    for name in ("train", "config", "generate", "evaluate", "train-tokenizer"):
        assert f"hf-clm {name} " in shown


@pytest.mark.parametrize("name", ["train", "config"])
def test_help_of_a_recipe_command_lists_the_keys_of_a_recipe(name, capsys):
    assert main([name, "--help"]) == 0

    shown = capsys.readouterr().out
    assert "--data.max_length" in shown and "--model.name_or_path" in shown


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("generate", "--top_p"),
        ("chat", "--system"),
        ("serve", "--max_waiting"),
        ("evaluate", "--batch_size"),
        ("train-tokenizer", "--vocab_size"),
    ],
)
def test_help_of_another_command_lists_its_options(name, option, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])

    assert exit.value.code == 0
    assert option in capsys.readouterr().out


def test_help_explains_the_exit_codes(capsys):
    assert main(["--help"]) == 0

    codes = capsys.readouterr().out.partition("Exit codes:\n")[2].splitlines()
    assert [line.split()[0] for line in codes] == ["0", "2", "3", "4", "5", "6", "75", "130"]


def test_every_option_with_a_default_states_it(monkeypatch, capsys):
    parsers = []
    monkeypatch.setattr(Parser, "print_help", lambda self, *file: parsers.append(self))
    for name in COMMANDS:
        with suppress(SystemExit):
            main([name, "--help"])

    options = [(parser.prog, action) for parser in parsers for action in parser._actions]
    silent = [
        f"{prog}: {action.option_strings[-1]}"
        for prog, action in options
        if action.default not in (None, False, "", [], SUPPRESS) or action.dest in SETTINGS
        if action.dest != "stop" and not re.search(r"default|\([\d.]+\)$", action.help or "")
    ]
    assert len(parsers) >= 12
    assert silent == []


def test_these_are_all_the_commands():
    expected = "train prepare recipes config inspect doctor generate chat serve evaluate report checkpoints"
    assert " ".join(COMMANDS) == f"{expected} verify why compare merge export bench train-tokenizer"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["trian"],
            "no such command; got 'trian'; fix: one of train, prepare, recipes, config, inspect, doctor, ",
        ),
        (["trian"], "did you mean 'train'?"),
        (["train"], "hf-clm train: needs a recipe; fix: hf-clm train RECIPE, or hf-clm train --model MODEL"),
        (["train", "--learning_rate", "1"], "hf-clm train: needs a recipe"),
        (["train", "nope.yaml"], "nope.yaml"),
        (["train", "recipe.yaml", "--learning_rat", "1"], "unknown option --learning_rat"),
        (["train", "recipe.yaml", "--learning_rat", "1"], "did you mean 'learning_rate'?"),
        (
            ["config", "recipe.yaml", "--data.packin", "none"],
            "data.packin is not a key of a recipe; did you mean 'packing'?",
        ),
        (["prepare", "recipe.yaml", "--rays", "local"], "unknown option --rays; did you mean 'ray'?"),
        (["doctor", "recipe.yaml", "--no_measur"], "unknown option --no_measur; did you mean 'no_measure'?"),
        (["inspect", "recipe.yaml", "--wors"], "unknown option --wors; did you mean 'worst'?"),
        (["bench", "recipe.yaml", "--step", "9"], "unknown option --step; did you mean 'steps'?"),
        (
            ["doctor", "--plan", "gpus=8,memory=80GB", "--learning_rate", "1e-3"],
            "hf-clm doctor: overrides must follow the recipe; got --learning_rate; "
            "fix: hf-clm doctor RECIPE [--key value ...]",
        ),
        (
            ["doctor", "--plan", "gpus=8,memory=80GB", "--bf16=true"],
            "overrides must follow the recipe; got --bf16=true; fix: ",
        ),
        (
            ["inspect", "--row", "3", "recipe.yaml"],
            "overrides must follow the recipe; got --row; did you mean '--rows'?; fix: ",
        ),
        (["generate"], "hf-clm generate: the following arguments are required: run"),
        (
            ["generate", "run"],
            'hf-clm generate: needs a prompt; fix: add --prompt "..." or --file prompts.txt',
        ),
        (["generate", "run", "--promt", "x"], "did you mean '--prompt'?"),
        (["generate", "run", "--prom", "x"], "did you mean '--prompt'?"),
        (
            ["generate", "run", "--top_k", "many"],
            "hf-clm generate: argument --top_k: expected a valid integer, unable to parse",
        ),
        (["evaluate", "run", "x", "--format", "instrct"], "argument --format: invalid choice: 'instrct'"),
        (["evaluate", "run", "x", "--batch_size", "0"], "argument --batch_size: expected 1 or more, got 0"),
        (["chat"], "hf-clm chat: the following arguments are required: run"),
        (["serve", "run", "--port", "70000"], "argument --port: expected 0 to 65535, got 70000"),
        (["evaluate", "run"], "hf-clm evaluate: the following arguments are required: data"),
        (
            ["evaluate", "run", "x", "--stage", "sftt"],
            "hf-clm evaluate: argument --stage: invalid choice: 'sftt'",
        ),
        (
            ["train-tokenizer", "x.txt"],
            "hf-clm train-tokenizer: the following arguments are required: --output_dir",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(words, message, capsys, place):
    code, shown = failure(words, capsys)

    assert code == 2
    assert message in shown


def test_an_option_without_its_value_is_not_suggested(capsys):
    assert main(["doctor", "--plan"]) == 2

    assert capsys.readouterr().err == "error: hf-clm doctor: argument --plan: expected one argument\n"


def test_a_typo_in_a_recipe_names_its_line(capsys, place):
    (place / "recipe.yaml").write_text(RECIPE.replace("max_length", "max_lenght"))

    code, shown = failure(["train", "recipe.yaml"], capsys)

    assert code == 2
    assert shown.startswith("recipe.yaml:5: ")
    assert "max_length" in shown


def test_traceback_shows_where_an_error_occurred(capsys, place):
    assert main(["train", "nope.yaml", "--traceback"]) == 2

    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.splitlines()[-1].startswith("error: ")


def break_data(place: Path) -> None:
    (place / "say.jsonl").write_text('{"instruct": "a", "input": "", "label": 5}\n')


def break_model(place: Path) -> None:
    (place / "model" / "model.safetensors").write_bytes(b"")


def break_folder(place: Path) -> None:
    (place / "run").mkdir()
    (place / "run" / "mine.txt").touch()


@pytest.mark.parametrize(
    ("break_it", "options", "code", "message"),
    [
        (
            break_folder,
            [],
            2,
            "run: the output folder contains files, but no recipe.yaml of a run to resume",
        ),
        (break_data, [], 3, "say.jsonl:1: "),
        (break_model, [], 4, "model model: cannot be loaded: "),
        (None, ["--learning_rate", "1e30", "--max_steps", "5"], 5, "the loss or its gradient is not finite"),
        (None, ["--output_dir", "say.jsonl/run"], 6, "say.jsonl/run: cannot write to the output folder"),
        (None, ["--data.max_length", "4"], 3, "4 of 4 records cannot be trained on within data.max_length=4"),
    ],
)
def test_each_kind_of_fault_has_its_exit_code(break_it, options, code, message, capsys, place):
    if break_it:
        break_it(place)

    found, shown = failure(["train", "recipe.yaml", *options], capsys)

    assert found == code
    assert message in shown


def test_an_interrupted_command_ends_with_130(capsys, monkeypatch):
    def interrupt(words):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "config", interrupt)

    assert failure(["config"], capsys) == (130, "interrupted")


def test_a_full_disk_is_one_line(capsys, monkeypatch):
    def fill(words):
        raise OSError(28, "No space left on device", "run/model.safetensors")

    monkeypatch.setitem(COMMANDS, "config", fill)

    assert failure(["config"], capsys) == (6, "run/model.safetensors: No space left on device")


def test_other_processes_of_a_run_leave_the_message_to_the_first(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")

    assert main(["trian"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("is_own", "shown"), [(None, "error on rank 1: full\n"), (True, "error on rank 1: full\n"), (False, "")]
)
def test_a_fault_of_the_machine_is_reported_by_each_process_unless_another_reports_it(
    capsys, monkeypatch, is_own, shown
):
    def fail(words: list[str]) -> None:
        error = EnvironmentFault("full")
        error.is_own = is_own
        raise error

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setitem(COMMANDS, "train", fail)

    assert main(["train"]) == 6
    assert capsys.readouterr().err == shown


def fastest(words: list[str], cwd: Path) -> tuple[float, int]:
    """Returns the shortest of three wall times in seconds, and the exit code."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        settings = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "hf_clm", *words], cwd=cwd, env=settings, capture_output=True
        )
        times.append(time.perf_counter() - started)
    return min(times), done.returncode


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["trian"], 2),
        (["train", "--help"], 0),
        (["train", "recipe.yaml", "--learning_rat", "1"], 2),
    ],
)
def test_help_and_typos_answer_quickly(words, code, place):
    seconds, found = fastest(words, place)

    assert found == code
    assert seconds < 1.0  # 0.5 on a machine that does nothing else


# --- config and train-tokenizer


def test_config_prints_each_value_and_its_origin(capsys, place):
    assert main(["config", "recipe.yaml", "--learning_rate", "1e-4"]) == 0

    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["stage"] == ['"sft"', "recipe.yaml:1"]
    assert [part.strip() for part in rows["train.learning_rate"]] == ["0.0001", "command line"]
    assert rows["data.max_length"] == ["64", "recipe.yaml:5"]
    assert rows["data.strict"] == ["false", "default"]


def test_train_tokenizer_writes_a_folder_that_can_be_loaded(capsys, place):
    words = [
        "train-tokenizer",
        "say.jsonl",
        "--output_dir",
        "tok",
        "--vocab_size",
        "260",
        "--format",
        "instruct",
    ]
    assert main(words) == 0

    assert capsys.readouterr().out == "260 tokens from 4 records, written to tok\n"
    assert (place / "tok" / "tokenizer.json").is_file()


def test_train_tokenizer_has_an_option_for_the_kind(capsys, place, tmp_path):
    (tmp_path / "abc.txt").write_text("abba cab\n", encoding="utf-8")
    words = ["train-tokenizer", str(tmp_path / "abc.txt"), "--output_dir", "tok", "--kind", "characters"]
    assert main(words) == 0

    assert (
        capsys.readouterr().out == "8 tokens from 1 records, written to tok\n"
    )  # 3 of control, "\n", " ", abc


def test_train_writes_to_the_given_folder(capsys, place):
    assert main(["train", "recipe.yaml", "--data.train", "say.jsonl", "--output_dir", "elsewhere"]) == 0

    assert (place / "elsewhere" / "model.safetensors").is_file()
    assert not (place / "run").exists()


# --- generate


def test_one_prompt_prints_its_answer_alone(learned, capsys):
    assert generated([learned, "--prompt", "one"], capsys) == ["first"]


def test_the_input_of_an_instruction_is_an_option(learned, capsys):
    assert generated([learned, "--prompt", "two", "--input", "x"], capsys) == ["second"]


def test_several_prompts_are_shown_with_their_answers(learned, capsys):
    lines = generated([learned, "--prompt", "one", "--prompt", "four"], capsys)

    assert lines == ["> one", "first", "", "> four", "四", ""]


def test_json_is_one_object_per_prompt(learned, capsys):
    lines = generated([learned, "--prompt", "one", "--prompt", "four", "--json"], capsys)

    assert [json.loads(line) for line in lines] == [
        {"prompt": "one", "text": "first", "tokens": 5, "stopped": True},
        {"prompt": "four", "text": "四", "tokens": 3, "stopped": True},
    ]
    assert "四" in lines[1]


def test_prompts_are_the_lines_of_a_text_file(learned, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\nthree\n")

    lines = generated([learned, "--file", str(tmp_path / "prompts.txt")], capsys)

    assert lines == ["> one", "first", "", "> three", "third answer", ""]


def test_prompts_come_from_records_with_or_without_their_targets(learned, capsys, tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"instruct": "two", "input": "x"}, RECORDS[0]])

    lines = generated([learned, "--file", path, "--json"], capsys)

    assert [json.loads(line)["text"] for line in lines] == ["second", "first"]


def test_a_file_without_a_prompt_is_an_error(learned, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n\n")

    code, shown = failure(["generate", learned, "--file", str(tmp_path / "prompts.txt")], capsys)

    assert (code, shown) == (
        3,
        f"{tmp_path / 'prompts.txt'}: the file has no prompts; fix: add at least one prompt",
    )


def test_a_raw_prompt_is_continued_without_a_format(learned, capsys):
    assert generated([learned, "--raw", "--prompt", "one\nfir"], capsys) == ["st"]


def test_a_stop_text_ends_the_answer(learned, capsys):
    assert generated([learned, "--prompt", "three", "--stop", " ans"], capsys) == ["third"]


def test_max_new_tokens_cuts_the_answer(learned, capsys):
    lines = generated([learned, "--prompt", "three", "--max_new_tokens", "3", "--json"], capsys)

    assert json.loads(lines[0]) == {"prompt": "three", "text": "thi", "tokens": 3, "stopped": False}


@pytest.mark.parametrize(
    "options",
    [
        ["--num_beams", "3"],
        ["--temperature", "0.01"],
        ["--temperature", "5", "--top_k", "1"],
        ["--temperature", "5", "--top_p", "0.000001"],
        ["--no_repeat_ngram_size", "3"],
        ["--batch_size", "1"],
    ],
)
def test_a_memorised_answer_is_generated_in_every_mode(learned, capsys, options):
    assert generated([learned, "--prompt", "one", *options], capsys) == ["first"]


def test_sampling_repeats_with_the_seed(learned, capsys):
    words = [learned, "--prompt", "unknown", "--temperature", "3", "--max_new_tokens", "20", "--json"]

    answers = [generated([*words, "--seed", seed], capsys) for seed in ("1", "1", "2")]

    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_by_default_an_answer_may_fill_the_positions_of_the_model(capsys, tmp_path):
    folder = save_folder(tmp_path, tiny_model(max_position_embeddings=32), byte_tokenizer())

    lines = generated([folder, "--prompt", "x" * 30, "--json"], capsys)

    assert json.loads(lines[0])["tokens"] == 2


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(capsys, tmp_path):
    folder = save_folder(tmp_path, tiny_model(max_position_embeddings=32), byte_tokenizer())

    code, shown = failure(["generate", folder, "--prompt", "x" * 30, "--max_new_tokens", "3"], capsys)

    assert code == 2
    assert shown.startswith(
        "the model has 32 positions; got a prompt of 30 tokens and max_new_tokens 3; fix: "
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_beams", "0"], "argument --num_beams: expected greater than or equal to 1, got 0"),
        (["--top_p", "2"], "argument --top_p: expected less than or equal to 1, got 2"),
        (["--temperature", "nan"], "argument --temperature: expected a finite number, got nan"),
        (["--batch_size", "0"], "argument --batch_size: expected 1 or more, got 0"),
        (["--device", "gpu"], "--device: no such device; got 'gpu'"),
    ],
)
def test_values_out_of_range_are_one_line_errors(learned, capsys, options, message):
    code, shown = failure(["generate", learned, "--prompt", "one", *options], capsys)

    assert code == 2
    assert message in shown


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "none.txt",
            None,
            ": cannot be read; got No such file or directory; fix: give an existing file with --file",
        ),
        (
            "a.txt",
            "one\né\n".encode("latin-1"),
            ": not UTF-8; got byte 0xe9 at offset 4; fix: save it as UTF-8, or",
        ),
        (
            "b.txt",
            "one".encode("utf-16"),
            ": not UTF-8; got byte 0xff at offset 0; fix: save it as UTF-8, or",
        ),
        ("c.txt", b"\n \n", ": the file has no prompts; fix: add at least one prompt"),
        (
            "folder.txt",
            "folder",
            ": cannot be read; got Is a directory; fix: give an existing file with --file",
        ),
        ("none.jsonl", None, "none.jsonl"),
        ("d.jsonl", '{"instruct": "é"}\n'.encode("latin-1"), "d.jsonl:1"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_is_a_one_line_error(
    learned, capsys, tmp_path, name, content, message
):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)

    code, shown = failure(["generate", learned, "--file", str(path)], capsys)

    assert code == 3
    assert shown.startswith(f"{path}{message}" if message[0] == ":" else f"{tmp_path}/{message}")
    assert shown.count("\n") <= 1


def test_a_file_with_a_byte_order_mark_and_other_line_ends_is_read(learned, capsys, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\nthree\r\n")

    lines = generated([learned, "--file", str(path), "--json"], capsys)

    assert [json.loads(line)["prompt"] for line in lines] == ["one", "three"]


def test_a_temperature_of_0_is_greedy_with_other_options(learned, capsys):
    words = [learned, "--prompt", "unknown", "--max_new_tokens", "12", "--json"]

    greedy = generated(words, capsys)

    assert generated([*words, "--temperature", "0", "--top_k", "40", "--top_p", "0.9"], capsys) == greedy
    assert generated([*words, "--temperature", "3", "--top_k", "40"], capsys) != greedy


def test_an_empty_prompt_is_continued_from_the_start(learned, capsys):
    lines = generated([learned, "--raw", "--prompt", "", "--max_new_tokens", "2", "--json"], capsys)

    assert (json.loads(lines[0])["prompt"], json.loads(lines[0])["tokens"]) == ("", 2)


def test_a_folder_without_a_run_is_read_as_text(capsys, tmp_path):
    folder = save_folder(tmp_path, tiny_model(), byte_tokenizer())

    lines = generated([folder, "--prompt", "a", "--max_new_tokens", "2", "--json"], capsys)

    assert json.loads(lines[0])["prompt"] == "a"


# --- evaluate


def evaluated(words: list[str], capsys) -> dict[str, float]:
    capsys.readouterr()
    assert main(["evaluate", *words, "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model_that_learned_its_data_answers_all_of_it(learned, capsys, tmp_path):
    found = evaluated([learned, write_jsonl(tmp_path / "say.jsonl", RECORDS)], capsys)

    assert list(found) == [
        *(
            "examples",
            "dropped",
            "rows",
            "target_tokens",
            "loss",
            "perplexity",
            "bits_per_byte",
            "token_accuracy",
        ),
        *("loss_first", "loss_content", "loss_stop"),
        *("asked", "exact_match", "stopped"),
    ]
    assert (found["examples"], found["dropped"], found["rows"]) == (4, 0, 4)
    assert found["target_tokens"] == 30  # first, second, third answer, 四: 5 + 6 + 12 + 3 bytes, and 4 ends
    assert (found["token_accuracy"], found["exact_match"], found["stopped"]) == (1.0, 1.0, 1.0)
    assert 0 < found["loss"] < 0.1


def test_answers_that_differ_are_counted(learned, capsys, tmp_path):
    records = [*RECORDS[:3], {"instruct": "four", "input": "", "label": "五"}]

    found = evaluated([learned, write_jsonl(tmp_path / "say.jsonl", records)], capsys)

    assert (found["asked"], found["exact_match"], found["stopped"]) == (4, 0.75, 1.0)


def test_the_batch_size_does_not_change_the_results(learned, capsys, tmp_path):
    path = write_jsonl(tmp_path / "say.jsonl", RECORDS)

    figures = [evaluated([learned, path, "--batch_size", size], capsys) for size in ("1", "3", "8")]

    # a loss near 0 is a difference of float32 numbers near 10
    assert figures[1] == pytest.approx(figures[0], rel=1e-6, abs=1e-7)
    assert figures[2] == pytest.approx(figures[0], rel=1e-6, abs=1e-7)


def test_stage_pretrain_evaluates_the_complete_text_without_answers(learned, capsys, tmp_path):
    found = evaluated([learned, write_jsonl(tmp_path / "say.jsonl", RECORDS), "--stage", "pretrain"], capsys)

    # 4 + 6 + 6 + 5 bytes of prompts, 26 of answers, 4 ends; less the 4 first bytes, which follow nothing
    assert found["target_tokens"] == 42
    assert "exact_match" not in found


def test_generation_can_be_turned_off(learned, capsys, tmp_path):
    found = evaluated([learned, write_jsonl(tmp_path / "say.jsonl", RECORDS), "--no_generate"], capsys)

    assert "exact_match" not in found


def test_without_json_each_figure_is_a_line(learned, capsys, tmp_path):
    capsys.readouterr()

    assert main(["evaluate", learned, write_jsonl(tmp_path / "say.jsonl", RECORDS), "--no_generate"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["examples", "4"]
    assert lines[3].split() == ["target_tokens", "30"]
    assert lines[7].split() == ["token_accuracy", "1.0000"]


def test_rows_that_do_not_fit_are_counted(learned, capsys, tmp_path):
    path = write_jsonl(tmp_path / "say.jsonl", RECORDS)

    found = evaluated([learned, path, "--max_length", "8", "--no_generate"], capsys)

    assert (found["dropped"], found["rows"]) == (1, 3)  # "third answer" and its end need 13


def test_data_without_a_target_that_fits_are_an_error(learned, capsys, tmp_path):
    path = write_jsonl(tmp_path / "say.jsonl", RECORDS)

    code, shown = failure(["evaluate", learned, path, "--max_length", "2"], capsys)

    assert (code, shown) == (
        3,
        f"{path}: no example has a target that fits into a row; fix: raise --max_length",
    )


def test_the_tests_leave_torch_as_they_found_it():
    assert torch.is_grad_enabled()


# --- report, compare


def test_the_report_of_a_killed_run_can_be_written_again(tmp_path, capsys):
    folder = write_run(tmp_path / "run", facts={"status": "running"})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')

    assert main(["report", str(folder)]) == 0

    assert capsys.readouterr().out.splitlines() == [
        f"wrote {folder / 'report.html'}: 42 log events, 14 samples, status running",
        "skipped unreadable lines of its logs: 1",
    ]
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in text


def test_runs_are_compared_in_the_terminal_and_on_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(tmp_path / name, facts={"evaluated": {"eval_loss": [6.5, {"a": 1.25, "b": 1.5}[name]]}})

    assert main(["compare", "a", "b"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert "Evaluation loss      6.5000 -> 1.2500  6.5000 -> 1.5000" in lines
    assert lines[-1] == "wrote compare.html"
    assert (tmp_path / "compare.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["report", "."],
            ".: contains no run.json, so it is not the folder of a run; fix: name the output folder of a run",
        ),
        (["report", "nowhere"], "nowhere: no such folder; fix: name the output folder of a run"),
        (["compare", "a"], "hf-clm compare: needs at least two runs; fix: hf-clm compare RUN RUN [RUN ...]"),
        (["compare", "nowhere", "."], "nowhere: no such folder; fix: name the output folder of a run"),
    ],
)
def test_a_folder_without_a_run_is_a_one_line_error(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_report_needs_neither_torch_nor_data(tmp_path):
    folder = write_run(tmp_path / "run")
    code = (
        f"import sys; from hf_clm.cli import main; main(['report', {str(folder)!r}]); "
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"
