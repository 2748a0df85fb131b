import time

import pytest
from pydantic import ValidationError

from hf_clm.errors import ExitCode, RecipeError
from hf_clm.recipe.recipe import (
    TRAIN_DEFAULTS,
    Recipe,
    describe_recipe,
    load_recipe,
    recipe_help,
    recipe_to_yaml,
    resume_rule,
    training_values,
)
from hf_clm.recipe.sections import (
    Data,
    EarlyStopping,
    Model,
    Samples,
    Source,
    Tokenizer,
    TokenizerTraining,
    Window,
)
from hf_clm.recipe.trainer_fields import train_fields

BASE = """\
stage: sft
model:
  name_or_path: gpt2
data:
  train: poems.jsonl
train:
  output_dir: runs/x
"""
TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text=BASE, *words):
    with open("r.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    return load_recipe("r.yaml", words)


def error_of(text=BASE, *words):
    with pytest.raises(RecipeError) as caught:
        load(text, *words)
    assert caught.value.exit_code == ExitCode.RECIPE
    return str(caught.value)


# --- the meaning of a recipe


def test_a_minimal_recipe_has_the_documented_defaults():
    recipe = load()

    assert recipe.data.train == [Source(path="poems.jsonl")]
    assert recipe.data.train[0].model_dump() == {
        "path": "poems.jsonl",
        "format": None,
        "overflow": None,
        "limit": None,
        "fields": {},
        "template": None,
        "weight": None,
        "epochs": None,
        "quoting": "auto",
        "split": "train",
        "name": None,
        "revision": None,
        "set": None,
    }
    assert (recipe.model.init, recipe.model.dtype, recipe.model.attention) == (
        "pretrained",
        "float32",
        "packed",
    )
    assert recipe.tokenizer.pad_token == "<|pad|>"
    assert (recipe.data.max_length, recipe.data.max_dropped, recipe.data.max_line_bytes) == (
        1024,
        0.01,
        8388608,
    )
    assert (recipe.samples, recipe.early_stopping, recipe.overwrite) == (None, None, False)
    assert recipe.train == {"output_dir": "runs/x"}


@pytest.mark.parametrize(
    ("stage", "overflow", "packing"), [("sft", "keep_target", "best_fit"), ("pretrain", "split", "stream")]
)
def test_overflow_and_packing_depend_on_the_stage_unless_set(stage, overflow, packing):
    recipe = load(BASE, "--stage", stage)
    given = load(BASE, "--stage", stage, "--data.overflow", "drop", "--data.packing", "none")

    assert (recipe.resolved_overflow, recipe.resolved_packing) == (overflow, packing)
    assert (given.resolved_overflow, given.resolved_packing) == ("drop", "none")


@pytest.mark.parametrize(
    ("train", "paths"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("{path: a.jsonl}", ["a.jsonl"]),
        ("[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("[{path: a.jsonl}, b.jsonl]", ["a.jsonl", "b.jsonl"]),
    ],
)
def test_training_data_is_a_path_a_mapping_or_a_list_of_them(train, paths):
    recipe = load(BASE.replace("poems.jsonl", train))

    assert [source.path for source in recipe.data.train] == paths


def test_yaml_is_read_as_version_1_2():
    recipe = load(BASE + "  learning_rate: 1e-4\n  eval_strategy: no\n  max_steps: 1_000\n  seed: 010\n")

    assert recipe.train == {
        "output_dir": "runs/x",
        "learning_rate": 0.0001,
        "eval_strategy": "no",
        "max_steps": 1000,
        "seed": 10,
    }


def test_whole_numbers_are_accepted_for_floats():
    recipe = load(BASE + "  learning_rate: 1\n", "--data.eval_fraction", "0")

    assert (recipe.train["learning_rate"], recipe.data.eval_fraction) == (1.0, 0.0)


def test_a_byte_order_mark_is_ignored():
    assert load("\ufeff" + BASE).stage == "sft"


def test_a_recipe_cannot_be_changed():
    recipe, name = load(), "stage"

    with pytest.raises(ValidationError, match="frozen"):
        setattr(recipe, name, "pretrain")


def test_training_values_are_our_defaults_with_the_given_values():
    values = training_values(load(BASE, "--logging_steps", "3"))

    assert (values["output_dir"], values["logging_steps"]) == ("runs/x", 3)
    assert (values["logging_nan_inf_filter"], values["remove_unused_columns"]) == (False, False)
    assert set(TRAIN_DEFAULTS) <= set(train_fields())


def test_with_a_token_budget_a_batch_is_one_row_by_default():
    budget = ["--data.packing=none", "--data.tokens_per_batch=2048"]

    for words in (budget, [*budget, "--per_device_train_batch_size=1"]):
        recipe = load(BASE, *words)
        values = training_values(recipe)
        rows = {key: (value, origin) for key, value, origin in describe_recipe(recipe)}
        assert values["per_device_train_batch_size"] == values["per_device_eval_batch_size"] == 1
        assert rows["train.per_device_eval_batch_size"] == (1, "hf_clm default")
    assert "per_device_train_batch_size" not in training_values(load())
    assert "per_device_train_batch_size" not in training_values(load(BASE, "--data.tokens_per_batch=2048"))
    assert (
        training_values(load(BASE, *budget, "--per_device_eval_batch_size=4"))["per_device_eval_batch_size"]
        == 4
    )


def test_a_model_from_scratch_and_every_section_can_be_given():
    recipe = load("""\
stage: pretrain
model: {init: scratch, config: {model_type: gpt2, n_layer: 2}}
tokenizer: {train: {vocab_size: 512}, chat_template: chatml}
data:
  train: [{path: a.jsonl, format: text, fields: {text: body}}]
  eval: b.jsonl
  max_length: 64
  packing: none
  window: {size: 32, step: 16}
samples: {prompts: [Once, upon], every_steps: 5}
early_stopping: {patience: 2, threshold: 0.1}
train: {output_dir: x, load_best_model_at_end: true, eval_strategy: epoch, save_strategy: epoch}
overwrite: true
""")

    assert recipe.model.config == {"model_type": "gpt2", "n_layer": 2}
    assert recipe.tokenizer.train and recipe.tokenizer.train.vocab_size == 512
    assert recipe.data.train == [Source(path="a.jsonl", format="text", fields={"text": "body"})]
    assert recipe.data.window and (recipe.data.window.size, recipe.data.window.step) == (32, 16)
    assert recipe.samples and recipe.samples.prompts == ["Once", "upon"]
    assert recipe.early_stopping and recipe.early_stopping.patience == 2


# --- the file itself


def test_a_missing_recipe_is_named():
    with pytest.raises(
        RecipeError, match=r"^nope\.yaml: no such recipe; fix: hf-clm recipes lists the shipped ones$"
    ):
        load_recipe("nope.yaml")


def test_a_folder_without_a_recipe_is_not_a_run(tmp_path):
    message = ": no recipe.yaml in this folder: it is not the folder of a run; fix: name a recipe or a run$"
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path)


def test_a_recipe_that_is_not_utf_8_names_the_line(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("stage: sft\n# caf\xe9\n".encode("latin-1"))

    with pytest.raises(RecipeError, match=r"^latin\.yaml:2: not UTF-8 text; fix: save it as UTF-8$"):
        load_recipe("latin.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: the recipe is empty"),
        ("# only a comment\n", "r.yaml: the recipe is empty"),
        ("- a\n- b\n", "r.yaml: expected a mapping such as stage: sft; got list"),
        ("sft\n", "r.yaml: expected a mapping such as stage: sft; got str"),
        (
            BASE + "  learning_rate: 1\n  learning_rate: 2\n",
            "r.yaml:9: the key 'learning_rate' is given twice",
        ),
        (BASE + "train: {}\n", "r.yaml:8: the key 'train' is given twice"),
        ("stage: sft\nmodel: {name_or_path: x\n", "r.yaml:3: not valid YAML: "),
        ("stage: sft\ntrain:\n\t- x\n", "r.yaml:3: not valid YAML: "),
        ("stage: sft\nmodel: !!python/name:os.system x\n", "r.yaml:2: not valid YAML: "),
        ("stage: sft\nmodel: \x01\n", "r.yaml:2: not valid YAML: a control character"),
        (
            "stage: &a [*a]\n",
            "r.yaml: not a recipe: with its aliases it has more than 50,000 values, or contains itself",
        ),
        ("stage: &a {<<: *a}\n", "r.yaml: not a recipe: with its aliases it has more than 50,000 values"),
        ("a: " + "[" * 5000, "r.yaml: not a recipe: its mappings and lists are nested too deeply"),
        ("- " * 5000, "r.yaml: not a recipe: its mappings and lists are nested too deeply"),
        ("# " + "x" * 300_000, "r.yaml: not a recipe: it has more than 262,144 bytes"),
        ("? [a, b]\n: c\n", "r.yaml: stage is missing"),
        (BASE + "1: 2\n", "r.yaml:8: 1: Keys should be strings"),
        (BASE + "  run_name: !!binary aGk=\n", "r.yaml:8: train.run_name: expected text; got b'hi'"),
        (BASE + "  run_name: 2020-01-01\n", "r.yaml:8: train.run_name: expected text; got datetime.date"),
        (BASE + '  run_name: "a\\0b"\n', "r.yaml:8: train.run_name: text must not contain NUL characters"),
        (BASE + '  run_name: "\\ud800"\n', "r.yaml:8: train.run_name: text must not contain NUL characters"),
        (
            BASE + "  max_steps: " + "9" * 5000,
            "r.yaml: not valid YAML: Exceeds the limit (4300 digits)",
        ),
    ],
)
def test_an_invalid_file_is_refused_with_the_line(text, message):
    assert error_of(text).startswith(message)


