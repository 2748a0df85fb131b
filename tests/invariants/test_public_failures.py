"""Publicly reported failures of other trainers, reproduced: here, training is correct or the row is rejected.

Every test cites a public report; ``owner/name#number`` is an issue on GitHub.
"""

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from helpers import (
    EOS,
    IM_END,
    PAD,
    X,
    byte_tokenizer,
    prompted,
    save_folder,
    sentencepiece_tokenizer,
    shown,
    tiny_model,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_clm.data.batch.collators import DataCollatorForCausalLM, DataCollatorForPackedCausalLM
from hf_clm.data.batch.packing import PackedDataset
from hf_clm.data.label.datasets import SFTDataset
from hf_clm.data.label.labels import encode_prompts
from hf_clm.data.label.render import LabelOptions
from hf_clm.data.read.formats import to_example
from hf_clm.errors import DataError, DivergedError, RecipeError
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.generate import generate
from hf_clm.generation.load import load_run
from hf_clm.generation.prompts import to_prompt_example
from hf_clm.model.attention import NAME, register
from hf_clm.recipe.recipe import load_recipe
from hf_clm.schema import Chat
from hf_clm.text.tokenizer import add_pad_token, use_chat_template
from hf_clm.training.run import train

RECORDS = [{"instruct": f"say {n}", "input": "", "label": "xyz"[n % 3] * n} for n in range(1, 9)]
TURNS: list[Any] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye"},
]
# ChatML without {% generation %}, as most models ship it.
UNMARKED = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def chat_tokenizer(template: str = "chatml", **options: Any):
    tokenizer = byte_tokenizer(**options)
    use_chat_template(tokenizer, "chatml")
    if template != "chatml":
        tokenizer.chat_template = template
    return tokenizer


def learned(row: Any, tokenizer: Any) -> list[str]:
    """Returns the text of each contiguous range of labels."""
    stretches: list[list[int]] = [[]]
    for label in row["labels"]:
        if label == X:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def save(folder: Path, **options: Any) -> dict[str, Any]:
    """Saves a new model and tokenizer; returns the model section of a recipe."""
    tokenizer = options.pop("tokenizer", None) or byte_tokenizer()
    name = save_folder(folder / "own", tiny_model("llama", **options), tokenizer)
    return {"name_or_path": name}


def read_losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]


# --- the end token


def test_the_model_learns_to_stop_by_itself(tmp_path):
    """huggingface/trl#1623, meta-pytorch/torchtune#949: after fine-tuning the model never stops."""
    records = [
        {"instruct": "one", "input": "", "label": "first"},
        {"instruct": "two", "input": "", "label": "2nd"},
    ]
    settings = {"max_steps": 60, "learning_rate": 1e-2, "logging_steps": 60}
    train(helpers.build_recipe(tmp_path, records, model=save(tmp_path, hidden_size=64), train=settings))

    run = load_run(str(tmp_path / "run"), device="cpu")
    prompts = [to_prompt_example(word, "instruct") for word in ("one", "two")]
    answers = generate(run.model, run.tokenizer, prompts=prompts, decoding=Decoding(20))

    assert [(answer.text, answer.stopped) for answer in answers] == [("first", True), ("2nd", True)]


@pytest.mark.parametrize("max_length", [None, 8, 64])
def test_the_end_token_is_learned_whether_or_not_max_length_is_set(max_length):
    """meta-pytorch/torchtune#2792: the end token is masked as soon as max_seq_len is set."""
    dataset = SFTDataset([prompted("ask\n", "yes")], byte_tokenizer(), max_length=max_length)

    assert dataset[0]["labels"] == [X, X, X, X, *b"yes", EOS]


@pytest.mark.parametrize("policy", ["encode_as_text", "allow"])
def test_an_end_token_written_by_hand_is_learned_once(policy):
    """unslothai/unsloth#3228: it is trained twice, or letter by letter."""
    example = prompted("Say hi", " hi<|endoftext|>")

    row = SFTDataset([example], byte_tokenizer(), special_tokens_in_text=policy)[0]

    assert row == {"input_ids": [*b"Say hi hi", EOS], "labels": [X] * 6 + [*b" hi", EOS]}


def test_texts_that_are_already_rendered_are_rejected():
    """unslothai/unsloth#384, hiyouga/LLaMA-Factory#3420: their control tokens would be trained as letters."""
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"

    with pytest.raises(DataError, match="3 of 3 texts are already rendered: they contain control tokens"):
        SFTDataset([{"text": text}] * 3, chat_tokenizer())


