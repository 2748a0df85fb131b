"""Every check before the first step: one case that it accepts and one that it rejects."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import EOS, IM_END, byte_tokenizer, prompted, split_of, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from hf_clm.doctor import checks
from hf_clm.doctor.checks import Ok, Problem
from hf_clm.doctor.facts import Facts, Machine
from hf_clm.doctor.memory import MemoryEstimate
from hf_clm.errors import DataError, EnvironmentFault, ExitCode
from hf_clm.recipe.recipe import Recipe
from hf_clm.schema import Chat, Document, Tokens
from hf_clm.text.tokenizer import use_chat_template

GIB = 2**30
MACHINE = Machine(free_disk=100 * GIB, free_memory=100 * GIB, cores=8)
# 24 GiB for training: 4 for weights, 8 for the optimizer, 12 for a micro-step.
ESTIMATE = MemoryEstimate(4 * GIB, 4 * GIB, 8 * GIB, 6 * GIB, 2 * GIB, micro_step=12 * GIB, evaluation=GIB)
# 8 rows: "say\n" is the prompt (4 tokens), 1 to 8 letters and the end token are targets.
ROWS = [prompted("say\n", "x" * n) for n in range(1, 9)]
CHAT = [Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}])]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows two words."""
    vocab = {"<eos>": 0, "<pad>": 1, "<unk>": 2, "alpha": 3, "beta": 4}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    use_chat_template(tokenizer, "chatml")
    return tokenizer