def exploding(first, line):
    """Returns twelve lines that each name the previous line ten times."""
    return first + "".join(f"a{n}: &a{n} " + line.format(*[f"*a{n - 1}"] * 10) for n in range(1, 13))


@pytest.mark.parametrize(
    "text",
    [
        exploding("a0: &a0 [x, x]\n", "[{}, {}, {}, {}, {}, {}, {}, {}, {}, {}]\n"),
        exploding("a0: &a0 {x: y}\n", "{{a: {}, b: {}, c: {}, d: {}, e: {}, f: {}, g: {}, h: {}}}\n"),
        exploding("a0: &a0 {x: y}\n", "{{<<: [{}, {}, {}, {}, {}, {}, {}, {}, {}, {}]}}\n"),
    ],
)
def test_aliases_that_expand_to_billions_of_values_are_refused_quickly(text):
    start = time.process_time()

    assert "not a recipe: with its aliases it has more than 50,000 values" in error_of(text)
    assert "command line: --model.config: not a recipe" in error_of(BASE, "--model.config", text)
    assert time.process_time() - start < 2


def test_aliases_work_as_in_any_yaml():
    text = BASE.replace("poems.jsonl", "&data poems.jsonl\n  eval: *data")

    assert load(text).data.eval == [Source(path="poems.jsonl")]