def test_a_truncated_answer_does_not_end_with_a_learned_end_token():
    """LLaMA-Factory: an end token after a truncated answer is a target."""
    dataset = SFTDataset(
        [prompted("ask\n", "yes or no")], byte_tokenizer(), max_length=8, overflow="truncate"
    )

    assert dataset[0]["labels"] == [X, X, X, X, *b"yes "]


def test_the_end_of_a_turn_is_learned_however_far_it_is_from_the_text():
    """axolotl: the end token is only trained within 3 tokens of the content, with a DEBUG line otherwise."""
    far = UNMARKED.replace("message.content + '<|im_end|>", "message.content + '     <|im_end|>")
    tokenizer = chat_tokenizer(far)

    dataset = SFTDataset([Chat(TURNS)], tokenizer)

    assert learned(dataset[0], tokenizer) == ["Yo     <|im_end|>", "Bye     <|im_end|>"]


# --- pad and end token are the same


def test_a_pad_token_that_is_the_end_token_is_replaced_and_no_label_is_lost(tmp_path):
    """huggingface/trl#1414, transformers#48016: pad == eos masks every end, or breaks batches later."""
    tokenizer = byte_tokenizer(pad="<|endoftext|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    model = save(tmp_path, tokenizer=tokenizer)

    train(
        helpers.build_recipe(tmp_path, RECORDS, model={**model, "attention": "sdpa"}, train={"max_steps": 1})
    )

    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run").config
    assert (saved.pad_token_id, config.pad_token_id, saved.eos_token_id) == (PAD, PAD, EOS)
    rows = SFTDataset([to_example(record, format="instruct") for record in RECORDS], saved)
    batch = DataCollatorForCausalLM(saved.pad_token_id)([rows[0], rows[7]])
    assert (batch["labels"] == EOS).sum(dim=1).tolist() == [1, 1]


def test_a_pad_token_in_the_text_of_a_user_keeps_its_label():
    """Masking by id also masks text that looks like padding."""
    tokenizer = byte_tokenizer(pad="#", eos="<|endoftext|>")
    add_pad_token(tokenizer, "#")
    row = {"input_ids": [65, 35, 35], "labels": [X, 35, 35]}

    batch = DataCollatorForCausalLM(35)([row, {"input_ids": [65], "labels": [X]}])

    assert batch["labels"].tolist() == [[X, 35, 35], [X, X, X]]


# --- nothing is learned


@pytest.mark.parametrize("packing", ["none", "best_fit"])
@pytest.mark.parametrize(
    "record",
    [{"input_ids": [1, 2, 3], "labels": [X, X, X]}, {"input_ids": [1], "labels": [1]}],
    ids=["all", "first"],
)
def test_rows_without_labels_are_rejected_by_name(record, packing, tmp_path):
    """unslothai/unsloth#2095, #2900: all labels are -100, and the loss is 0 or NaN."""
    rows = [{"input_ids": [1, 2], "labels": [X, 2]}, record]

    with pytest.raises(DataError) as error:
        train(helpers.build_recipe(tmp_path, rows, data={"packing": packing}))

    assert "1 of 2 records cannot be trained on within data.max_length=64" in str(error.value)
    assert "rows.jsonl:2 (no target token)" in str(error.value)


@pytest.mark.parametrize(
    ("overflow", "reason"), [("truncate", "no target token is left"), ("keep_target", "no whole target fits")]
)
def test_a_row_that_loses_its_answer_to_max_length_is_rejected_by_name(overflow, reason, tmp_path):
    """TRL truncates on the right, and silently drops rows without an answer, or packs them."""
    long = {"instruct": "p" * 40, "input": "", "label": "x" * 40}

    with pytest.raises(DataError) as error:
        train(helpers.build_recipe(tmp_path, [*RECORDS, long], data={"max_length": 32, "overflow": overflow}))

    assert f"rows.jsonl:9 ({reason}" in str(error.value)


def test_a_long_prompt_is_truncated_and_the_answer_is_kept():
    """huggingface/trl#6320; LLaMA-Factory keeps 286 + 14 tokens of a 4000 + 200 row at cutoff 300."""
    dataset = SFTDataset([prompted("p" * 4000, "a" * 200)], byte_tokenizer(), max_length=300)

    assert dataset[0]["labels"] == [X] * 99 + [ord("a")] * 200 + [EOS]


# --- the border between prompt and answer


def test_the_border_is_found_even_if_the_template_has_no_fixed_tokens():
    """huggingface/trl#588, #1820: '### Response:' has other ids in context, and everything is masked."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "#"), (":", "Ċ"), ("Ċ", "A")])
    record = {"instruction": "Say A.", "input": "", "output": "A or B"}

    row = SFTDataset([to_example(record, format="alpaca")], tokenizer)[0]

    assert learned(row, tokenizer) == ["A or B<|endoftext|>"]


def test_the_prompt_of_training_is_the_prompt_of_generation_id_by_id():
    """huggingface/trl#5213: tokenized with its answer, the prompt has other ids than without it."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "A")])
    example = prompted("Say A.\n", "A")
    assert tokenizer("Say A.\nA")["input_ids"][:7] != tokenizer("Say A.\n")["input_ids"]

    row = SFTDataset([example], tokenizer)[0]

    assert row == {"input_ids": [*b"Say A.\nA", EOS], "labels": [X] * 7 + [ord("A"), EOS]}
    assert encode_prompts([example], tokenizer, LabelOptions()) == [[*b"Say A.\n"]]


def test_an_answer_that_looks_like_the_template_is_learned_completely():
    """axolotl compares with a dummy message, and trains only ``1, 2], [3, 4`` of ``[[1, 2], [3, 4]]``."""
    tokenizer = chat_tokenizer(UNMARKED)
    chat = Chat([TURNS[0], {"role": "assistant", "content": "[[1, 2], [3, 4]]"}])

    assert learned(SFTDataset([chat], tokenizer)[0], tokenizer) == ["[[1, 2], [3, 4]]<|im_end|>"]


# --- chats


def test_a_template_without_generation_marks_still_learns_the_answers():
    """transformers#34172: without {% generation %} the assistant mask is all zeros."""
    tokenizer = chat_tokenizer(UNMARKED)

    assert learned(SFTDataset([Chat(TURNS)], tokenizer)[0], tokenizer) == [
        "Yo<|im_end|>",
        "Bye<|im_end|>",
    ]


def test_every_turn_of_a_conversation_is_learned_with_its_end_and_no_other_text():
    """axolotl#1761, #2089: in conversations with several turns, labels are lost or in the wrong turn."""
    tokenizer = chat_tokenizer()
    row = SFTDataset([Chat(TURNS)], tokenizer)[0]
    last = SFTDataset([Chat(TURNS)], tokenizer, train_on="last_turn")[0]

    assert learned(row, tokenizer) == ["Yo<|im_end|>", "Bye<|im_end|>"]
    assert learned(last, tokenizer) == ["Bye<|im_end|>"]
    assert [label for label in row["labels"] if label == IM_END] == [IM_END, IM_END]


def test_a_template_that_rewrites_earlier_turns_gets_a_row_per_turn():
    """Reasoning templates drop the reasoning of earlier turns, which later turns of one row would see."""
    tokenizer = chat_tokenizer(
        UNMARKED.replace(
            "message.content", "(message.content if loop.last else message.content.split('#')[-1])"
        )
    )
    messages = [TURNS[0], {"role": "assistant", "content": "I think#Yo"}, *TURNS[2:]]

    rows = SFTDataset([Chat(messages)], tokenizer)

    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert [shown(row, tokenizer) for row in rows] == [
        f"{asked}⟦I think#Yo<|im_end|>⟧",
        f"{asked}Yo<|im_end|>\n{asked.replace('Hi', 'And?')}⟦Bye<|im_end|>⟧",
    ]


def test_separate_reasoning_is_learned_or_rejected():
    """jingyaogong/minimind#737: it is silently dropped, and the model learns not to reason."""
    thoughtful = Chat([TURNS[0], {**TURNS[1], "reasoning": "a greeting"}])
    shows = UNMARKED.replace("message.content", "(message.reasoning_content or '') + message.content")

    tokenizer = chat_tokenizer(shows)
    assert learned(SFTDataset([thoughtful], tokenizer)[0], tokenizer) == ["a greetingYo<|im_end|>"]
    with pytest.raises(DataError, match="the chat template has no place for reasoning"):
        SFTDataset([thoughtful], chat_tokenizer(UNMARKED))


def test_a_template_that_silently_drops_a_message_is_rejected_with_the_row(tmp_path):
    """Many templates only render user and assistant turns, and omit the results of tools."""
    (tmp_path / "deaf.jinja").write_text(
        UNMARKED.replace("{{ '<|im_start|>' +", "{{ '' if message.role == 'tool' else '<|im_start|>' +")
    )
    messages = [TURNS[0], TURNS[1], {"role": "tool", "content": "20 degrees"}, TURNS[3]]
    records = [{"messages": TURNS}, {"messages": messages}]

    with pytest.raises(DataError) as error:
        train(
            helpers.build_recipe(tmp_path, records, tokenizer={"chat_template": str(tmp_path / "deaf.jinja")})
        )

    assert "rows.jsonl:2: the chat template omits message 3 (role tool); fix: " in str(error.value)


def test_training_and_inference_use_the_same_template(tmp_path):
    """hiyouga/LLaMA-Factory#8720: trained with one template, served with another."""
    records = [{"messages": TURNS}] * 4
    settings = {"tokenizer": {"chat_template": "chatml"}, "train": {"max_steps": 1}}
    train(helpers.build_recipe(tmp_path, records, **settings))
    run = load_run(str(tmp_path / "run"), device="cpu")

    trained = SFTDataset([Chat(TURNS)], run.tokenizer)[0]["input_ids"]
    (asked,) = encode_prompts([Chat(TURNS[:3])], run.tokenizer, LabelOptions())
    plain = AutoTokenizer.from_pretrained(tmp_path / "run")
    theirs = plain.apply_chat_template(TURNS[:3], add_generation_prompt=True, return_dict=False)

    assert trained[: len(asked)] == asked == theirs
    assert trained[len(asked) :] == [*b"Bye", IM_END]


def test_no_system_prompt_is_added_to_a_conversation():
    """LLaMA-Factory's ``formatting: openai`` adds one."""
    tokenizer = chat_tokenizer()

    row = SFTDataset([Chat(TURNS[:2])], tokenizer)[0]

    assert shown(row, tokenizer) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo<|im_end|>⟧"


# --- start tokens, added tokens


@pytest.mark.parametrize("text", ["Q", "<s>Q"])
def test_a_start_token_occurs_once(text):
    """transformers#37686: the template writes one, and the tokenizer another."""
    tokenizer = sentencepiece_tokenizer(adds_bos=True)
    plain = SFTDataset([prompted(text, "A")], tokenizer)[0]
    tokenizer.chat_template = "{{ bos_token }}" + UNMARKED.replace("<|im_end|>", "</s>").replace(
        "<|im_start|>", ""
    )
    chat = SFTDataset([Chat([{"role": "user", "content": text}, TURNS[1]])], tokenizer)[0]

    assert [row["input_ids"].count(tokenizer.bos_token_id) for row in (plain, chat)] == [1, 1]
    assert [row["input_ids"][0] for row in (plain, chat)] == [1, 1]


def test_a_text_that_begins_with_a_start_token_is_rejected_with_the_row(tmp_path):
    """The same fault in the data, if control tokens are allowed in it."""
    model = save(tmp_path, tokenizer=sentencepiece_tokenizer(adds_bos=True), vocab_size=400)
    records = [*RECORDS, {"instruct": "<s>say", "input": "", "label": "x"}]

    with pytest.raises(DataError) as error:
        train(helpers.build_recipe(tmp_path, records, model=model, data={"special_tokens_in_text": "allow"}))

    assert "rows.jsonl:9: the labels are not certified" in str(error.value)
    assert "no row begins with two start tokens: expected one start token, got two" in str(error.value)


def test_added_tokens_are_saved_with_their_rows_and_load_without_resizing(tmp_path):
    """hiyouga/LLaMA-Factory#7997, huggingface/peft#1457, #2898: added tokens, no reload."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    model = save(tmp_path, tokenizer=tokenizer)  # 260 rows for 262 tokens

    train(helpers.build_recipe(tmp_path, RECORDS, model=model, train={"max_steps": 1, "learning_rate": 1e-9}))

    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    rows = reopened.get_input_embeddings().weight
    assert (reopened.config.vocab_size, len(rows)) == (262, 262)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").convert_tokens_to_ids("</think>") == 261
    assert torch.allclose(rows[260], rows[:260].mean(dim=0), atol=1e-5)


# --- the loss


def test_documents_of_a_packed_row_do_not_attend_to_each_other():
    """huggingface/trl#1230; LLaMA-Factory's packing without neat_packing: logits differ by 6.9."""
    register()
    model = tiny_model("llama")
    model.set_attn_implementation(NAME)
    packed = PackedDataset(SFTDataset([prompted("ask\n", "yes"), prompted("ask\n", "no")],
                                      byte_tokenizer()), max_length=32)  # fmt: skip
    batch, alone = (DataCollatorForPackedCausalLM()([row]) for row in (packed[0], packed.dataset[1]))
    for one in (batch, alone):
        one.pop("labels")

    together, single = (
        model(**batch, use_cache=False).logits[0, 8:],
        model(**alone, use_cache=False).logits[0],
    )

    assert len(packed) == 1
    assert torch.allclose(together, single, atol=1e-6)


def test_accumulation_does_not_change_the_loss(tmp_path):
    """transformers#37766, axolotl#3982: the mean of means of unequal micro-batches."""
    result = []
    for batch, steps in ((4, 1), (2, 2), (1, 4)):
        settings = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": steps,
            "max_steps": 2,
        }
        output = tmp_path / f"run-{batch}"
        train(helpers.build_recipe(tmp_path, RECORDS, train=settings | {"output_dir": str(output)}))
        result.append(read_losses(output))

    assert len(result[0]) == 2
    assert result[1] == pytest.approx(result[0], rel=1e-5)
    assert result[2] == pytest.approx(result[0], rel=1e-5)


