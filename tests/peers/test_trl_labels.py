"""Our ids and labels against those of TRL: of its SFTTrainer, and of the marks in its training templates.

TRL (1.16) appends the end token's text to a completion that does not end in it, tokenizes the prompt alone,
and prompt and completion as one string, and learns what comes after their common prefix. Where the one string
has a border between the two, that is what SFTDataset gives. What differs, and is tested here as a difference:

- no such border (a merge; two newlines before a letter, to GPT-2's pattern): TRL takes the prompt's last
  token for completion and warns; here the two are tokenized apart;
- an empty prompt: TRL gives the first token a label, which the loss drops by its shift; here it is masked;
- an end token in the text: a control token to TRL, its letters here.

Of a chat TRL learns what its own copies of public templates, ``*_training.jinja``, mark as the assistant's
(``assistant_only_loss``). No copy leaves out the token that generation stops at, or masks an earlier turn.
But most mark more than the model writes: see ``MARKED_PAST_THE_END`` and ``MARKED_OTHERWISE``.
"""

from typing import Any

import pytest
from datasets import Dataset
from helpers import EOS, X, byte_tokenizer, prompted, shown, tiny_model
from peers.test_templates import TEMPLATES, tokenizer_for

from hf_clm.data.label.datasets import SFTDataset
from hf_clm.schema import Chat, Message
from hf_clm.text.chat import stop_token_ids
from hf_clm.text.train_tokenizer import train_bpe

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.peer

ROWS = [
    ("Say hi.\n", "Hi!"),
    ("Translate to German:\nthe snow\n", "der Schnee"),
    ("Question: 2+2?\nAnswer:", " 4"),
    ("写一首诗：", "雪落无声，\n灯下有人。"),
    ("a\n", "indented\n\n  text  \n"),
    ("def f(x):\n", "\treturn x\n"),
    ("🦆:", "🦆🦆"),
]