@pytest.mark.filterwarnings("error")
def test_the_later_of_two_anchors_with_the_same_name_applies():
    text = BASE.replace("poems.jsonl", "&data a.jsonl\n  cache_dir: &data b.jsonl\n  eval: *data")

    assert load(text).data.eval == [Source(path="b.jsonl")]


def test_an_endless_file_is_refused():
    with pytest.raises(RecipeError, match="not a recipe: it has more than"):
        load_recipe("/dev/zero")


# --- keys and values in the file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "stage: sft",
            "stage: sfft",
            "r.yaml:1: stage: expected one of pretrain, sft; got 'sfft'; did you mean 'sft'?",
        ),
        ("stage: sft\n", "", "r.yaml: stage is missing"),
        ("  train: poems.jsonl\n", "  max_length: 5\n", "r.yaml:4: data.train is missing"),
        (
            "poems.jsonl",
            "[]",
            "r.yaml:5: data.train: List should have at least 1 item after validation, not 0; got []",
        ),
        ("poems.jsonl", "5", "r.yaml:5: data.train.0: expected a mapping; got 5"),
        ("poems.jsonl", "[{path: a}, {path: 5}]", "r.yaml:5: data.train.1.path: expected text; got 5"),
        (
            "poems.jsonl",
            "{path: a, format: alpacca}",
            "r.yaml:5: data.train.0.format: expected one of text, prompt_completion, instruct, alpaca,"
            " messages, sharegpt, segments, tokenized, or module:function; got 'alpacca'; did you mean"
            " 'alpaca'?",
        ),
        (
            "  name_or_path: gpt2",
            "  name: gpt2",
            "r.yaml:3: model.name is not a key of a recipe; did you mean 'name_or_path'?",
        ),
        (
            "gpt2",
            "gpt2\n  torch_dtype: x",
            "r.yaml:4: model.torch_dtype is a name of transformers 4; fix: use model.dtype",
        ),
        ("stage", "lr: 1\nstage", "r.yaml:1: lr is a name of other trainers; fix: use train.learning_rate"),
        (
            "stage",
            "learning_rate: 1\nstage",
            "r.yaml:1: learning_rate is not a key of a recipe; did you mean 'train.learning_rate'?",
        ),
        (
            "gpt2",
            "gpt2\n  init: Scratch",
            "r.yaml:4: model.init: expected one of pretrained, scratch; got 'Scratch'; did",
        ),
        (
            "gpt2",
            "gpt2\n  allow_bin: 'true'",
            "r.yaml:4: model.allow_bin: expected true or false; got 'true'; fix: remove",
        ),
        ("gpt2", "gpt2\n  allow_bin: 1", "r.yaml:4: model.allow_bin: expected true or false; got 1"),
        ("gpt2", "gpt2\n  config: 5", "r.yaml:4: model.config: expected a mapping; got 5"),
        ("gpt2", "5", "r.yaml:3: model.name_or_path: expected text; got 5"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_line(old, new, message):
    assert error_of(BASE.replace(old, new, 1)).startswith(message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_length: 1", "data.max_length: expected a number greater than or equal to 2; got 1"),
        ("max_length: four", "data.max_length: expected a whole number; got 'four'"),
        ("max_length: 5.0", "data.max_length: expected a whole number; got 5.0"),
        ("max_length: true", "data.max_length: expected a whole number; got true"),
        ("max_length: [5]", "data.max_length: expected a whole number; got [5]"),
        ("max_length: null", "data.max_length: expected a whole number; got null"),
        ("max_length: '64'", "data.max_length: expected a whole number; got '64'; fix: remove the quotes"),
        ("max_dropped: .nan", "data.max_dropped: expected a finite number; got nan"),
        ("max_dropped: 2", "data.max_dropped: expected a number less than or equal to 1; got 2"),
        ("eval_fraction: 1", "data.eval_fraction: expected a number less than 1; got 1"),
        (
            "packing: bestfit",
            "data.packing: expected one of none, best_fit, stream; got 'bestfit'; did you mean 'best_fit'?",
        ),
        ("paking: none", "data.paking is not a key of a recipe; did you mean 'packing'?"),
        (
            "packing: stream",
            "data.packing: stream cuts rows, which would separate targets from their prompts; fix: set it",
        ),
        ("window: {size: 8, step: 4}", "data.window needs stage: pretrain; got sft"),
        ("window: {size: 8}", "data.window.step is missing"),
    ],
)
def test_a_wrong_line_in_the_data_section_is_named(line, message):
    text = BASE.replace("  train: poems.jsonl\n", f"  train: poems.jsonl\n  {line}\n")

    assert error_of(text).startswith(f"r.yaml:6: {message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "learnin_rate: 1",
            "train.learnin_rate is not a field of transformers.TrainingArguments;"
            " did you mean 'learning_rate'?",
        ),
        ("warmup_ratio: 0.1", "train.warmup_ratio is a name of transformers 4; fix: use warmup_steps"),
        ("learning_rate: four", "train.learning_rate: expected a number; got 'four'"),
        (
            "learning_rate: '2e-5'",
            "train.learning_rate: expected a number; got '2e-5'; fix: remove the quotes",
        ),
        ("learning_rate: -.inf", "train.learning_rate: expected a finite number; got -inf"),
        ("bf16: 'true '", "train.bf16: expected true or false; got 'true '; fix: remove the quotes"),
        (
            "max_steps: 0",
            "train.max_steps: expected a number above 0, or -1 to use num_train_epochs; got 0",
        ),
        (
            "num_train_epochs: -1",
            "train.num_train_epochs: expected a number above 0 if max_steps is not set; got -1",
        ),
        ("optim: adamw", "train.optim: expected one of adamw_torch, "),
        (
            "eval_strategy: epoch",
            "train.eval_strategy is epoch, but there is no eval set; fix: set data.eval or",
        ),
        (
            "load_best_model_at_end: true",
            "train.load_best_model_at_end needs train.eval_strategy: steps or epoch; got no",
        ),
        (
            "hub_token: abc",
            "train.hub_token: secrets do not belong in a recipe; fix: remove it and use the environment",
        ),
        ("wandb_key: abc", "train.wandb_key: secrets do not belong in a recipe; fix: "),
        ("api_key: abc", "train.api_key: secrets do not belong in a recipe; fix: "),
        (f"run_name: {TOKEN}", "train.run_name: secrets do not belong in a recipe; fix: "),
    ],
)
def test_a_wrong_line_in_the_train_section_is_named(line, message):
    assert error_of(f"{BASE}  {line}\n").startswith(f"r.yaml:8: {message}")