def build_facts(
    rows: list[Any] | None = None,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    machine: dict[str, Any] | None = None,
    **sections: Any,
) -> Facts:
    """Builds the facts of a run over ROWS with 2 rows per step: 4 steps per epoch, 12 in total.

    ``sections``: changes to the sections of the recipe (model, data, train), and some more.
    """
    tokenizer = tokenizer or byte_tokenizer()
    kinds = {Tokens: "tokenized", Chat: "messages", Document: "instruct"}
    settings = {"output_dir": "runs/x", "use_cpu": True, "per_device_train_batch_size": 2}
    settings |= {"logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    settings |= sections.get("train", {})
    if sections.get("evaluated"):
        settings["eval_strategy"] = "steps"
    content = {
        "stage": "sft",
        "model": {"name_or_path": "some/model"} | sections.get("model", {}),
        "tokenizer": {"name_or_path": "some/tokenizer"},
        "data": {"train": ["rows.jsonl"], "eval": ["rows.jsonl"], "max_length": 64, "packing": "none"}
        | sections.get("data", {}),
        "lora": sections.get("lora"),
        "train": settings,
    }
    recipe = Recipe.model_validate(content)
    split = split_of(Path(tempfile.mkdtemp()), list(rows or ROWS), recipe, tokenizer)
    split.examples.formats = {kinds[type(row)] for row in rows or ROWS}
    return Facts(
        recipe,
        TrainingArguments(**settings),
        tokenizer,
        tiny_model(**sections.get("config", {})).config,
        split,
        replace(MACHINE, **(machine or {})),
        estimate=ESTIMATE,
        measured=sections.get("measured"),
    )


def templated(text: str) -> dict[str, Any]:
    """Returns a change to the run above: a source with a template."""
    return {"data": {"train": [{"path": "rows.jsonl", "template": {"text": text}}]}}


H100 = {
    "machine": {"device": "cuda", "capability": (9, 0)},
    "train": {"bf16": True},
}
GPT2 = {"kind": "gpt2", "attn_pdrop": 0.1}
# The name of a check, the change to the run above, the finding.
ACCEPTED: list[tuple[str, dict[str, Any], str]] = [
    ("steps", {}, "12 steps with 2 rows each"),
    ("steps", {"train": {"max_steps": 5}}, "5 steps with 2 rows each"),
    (
        "steps",
        {"train": {"dataloader_drop_last": True, "per_device_train_batch_size": 8}},
        "3 steps with 8 rows each",
    ),
    ("steps", {"train": {"gradient_accumulation_steps": 3}}, "6 steps with 6 rows each"),
    ("batch", {}, "2 rows, 4.0 batches per epoch"),
    ("warm-up", {"train": {"warmup_steps": 0.25}}, "3 of 12 steps"),
    ("warm-up", {"train": {"warmup_steps": 12}}, "12 of 12 steps"),
    ("saving", {}, "strategy no"),
    ("saving", {"train": {"save_strategy": "steps", "save_steps": 4}}, "every 4 steps, all kept"),
    ("saving", {"train": {"save_strategy": "steps", "save_steps": 0.5}}, "every 6 steps, all kept"),
    ("evaluation", {}, "strategy no"),
    ("logging", {}, "every 1 steps"),
    ("logging", {"train": {"logging_steps": 50, "logging_first_step": True}}, "every 50 steps"),
    ("vocabulary", {}, "260 ids, 260 rows"),
    ("vocabulary", {"config": {"vocab_size": 258}}, "260 ids, 260 rows (2 new)"),
    ("template tokens", templated("{a}<|endoftext|>"), "<|endoftext|>"),
    ("template tokens", templated("{a} < {b} > {c}"), "none"),
    (
        "bytes per token",
        {"rows": [prompted("alpha", "beta")], "tokenizer": word_tokenizer()},
        "4.5 bytes of text per token",
    ),
    ("unknown tokens", {"rows": [prompted("alpha", "beta")], "tokenizer": word_tokenizer()}, "none"),
    ("learned stops", {}, "8 stop tokens among the labels"),
    ("overlong rows", {}, "0 of 8 rows over max_length"),
    ("packing", {"data": {"max_length": 13, "packing": "best_fit"}}, "84% full"),  # 76 tokens, 7 rows of 13
    ("memory", {"machine": {"free_memory": 28 * GIB}}, "24.00 GiB needed, 28.00 GiB free"),
    ("memory", {"machine": {"free_memory": 13 * GIB}, "measured": 1}, "13.00 GiB needed, 13.00 GiB free"),
    ("disk", {}, "4.00 GiB needed for 0 checkpoints and the model, 100.00 GiB free"),
    ("threads", {}, "8 cores, OMP_NUM_THREADS is not set"),
    ("threads", {"machine": {"threads": 8}}, "1 x 8 threads on 8 physical cores"),
    ("precision", {}, "float32 weights on cpu"),
    ("precision", {"train": {"bf16": True}}, "float32 weights, bfloat16 autocast on cpu"),
    ("precision", {"train": {"bf16": True}, "lora": {}}, "bfloat16 weights, bfloat16 autocast on cpu"),
    ("precision", {"model": {"dtype": "bfloat16"}, "lora": {}}, "bfloat16 weights on cpu"),
    ("GPUs", {}, "none available"),
    ("attention", H100, "the fused kernel for packed rows"),
    (
        "attention",
        {"machine": {"device": "cuda", "capability": (7, 5)}, "train": {"fp16": True}},
        "one masked call of SDPA: the fused kernel for packed rows needs compute capability 8.0; "
        "this GPU has 7.5",
    ),
    (
        "attention",
        {"machine": {"device": "mps"}},
        "one masked call of SDPA: mps has no fused kernel for packed rows",
    ),
]

# The same for problems, with the exit code and whether it is a warning.
RECIPE, DATA, MODEL, ENVIRONMENT = ExitCode.RECIPE, ExitCode.DATA, ExitCode.MODEL, ExitCode.ENVIRONMENT
FULL_DISK = {
    "machine": {"free_disk": 39 * GIB},
    "train": {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2},
}
REFUSED: list[tuple[str, dict[str, Any], str, ExitCode, bool]] = [
    (
        "steps",
        {"train": {"dataloader_drop_last": True, "per_device_train_batch_size": 16}},
        "8 rows do not fill a batch of 16 (all processes), and drop_last is on",
        DATA,
        False,
    ),
    (
        "batch",
        {"train": {"gradient_accumulation_steps": 8}},
        "a step takes 16 rows, but there are only 8: one step per epoch",
        RECIPE,
        True,
    ),
    (
        "warm-up",
        {"train": {"warmup_steps": 13}},
        "the warm-up of 13 steps is longer than the run of 12",
        RECIPE,
        False,
    ),
    (
        "saving",
        {"train": {"save_strategy": "steps", "save_steps": 13}},
        "a checkpoint every 13 steps, but the run has 12: none before the end",
        RECIPE,
        True,
    ),
    (
        "saving",
        {"train": {"save_strategy": "steps", "save_steps": 5, "eval_steps": 2}, "evaluated": True},
        "not all checkpoints (every 5 steps) are evaluated (every 2 steps)",
        RECIPE,
        True,
    ),
    (
        "evaluation",
        {"train": {"eval_steps": 13}, "evaluated": True},
        "an evaluation every 13 steps, but the run has 12",
        RECIPE,
        True,
    ),
    ("logging", {"train": {"logging_strategy": "no"}}, "the loss is never logged", RECIPE, True),
    (
        "logging",
        {"train": {"logging_steps": 13, "logging_first_step": False}},
        "the loss is never logged",
        RECIPE,
        True,
    ),
    (
        "vocabulary",
        {"config": {"vocab_size": 200}},
        "the tokenizer (260 ids) does not match the pretrained model (200 embedding rows)",
        MODEL,
        False,
    ),
    (
        "vocabulary",
        {"config": {"vocab_size": 300}},
        "40 of 300 embedding rows have no token",
        MODEL,
        True,
    ),
    ("bytes per token", {}, "1.0 bytes of text per token; 3 to 4 are usual", MODEL, True),
    (
        "unknown tokens",
        {"rows": [prompted("alpha", "gamma beta")], "tokenizer": word_tokenizer()},
        "25.00% of the tokens are <unk>: the tokenizer cannot represent the text",
        MODEL,
        False,
    ),
    (
        "unknown tokens",
        {
            "rows": [prompted("alpha", "beta " * 197 + "gamma")],
            "tokenizer": word_tokenizer(),
            "data": {"max_length": 200},
        },
        "0.50% of the tokens are <unk>: the tokenizer cannot represent the text",
        MODEL,
        True,
    ),
    (
        "learned stops",
        {"rows": [Tokens([1, 2], [1, 2], [2])]},
        "no label is a stop token (<|endoftext|>)",
        DATA,
        True,  # labels from the user
    ),
    (
        "learned stops",
        {"rows": [prompted("say\n", "xxx")], "data": {"max_length": 5, "overflow": "truncate"}},
        "no label is a stop token (<|endoftext|>)",
        DATA,
        False,
    ),
    (
        "overlong rows",
        {"data": {"max_length": 12}},
        "1 of 8 rows are over max_length, and truncated or dropped",
        DATA,
        True,
    ),
    (
        "packing",
        {"data": {"max_length": 50, "packing": "best_fit"}, "rows": [prompted("p", "x" * 24)] * 2},
        "the packed rows are 52% full",
        RECIPE,
        True,
    ),
    (
        "memory",
        {"machine": {"free_memory": 20 * GIB}},
        "24.00 GiB needed, 20.00 GiB free",
        ENVIRONMENT,
        False,
    ),
    ("memory", {"machine": {"free_memory": 23 * GIB}}, "24.00 GiB needed, 23.00 GiB free", ENVIRONMENT, True),
    (
        "memory",
        {"machine": {"free_memory": 23 * GIB}, "measured": 12 * GIB},
        "24.00 GiB needed, 23.00 GiB free",
        ENVIRONMENT,
        False,
    ),
    (
        "disk",
        FULL_DISK,
        "40.00 GiB needed for 3 checkpoints and the model, 39.00 GiB free",
        ENVIRONMENT,
        False,
    ),
    (
        "threads",
        {"machine": {"threads": 8, "processes": 2}},
        "2 x 8 threads on 8 physical cores",
        ENVIRONMENT,
        True,
    ),
    ("threads", {"machine": {"threads": 1}}, "1 x 1 threads on 8 physical cores", ENVIRONMENT, True),
    (
        "precision",
        {"model": {"dtype": "float16"}},
        "float16 weights cannot be trained because gradients overflow",
        RECIPE,
        False,
    ),
    ("precision", {"model": {"dtype": "bfloat16"}}, "bfloat16 weights lose small updates", RECIPE, True),
    (
        "precision",
        {"train": {"bf16": True}, "machine": {"has_bf16": False}},
        "this cpu has no native bfloat16, which makes it slower than float32",
        RECIPE,
        True,
    ),
    ("precision", {"train": {"fp16": True}}, "float16 autocast requires a GPU", RECIPE, False),
    (
        "template tokens",
        templated("{a}<sep>{b}[SEP]<sep>"),
        "<sep>, [SEP] in the template is plain text for this tokenizer",
        RECIPE,
        True,
    ),
    (
        "precision",
        {"machine": {"device": "cuda", "has_bf16": False}},
        "this GPU has no native bfloat16, and is several times slower in float32 than in float16",
        RECIPE,
        True,
    ),
    (
        "attention",
        {**H100, "config": GPT2},
        "the fused kernel for packed rows has no attention dropout, so attn_pdrop 0.1 costs a masked call "
        "with several times the scores",
        RECIPE,
        True,
    ),
    ("GPUs", {"machine": {"gpus": 4}}, "0 of 4 GPUs used", ENVIRONMENT, True),
]


def look(name: str, changes: dict[str, Any]) -> Any:
    return checks.DOCTOR_CHECKS[name](
        build_facts(changes.get("rows"), **{k: v for k, v in changes.items() if k != "rows"})
    )


@pytest.mark.parametrize(("name", "changes", "what"), ACCEPTED)
def test_a_check_accepts_a_sound_run(name, changes, what):
    assert look(name, changes) == Ok(what)


@pytest.mark.parametrize(("name", "changes", "what", "code", "is_warning"), REFUSED)
def test_a_check_reports_a_problem_with_a_fix(name, changes, what, code, is_warning):
    result = look(name, changes)

    assert isinstance(result, Problem)
    assert (result.what, result.error.exit_code, result.is_warning) == (what, code, is_warning)
    assert result.where and result.fix


def test_every_check_has_cases_for_both():
    both = {name for name, *_ in ACCEPTED} & {name for name, *_ in REFUSED}

    assert set(checks.DOCTOR_CHECKS) == both
    assert len(checks.DOCTOR_CHECKS) == 19


def test_checks_that_do_not_apply_are_left_out():
    left_out = {"unknown tokens", "template tokens", "packing", "attention"}

    assert set(checks.DOCTOR_CHECKS) - set(checks.run_checks(build_facts())) == left_out


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ({}, "model.attention_dropout"),
        (
            {"init": "scratch", "name_or_path": None, "config": {"model_type": "gpt2"}},
            "model.config.attn_pdrop",
        ),
    ],
)
def test_attention_dropout_on_a_gpu_is_a_warning_before_training_with_the_key_to_set(model, key):
    lines = checks.check_before_training(build_facts(**H100, config=GPT2, model=model))

    assert [line for line in lines if "dropout" in line] == [
        f"{key}: the fused kernel for packed rows has no attention dropout, so attn_pdrop 0.1 costs a masked "
        f"call with several times the scores; fix: unless it is needed, set it to 0 (--{key} 0)"
    ]


def test_before_training_the_first_problem_is_raised_as_its_error():
    facts = build_facts(machine={"free_memory": GIB, "free_disk": GIB})

    with pytest.raises(EnvironmentFault, match=r"^memory: 24\.00 GiB needed, 1\.00 GiB free; fix: lower"):
        checks.check_before_training(facts)


def test_before_training_data_problems_come_before_those_of_the_machine():
    facts = build_facts(
        [prompted("say", "x" * 70)] * 8, machine={"free_memory": GIB}, data={"overflow": "truncate"}
    )

    with pytest.raises(DataError, match="no label is a stop token"):
        checks.check_before_training(facts)


def test_before_training_warnings_are_returned_as_lines():
    assert checks.check_before_training(build_facts()) == [
        "tokenizer: 1.0 bytes of text per token; 3 to 4 are usual;"
        " fix: use a tokenizer for the language of the text, or train one (tokenizer.train)"
    ]


def test_the_stop_token_of_a_chat_counts_as_learned():
    facts = build_facts(CHAT, tokenizer=chat_tokenizer())

    labels = facts.train.label_counts
    assert labels[IM_END] and not labels[EOS]
    assert checks.check_stop_is_learned(facts) == Ok("1 stop tokens among the labels")