def test_a_nan_loss_stops_the_run_and_is_never_shown_as_0(tmp_path, capsys):
    """huggingface/trl#6668, #6702: NaN is filtered from the log, which shows 0.0."""
    with pytest.raises(DivergedError) as error:
        train(helpers.build_recipe(tmp_path, RECORDS, train={"learning_rate": 1e30, "max_steps": 5}))

    assert str(error.value).startswith("step 3: the loss or its gradient is not finite")
    assert [round(loss, 1) for loss in read_losses(tmp_path / "run")] == [5.6, 5.5]
    assert "loss 0.0000" not in capsys.readouterr().out


# --- saving


def test_a_model_with_contradictory_generation_settings_is_saved(tmp_path):
    """transformers#29988: the run crashes in save_pretrained, after hours of training."""
    model = save(tmp_path)
    path = Path(model["name_or_path"], "generation_config.json")
    settings = json.loads(path.read_text()) | {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    path.write_text(json.dumps(settings))

    train(helpers.build_recipe(tmp_path, RECORDS, model=model, train={"max_steps": 1}))

    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_model_from_scratch_is_saved_with_its_cache_on(tmp_path):
    """Models trained from scratch with the Trainer generate without a cache, many times slower."""
    sizes = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
    model = {"name_or_path": None, "init": "scratch", "config": sizes}
    train(
        helpers.build_recipe(tmp_path, RECORDS, model=model, tokenizer={"train": {}}, train={"max_steps": 1})
    )

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")

    assert (saved.config.use_cache, saved.generation_config.use_cache) == (True, True)


# --- the recipe


def write_recipe(folder: Path, line: str) -> Path:
    write_jsonl(folder / "rows.jsonl", RECORDS)
    text = "stage: sft\nmodel: {name_or_path: m}\ndata: {train: rows.jsonl}\ntrain:\n  output_dir: run\n"
    (folder / "recipe.yaml").write_text(f"{text}  {line}\n")
    return folder / "recipe.yaml"


@pytest.mark.parametrize("number", ["2e-5", "2.0e-5", "2E-5", "0.00002"])
def test_a_learning_rate_in_any_notation_is_a_number(number, tmp_path):
    """hiyouga/LLaMA-Factory#4014: YAML 1.1 reads 2e-5 as text."""
    assert load_recipe(write_recipe(tmp_path, f"learning_rate: {number}")).train["learning_rate"] == 0.00002


def test_an_unknown_key_is_rejected_with_its_line_and_the_nearest_key(tmp_path):
    """TRL's command line ignores an unknown key: ``learning_rat: 3e-4`` trained at 2e-5."""
    with pytest.raises(RecipeError) as error:
        load_recipe(write_recipe(tmp_path, "learning_rat: 3e-4"))

    assert str(error.value).startswith(f"{tmp_path / 'recipe.yaml'}:6: ")
    assert "did you mean learning_rate?" in str(error.value).replace("'", "")