def test_a_secret_is_found_in_every_section_and_never_shown():
    message = error_of(BASE.replace("poems.jsonl", f"\n    - path: a.jsonl\n      revision: {TOKEN}"))

    assert message.startswith("r.yaml:7: data.train.0.revision: secrets")
    assert TOKEN not in message


def test_a_name_that_starts_like_a_token_is_not_a_secret():
    assert load(BASE.replace("gpt2", "hf_models/tiny")).model.name_or_path == "hf_models/tiny"


def test_the_first_of_several_problems_is_shown_and_the_others_are_counted():
    text = (
        BASE.replace("poems.jsonl", "poems.jsonl\n  max_length: 1\n  strict: x")
        + "  max_steps: 0\n  optim: x\n"
    )

    message = error_of(text)

    assert (
        message
        == "r.yaml:6: data.max_length: expected a number greater than or equal to 2; got 1 (and 3 more)"
    )


def test_a_key_from_a_yaml_merge_has_the_line_where_it_is_written():
    assert error_of(
        BASE.replace(
            "train:\n  out", "early_stopping: null\nsamples: null\ntrain:\n  <<: {max_steps: 0}\n  out"
        )
    ).startswith("r.yaml:9: train.max_steps: ")


# --- combinations of keys


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model.name_or_path", "null"],
            "model.name_or_path is missing; fix: name a model, or set model.init to scratch",
        ),
        (
            ["--model", "{init: scratch, config: {model_type: gpt2}}"],
            "model.init: a new model needs tokenizer.name_or_path or tokenizer.train",
        ),
        (
            ["--tokenizer.train.vocab_size", "300"],
            "tokenizer.train needs model.init: scratch; got pretrained",
        ),
        (
            ["--tokenizer.train.vocab_size", "259"],
            "tokenizer.train.vocab_size: expected a number greater than",
        ),
        (
            ["--model.init=scratch", "--tokenizer.name_or_path=x", "--tokenizer.train={}"],
            "tokenizer.train needs tokenizer.name_or_path: null; got x",
        ),
        (
            ["--model.init=scratch", "--tokenizer.train={kind: characters, vocab_size: 300}"],
            "tokenizer.train.vocab_size needs tokenizer.train.kind: bpe or unigram; got characters",
        ),
        (
            ["--model.init=scratch", "--tokenizer.train={kind: unigram, min_frequency: 3}"],
            "tokenizer.train.min_frequency needs tokenizer.train.kind: bpe; got unigram",
        ),
        (
            ["--model.init=scratch", "--tokenizer.train.kind", "character"],
            "tokenizer.train.kind: expected one of bpe, unigram, characters; got 'character'; did you mean",
        ),
        (
            ["--model.trust_remote_code"],
            "model.trust_remote_code runs code from the Hub; fix: set model.revision",
        ),
        (
            ["--model.trust_remote_code", "--model.revision=main"],
            "model.trust_remote_code runs code from the Hub",
        ),
        (
            ["--tokenizer.chat_template", "chatmll"],
            "tokenizer.chat_template: expected one of chatml, plain, or a .jinja file; got 'chatmll';"
            " did you mean 'chatml'?",
        ),
        (
            ["--data.eval=x", "--data.eval_fraction=0.1"],
            "data.eval_fraction and data.eval exclude each other",
        ),
        (
            ["--stage=pretrain", "--data.window={size: 8, step: 4}"],
            "data.window needs data.packing: none; got stream",
        ),
        (
            ["--stage=pretrain", "--data.overflow=drop"],
            "data.overflow needs data.packing: none or best_fit; got stream",
        ),
        (
            ["--stage=pretrain", "--data.train_on=last_turn"],
            "data.train_on needs stage: sft; got pretrain",
        ),
        (
            ["--use_liger_kernel"],
            "train.use_liger_kernel has no effect: it returns no logits, which the token accuracy needs; "
            "fix: remove it",
        ),
        (
            ["--neftune_noise_alpha=5"],
            "train.neftune_noise_alpha depends on the length of a row, but packed rows contain many texts; "
            "fix: set data.packing to none and model.attention to sdpa, or remove it",
        ),
        (
            ["--stage=pretrain", "--data.packing=none", "--data.window={size: 8, step: 9}"],
            "data.window: expected step <= size <= data.max_length; got 9, 8, 1024",
        ),
        (
            [
                *("--stage=pretrain", "--data.packing=none"),
                *("--data.window={size: 80, step: 9}", "--data.max_length=64"),
            ],
            "data.window: expected step <= size <= data.max_length; got 9, 80, 64",
        ),
        (
            ["--data.packing=none", "--data.tokens_per_batch=2048", "--model.attention=sdpa"],
            "data.tokens_per_batch needs model.attention: packed; got sdpa",
        ),
        (
            ["--data.packing=none", "--data.tokens_per_batch=512"],
            "data.tokens_per_batch is below data.max_length, so an example may not fit; got 512, 1024",
        ),
        (
            ["--data.packing=none", "--data.tokens_per_batch=2048", "--per_device_train_batch_size=4"],
            "train.per_device_train_batch_size must be 1 with data.tokens_per_batch, which is the size of "
            "a micro-batch; got 4; fix: remove it",
        ),
        (["--early_stopping={}"], "early_stopping needs train.load_best_model_at_end: true; got false"),
        (["--output_dir="], "train.output_dir is missing; fix: --output_dir runs/NAME"),
        (["--model.config.n_layer=2"], "model.config needs model.init: scratch; got pretrained"),
        (["--model.embedding_std=1"], "model.embedding_std needs model.init: scratch; got pretrained"),
        (
            [
                "--model={name_or_path: gpt2, init: scratch, config: {model_type: gpt2}}",
                "--tokenizer.train={}",
            ],
            "model.name_or_path has no effect: model.config and tokenizer determine the model; got 'gpt2'",
        ),
        (["--model.name_or_path=.", "--model.revision=main"], "model.revision has no effect without a model"),
        (
            ["--model.init=scratch", "--model.allow_bin"],
            "model.allow_bin needs model.init: pretrained; got scratch",
        ),
        (["--bf16", "--fp16"], "train.fp16 needs train.bf16: false; got true"),
        (["--bf16_full_eval", "--fp16_full_eval"], "train.fp16_full_eval needs train.bf16_full_eval: false"),
        (
            ["--dataloader_prefetch_factor=2"],
            "train.dataloader_prefetch_factor needs train.dataloader_num_workers of 1 or more; got 0",
        ),
        (
            ["--dataloader_persistent_workers"],
            "train.dataloader_persistent_workers needs train.dataloader",
        ),
        (["--dataloader_in_order=false"], "train.dataloader_in_order needs train.dataloader_num_workers"),
        (
            ["--activation_checkpointing_kwargs={use_reentrant: false}"],
            "train.activation_checkpointing_kwargs needs train.activation_checkpointing: true; got null",
        ),
        (
            ["--do_eval"],
            "train.do_eval has no effect: hf-clm train always trains, and evaluates according to",
        ),
        (["--data.shuffle_buffer=5"], "data.shuffle_buffer needs data.streaming: true; got false"),
        (
            ["--data.train=[{path: r.yaml, split: test}]"],
            "data.train.0.split has no effect on a single file; fix: remove it",
        ),
        (
            ["--data.train=[{path: r.yaml, name: en}]"],
            "data.train.0.name has no effect on local files, only on datasets",
        ),
        (["--data.train=[{path: ., revision: v1}]"], "data.train.0.revision has no effect on local files"),
        (
            ["--train_sampling_strategy=group_by_length"],
            "train.train_sampling_strategy: group_by_length has no effect on packed rows, which all",
        ),
        (
            ["--metric_for_best_model=accuracy"],
            "train.metric_for_best_model: expected one of eval_loss, eval_token_accuracy, eval_target_tokens;"
            " got 'accuracy'",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(words, message):
    assert error_of(BASE, *words).startswith(f"command line: {message}")


def test_output_dir_may_come_from_the_command_line_alone():
    text = BASE.replace("train:\n  output_dir: runs/x\n", "")

    assert error_of(text) == "r.yaml: train.output_dir is missing; fix: --output_dir runs/NAME"
    assert load(text, "--output_dir", "runs/y").train == {"output_dir": "runs/y"}


@pytest.mark.parametrize("name", ["0123456789abcdef0123456789abcdef01234567", None])
def test_remote_code_runs_from_a_pinned_commit_or_a_local_folder(name, tmp_path):
    words = ["--model.revision", name] if name else ["--model.name_or_path", str(tmp_path)]

    assert load(BASE, "--model.trust_remote_code", *words).model.trust_remote_code is True


def test_a_model_from_scratch_may_use_the_tokenizer_of_its_name():
    assert load(BASE, "--model.init", "scratch").model.init == "scratch"


# --- the command line


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--learning_rate", "1e-4"], "learning_rate", 0.0001),
        (["--learning_rate=1e-4"], "learning_rate", 0.0001),
        (["--train.learning_rate", "1e-4"], "learning_rate", 0.0001),
        (["--learning_rate", "1", "--learning_rate", "2"], "learning_rate", 2.0),
        (["--bf16"], "bf16", True),
        (["--bf16", "--max_steps", "3"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--output_dir", "123"], "output_dir", "123"),
        (["--output_dir", "a: [b"], "output_dir", "a: [b"),
        (["--run_name", "x=y # z"], "run_name", "x=y # z"),
        (["--run_name=--x"], "run_name", "--x"),
        (["--run_name", "null"], "run_name", None),
        (["--eval_strategy", "no"], "eval_strategy", "no"),
        (["--eval_steps", "null"], "eval_steps", None),
        (["--report_to", "[none]"], "report_to", ["none"]),
        (["--fsdp"], "fsdp", True),
        (["--fsdp", "false"], "fsdp", False),
        (["--lr_scheduler_kwargs", "{min_lr: 1e-6}"], "lr_scheduler_kwargs", {"min_lr": 0.000001}),
        (["--train.lr_scheduler_kwargs.min_lr", "1e-6"], "lr_scheduler_kwargs", {"min_lr": 0.000001}),
    ],
)
def test_a_word_of_the_command_line_sets_a_training_argument(words, key, value):
    given = load(BASE, *words).train[key]

    assert (given, type(given)) == (value, type(value))


def test_words_of_the_command_line_set_keys_of_every_section():
    words = ["--stage", "pretrain", "--overwrite", "--model.revision", "12345", "--model.config.n_layer", "4"]
    words += ["--model.init", "scratch"]
    words += ["--data.eval", "[a.jsonl, b.jsonl]", "--data.max_length=64", "--tokenizer.pad_token", "[PAD]"]
    words += ["--samples.prompts", "[Once]", "--samples.max_new_tokens", "5"]

    recipe = load(BASE, *words)

    assert (recipe.stage, recipe.overwrite, recipe.model.revision) == ("pretrain", True, "12345")
    assert recipe.model.config == {"n_layer": 4}
    assert [source.path for source in recipe.data.eval] == ["a.jsonl", "b.jsonl"]
    assert recipe.samples and (recipe.samples.prompts, recipe.samples.max_new_tokens) == (["Once"], 5)
    assert (recipe.data.max_length, recipe.tokenizer.pad_token) == (64, "[PAD]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stray"], "unexpected word 'stray'; fix: --section.key VALUE"),
        (["-x"], "unexpected word '-x'; fix: --section.key VALUE"),
        (["--"], "unexpected word '--'; fix: --section.key VALUE"),
        (["--bf16", "true", "false"], "unexpected word 'false'; fix: --section.key VALUE"),
        (["--learnin_rate", "1"], "unknown option --learnin_rate; did you mean 'learning_rate'?"),
        (["--max_lenght", "1"], "unknown option --max_lenght; did you mean 'data.max_length'?"),
        (["--xyzzy"], "unknown option --xyzzy"),
        (["--learning", "1"], "unknown option --learning"),
        (
            ["--warmup_ratio", "0.1"],
            "--warmup_ratio is a name of transformers 4; fix: use warmup_steps",
        ),
        (["--learning_rate"], "--train.learning_rate needs a value"),
        (["--data.max_length", "--bf16"], "--data.max_length needs a value"),
        (["--max_steps", "[1"], "--train.max_steps: not valid YAML; got '[1'"),
        (["--max_steps", "four"], "train.max_steps: expected a whole number; got 'four'"),
        (["--data.max_lenght", "5"], "data.max_lenght is not a key of a recipe; did you mean 'max_length'?"),
        (["--dat.max_length", "5"], "dat is not a key of a recipe; did you mean 'data'?"),
        (["--stage.x", "5"], "--stage.x: stage is not a mapping; fix: use --stage"),
        (
            ["--data.train.0.path", "5"],
            "--data.train.0.path: data.train is not a mapping; fix: use --data.train",
        ),
        (["--tokenizer", "{name: gpt2}"], "tokenizer.name is not a key of a recipe"),
        (["--samples.max_new_tokens", "5"], "samples.prompts is missing"),
        (["--hub_token", "x"], "train.hub_token: secrets do not belong in a recipe"),
        (["--model.revision", TOKEN], "model.revision: secrets do not belong in a recipe"),
    ],
)
def test_a_wrong_word_on_the_command_line_is_named(words, message):
    assert error_of(BASE, *words).startswith(f"command line: {message}")


