"""Our ids and labels against those of TRL's SFTTrainer, for prompts and completions without a template.

TRL (1.16) appends the end token's text to a completion that does not end in it, tokenizes the prompt alone,
and prompt and completion as one string, and learns what comes after their common prefix. Where the one string
has a border between the two, that is what SFTDataset gives. What differs, and is tested here as a difference:

- no such border (a merge; two newlines before a letter, to GPT-2's pattern): TRL takes the prompt's last
  token for completion and warns; here the two are tokenized apart;
- an empty prompt: TRL gives the first token a label, which the loss drops by its shift; here it is masked;
- an end token in the text: a control token to TRL, its letters here.
"""

import pytest
from datasets import Dataset
from helpers import EOS, X, byte_tokenizer, prompted, tiny_model

from hf_clm.data.label.datasets import SFTDataset
from hf_clm.train_tokenizer import train_bpe

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