def rows_of_trl(rows, tokenizer, folder) -> list[dict]:
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    dataset = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])
    model = tiny_model(vocab_size=len(tokenizer))
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    return [{key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset]


def rows_of_ours(rows, tokenizer) -> list[dict]:
    dataset = SFTDataset([prompted(prompt, completion) for prompt, completion in rows], tokenizer)
    assert len(dataset) == len(rows)
    return [dict(dataset[number]) for number in range(len(rows))]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_labels_are_those_of_trl_where_its_one_string_has_the_border(kind, tmp_path):
    texts = [prompt for prompt, _ in ROWS] + [completion for _, completion in ROWS]
    tokenizer = byte_tokenizer() if kind == "bytes" else train_bpe(texts, vocab_size=400, min_frequency=1)

    ours = rows_of_ours(ROWS, tokenizer)

    assert ours == rows_of_trl(ROWS, tokenizer, tmp_path)
    assert [row["labels"][-1] for row in ours] == [tokenizer.eos_token_id] * len(ROWS)


def test_labels_differ_where_the_docstring_says_so(tmp_path):
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")])
    rows = [("Q\n", "\nA"), ("", "Yo"), ("Q", "A<|endoftext|>"), ("Q", "<|endoftext|>A")]

    theirs, ours = rows_of_trl(rows, tokenizer, tmp_path), rows_of_ours(rows, tokenizer)

    assert theirs == [
        {"input_ids": [81, 260, 65, EOS], "labels": [X, 260, 65, EOS]},
        {"input_ids": [89, 111, EOS], "labels": [89, 111, EOS]},
        {"input_ids": [81, 65, EOS], "labels": [X, 65, EOS]},
        {"input_ids": [81, EOS, 65, EOS], "labels": [X, EOS, 65, EOS]},
    ]
    assert ours == [
        {"input_ids": [81, 10, 10, 65, EOS], "labels": [X, X, 10, 65, EOS]},
        {"input_ids": [89, 111, EOS], "labels": [X, 111, EOS]},
        {"input_ids": [81, 65, EOS], "labels": [X, 65, EOS]},
        {"input_ids": [81, *b"<|endoftext|>", 65, EOS], "labels": [X, *b"<|endoftext|>", 65, EOS]},
    ]


# --- chats in TRL's training templates

ONE_TURN: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
TWO_TURNS: list[Message] = [
    *ONE_TURN,
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye"},
]
MARKED_AS_HERE = {"cohere", "cohere2", "glm4moe", "llama3", "llava_next"}
# TRL also learns the newline after the stop token, where generation has ended.
MARKED_PAST_THE_END = {
    *("diffusion_gemma", "gemma", "gemma3", "idefics3", "lfm2", "lfm2_v2", "qwen2_5_vl", "qwen3"),
    *("qwen3_instruct_2507", "qwen3_vl", "smolvlm"),
}
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
# What TRL learns of one turn, and what is learned here.
MARKED_OTHERWISE = {
    # A second end, which only the end of a chat has.
    "phi3": ("Yo<|end|>\n<|endoftext|>", "Yo<|end|>"),
    "phi3_5": ("Yo<|end|>\n<|endoftext|>", "Yo<|end|>"),
    # The opening of the turn, which the generation prompt holds.
    "gptoss": (
        "<|start|>assistant<|channel|>final<|message|>Yo<|return|>",
        "<|channel|>final<|message|>Yo<|return|>",
    ),
    "muse_glimmer": ("<|start|>assistant to=user<|message|>Yo<|eot|>", " to=user<|message|>Yo<|eot|>"),
    "qwen2_5": ("\nYo<|im_end|>\n", "Yo<|im_end|>"),
    # The block of reasoning that the generation prompt opens,
    **dict.fromkeys(
        ("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"),
        ("<think></think>Yo<|im_end|>\n", "</think>Yo<|im_end|>"),
    ),
    **dict.fromkeys(
        ("qwen3_5_think", "qwen3_6", "qwen3_8"),
        (EMPTY_THOUGHT + "Yo<|im_end|>\n", "\n</think>\n\nYo<|im_end|>"),
    ),
    # or has closed already,
    "qwen3_5_nothink": (EMPTY_THOUGHT + "Yo<|im_end|>\n", "Yo<|im_end|>"),
    # or that TRL trains without, so that the model is asked otherwise than it was taught.
    **dict.fromkeys(
        ("deepseek_r1_distill", "deepseekv3"),
        ("<｜Assistant｜>Yo<｜end▁of▁sentence｜>", "\n</think>\n\nYo<｜end▁of▁sentence｜>"),
    ),
}
TRAINING = {
    path.stem.removesuffix("_training"): path for path in TEMPLATES if path.stem.endswith("_training")
}


def learned_parts(row: Any, tokenizer: Any) -> list[str]:
    """The learned parts of a row as text."""
    return [part.partition("⟧")[0] for part in shown(row, tokenizer).split("⟦")[1:]]


def rows_of_template(name: str, messages: list[Message]) -> tuple[Any, Any, Any]:
    """The row of TRL's marks, our rows, and the tokenizer."""
    tokenizer = tokenizer_for(TRAINING[name].read_text(encoding="utf-8"))
    has_parts = name in ("idefics3", "llava_next", "smolvlm")
    given: Any = [
        {**message, "content": [{"type": "text", "text": message.get("content")}]} if has_parts else message
        for message in messages
    ]
    marked = tokenizer.apply_chat_template(given, return_assistant_tokens_mask=True, return_dict=True)
    pairs = zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    row = {
        "input_ids": marked["input_ids"],
        "labels": [token if is_marked else X for token, is_marked in pairs],
    }
    return row, list(SFTDataset([Chat(messages)], tokenizer)), tokenizer


def test_every_training_template_of_trl_is_in_one_of_the_lists():
    assert TRAINING.keys() <= MARKED_AS_HERE | MARKED_PAST_THE_END | MARKED_OTHERWISE.keys()


@pytest.mark.parametrize("messages", [ONE_TURN, TWO_TURNS], ids=["one turn", "two turns"])
def test_labels_of_a_chat_are_those_that_trl_marks_up_to_the_stop_token(messages):
    offenders = []
    for name in sorted(TRAINING.keys() & (MARKED_AS_HERE | MARKED_PAST_THE_END)):
        theirs, ours, tokenizer = rows_of_template(name, messages)
        if name in MARKED_PAST_THE_END:
            assert all(part.endswith(">\n") for part in learned_parts(theirs, tokenizer)), name
            stops = stop_token_ids(tokenizer)
            pairs = zip(theirs["labels"], [X, *theirs["labels"]], strict=False)
            theirs["labels"] = [X if label == 10 and before in stops else label for label, before in pairs]
        length = len(ours[0]["labels"])
        rest = theirs["labels"][length:]  # a newline that no model writes
        cut = {key: values[:length] for key, values in theirs.items()}
        if ours != [cut] or set(rest) - {X}:
            offenders.append(
                (name, learned_parts(theirs, tokenizer), [learned_parts(r, tokenizer) for r in ours])
            )

    assert offenders == []


def test_trl_marks_other_tokens_where_the_list_says_so():
    found = {}
    for name in TRAINING.keys() & MARKED_OTHERWISE.keys():
        theirs, ours, tokenizer = rows_of_template(name, ONE_TURN)
        found[name] = (*learned_parts(theirs, tokenizer), *learned_parts(ours[0], tokenizer))

    assert found == {name: MARKED_OTHERWISE[name] for name in found}