@pytest.mark.parametrize(
    ("train", "words", "expected"),
    [
        (
            "{path: a, format: instruct, fields: {label: out}}",
            ["--data.train", "my.jsonl"],
            [Source(path="my.jsonl", format="instruct", fields={"label": "out"})],
        ),
        (
            "[{path: a, format: text, split: test}, {path: b, format: text}]",
            ["--data.train", "[x, y]"],
            [Source(path="x"), Source(path="y")],
        ),
        ("[{path: a, format: text}, {path: b}]", ["--data.train", "x"], [Source(path="x")]),
        ("{path: a, format: text}", ["--data.train", "{path: x}"], [Source(path="x")]),
        ("a", ["--data.train", "x"], [Source(path="x")]),
    ],
)
def test_a_plain_path_has_the_columns_that_all_sources_of_the_recipe_share(train, words, expected):
    assert load(BASE.replace("poems.jsonl", train), *words).data.train == expected


# --- descriptions and written recipes


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--model.init", "scratch", "--model.config", "{a: [1, {b: no}], c: '1e-4', d: 1.0e-20}"],
        ["--tokenizer.eos_token", "no", "--model.revision", "1e5", "--run_name", "a: b # c"],
        ["--samples", '{prompts: ["two\\nlines", "  ", "诗", "null", "- x", "🙂"]}', "--output_dir", "true"],
    ],
)
def test_a_recipe_survives_writing_and_reading(words, tmp_path):
    recipe = load(BASE, *words)

    (tmp_path / "written.yaml").write_text(recipe_to_yaml(recipe), encoding="utf-8")

    assert load_recipe("written.yaml") == recipe
    assert recipe != load(BASE, "--seed", "7")


def test_a_written_recipe_is_plain_yaml_in_the_order_of_the_sections():
    lines = recipe_to_yaml(load()).splitlines()

    assert lines[:3] == ["stage: sft", "model:", "  name_or_path: gpt2"]
    assert lines[-4:] == ["train:", "  output_dir: runs/x", "overwrite: false", "resume_override: []"]


def test_each_value_is_described_with_its_origin():
    words = ["--model.init", "scratch", "--model.config", "{n_layer: 2}"]
    recipe = load(BASE, "--learning_rate", "1e-4", "--data.eval", "e.jsonl", *words)

    rows = {key: (value, origin) for key, value, origin in describe_recipe(recipe)}

    assert rows["stage"] == ("sft", "r.yaml:1")
    assert rows["model.name_or_path"] == ("gpt2", "r.yaml:3")
    assert rows["model.config.n_layer"] == (2, "command line")
    assert rows["data.train.0.path"] == ("poems.jsonl", "r.yaml:5")
    assert rows["data.train.0.split"] == ("train", "default")
    assert rows["data.eval.0.path"] == ("e.jsonl", "command line")
    assert rows["data.max_length"] == (1024, "default")
    assert rows["train.output_dir"] == ("runs/x", "r.yaml:7")
    assert rows["train.learning_rate"] == (0.0001, "command line")
    assert rows["train.logging_steps"] == (10, "hf_clm default")


def test_an_override_replaces_the_origin_of_the_line():
    text = BASE.replace("poems.jsonl", "[{path: a.jsonl, split: test}]")

    rows = [
        row
        for row in describe_recipe(load(text, "--data.train", "b.jsonl"))
        if row[0].startswith("data.train.0")
    ]

    assert rows[0] == ("data.train.0.path", "b.jsonl", "command line")
    assert ("data.train.0.split", "train", "default") in rows


def test_the_help_explains_every_key_with_its_type_and_default():
    lines = recipe_help().splitlines()

    at = lines.index("  --data.packing  none|best_fit|stream  (default null)")
    assert lines[at + 2] == "      Default: best_fit for sft, stream for pretrain."
    assert "  --stage  pretrain|sft  (required)" in lines
    assert "  --data.train  list[Source]  (required)" in lines
    assert "  --tokenizer.train.vocab_size  int  (default 4096)" in lines
    assert "  --model.allow_bin  bool  (default false)" in lines
    assert "  fields  dict[str, str]  (default {})" in lines
    assert lines[-1] == "Fields of transformers.TrainingArguments need no prefix: --learning_rate 1e-4"


def test_every_key_outside_the_sections_has_a_docstring_that_is_its_help():
    sections = {"model", "tokenizer", "data"}
    described = {name for name, info in Recipe.model_fields.items() if info.description}

    assert described == set(Recipe.model_fields) - sections
    undescribed = [
        (model.__name__, name)
        for model in (Model, Tokenizer, TokenizerTraining, Data, Source, Window, Samples, EarlyStopping)
        for name, info in model.model_fields.items()
        if not info.description
    ]
    assert undescribed == []


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("data.max_length", "refused"),
        ("model.config.n_layer", "refused"),
        ("data.train.0.weight", "refused"),
        ("data.train.0.path", "unseen"),
        ("data.eval.1.path", "unseen"),
        ("data.eval.1.set", "free"),  # as all of data.eval
        ("samples.prompts.0", "free"),
        ("doctor.round_trip", "unseen"),
        ("train.learning_rate", "refused"),
        ("train.save_steps", "free"),
        ("train.output_dir", "unseen"),
        ("processes", "free"),
        ("global_batch", "refused"),
        ("architecture.n_layer", "refused"),
    ],
)
def test_a_key_has_a_rule_for_resuming(key, rule):
    assert resume_rule(key) == rule


# --- streams


STREAM = ["--stage=pretrain", "--data.streaming=true", "--max_steps=5"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_steps=-1"], "train.max_steps is missing: data.streaming needs it"),
        (["--data.eval_fraction=0.1"], "data.eval_fraction and data.streaming exclude each other"),
        (["--data.duplicates=drop"], "data.duplicates and data.streaming exclude each other"),
        (["--data.train=[{path: a, limit: 3}]"], "data.train.0.limit and data.streaming exclude each other"),
        (
            ["--data.train=[{path: a, epochs: 2}]"],
            "data.train.0.epochs and data.streaming exclude each other",
        ),
        (
            ["--data.mixing={by: tokens}"],
            "without weights, the sources of a stream are read one after the other",
        ),
        (
            ["--model={init: scratch, config: {model_type: gpt2}}", "--tokenizer.train={}"],
            "tokenizer.train and data.streaming exclude each other",
        ),
        (
            ["--train_sampling_strategy=group_by_length"],
            "train.train_sampling_strategy: group_by_length and data.streaming exclude each other",
        ),
        (
            ["--save_strategy=epoch"],
            "train.save_strategy: epoch and data.streaming exclude each other",
        ),
        (
            ["--torch_compile=true"],
            "train.torch_compile: true and data.streaming exclude each other",
        ),
    ],
)
def test_options_that_need_all_of_the_data_are_refused_with_streaming(words, message):
    assert message in error_of(BASE, *STREAM, *words)


WEIGHTS = "--data.train=[{path: a, weight: 1}, {path: b, weight: 2}]"


@pytest.mark.parametrize(
    ("mixing", "message"),
    [
        ("{size: 9}", "data.mixing.size and data.streaming exclude each other"),
        ("{replacement: true}", "data.mixing.replacement and data.streaming exclude each other"),
        ("{temperature: 2}", "data.mixing.temperature"),
    ],
)
def test_a_stream_is_mixed_by_weights_alone(mixing, message):
    assert message in error_of(BASE, *STREAM, WEIGHTS, f"--data.mixing={mixing}")


def test_the_sources_of_a_stream_may_have_weights():
    recipe = load(BASE, *STREAM, WEIGHTS, "--data.mixing={by: tokens}")

    assert [source.weight for source in recipe.data.train] == [1, 2]
