"""Published batches, number for number, with the vocabularies that they were made with.

Two poems as the tensors of a course on Qwen2.5, and the beginning of an Alpaca record with GPT-2's ids. The
folders of the vocabularies are named by HF_CLM_QWEN25 and HF_CLM_GPT2. The published labels include that of
the first token, which the loss drops by its shift; here it is masked.
"""

import os
from typing import Any

import pytest
from helpers import X

from hf_clm.data.batch.collators import DataCollatorForCausalLM
from hf_clm.data.label.datasets import PretrainDataset, SFTDataset
from hf_clm.data.read.formats import to_example
from hf_clm.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.peer

END, PAD = 151643, 151665
NEZHA = {
    "instruct": "请你给哪吒写一首诗：",
    "input": "哪吒降世，意气飞扬。\n逆天改命，破障冲霄。",
    "label": "红绫缠腕，风火踏浪。\n不屈不悔，笑傲苍茫。",
}
AOBING = {
    "instruct": "请你给敖丙写一首诗：",
    "input": "碧海生龙子，云中舞雪霜。",
    "label": "恩仇难两忘，何处是家乡？",
}
# fmt: off
NEZHA_IDS = [
    112720, 89012, 99459, 122157, 61443, 108462, 100045, 5122, 99459, 122157, 99457, 99244, 3837,
    36589, 99180, 115449, 8997, 100531, 35727, 22418, 50509, 3837, 99577, 99884, 99907, 109564,
    1773, 99425, 120827, 103073, 103610, 3837, 99208, 79599, 100875, 99964, 8997, 16530, 102683,
    16530, 103020, 3837, 48738, 102744, 102635, 100619, 1773, END,
]
AOBING_IDS = [
    112720, 89012, 113735, 106980, 61443, 108462, 100045, 5122, 102461, 55135, 21287, 99465, 44729,
    3837, 99718, 15946, 100066, 100167, 105401, 1773, 100697, 100956, 99349, 77540, 99980, 3837,
    114216, 20412, 105686, 11319, END,
]
ALPACA_IDS = [
    21106, 318, 281, 12064, 326, 8477, 257, 4876, 13, 19430, 257, 2882, 326, 20431, 32543, 262,
    2581, 13, 198, 198, 21017, 46486, 25, 198,
]
# fmt: on


def vocabulary(variable: str) -> Any:
    """The tokenizer in the folder that an environment variable names, with a pad token of its own."""
    if not (folder := os.environ.get(variable)):
        pytest.skip(f"{variable} names no folder")
    return load_tokenizer(folder, pad_token="[PAD]")


@pytest.mark.parametrize(
    ("dataset", "masked"),
    [(PretrainDataset, (1, 1)), (SFTDataset, (27, 20))],
    ids=["pretraining", "sft"],
)
def test_the_two_published_poems_are_the_published_batch(dataset, masked):
    tokenizer = vocabulary("HF_CLM_QWEN25")
    poems = [to_example(record, format="instruct", render="plain") for record in (NEZHA, AOBING)]

    batch = DataCollatorForCausalLM(tokenizer.pad_token_id)(list(dataset(poems, tokenizer)))

    assert tokenizer.pad_token_id == PAD
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [NEZHA_IDS, AOBING_IDS + [PAD] * 17],
        "attention_mask": [[1] * 48, [1] * 31 + [0] * 17],
        "labels": [
            [X] * masked[0] + NEZHA_IDS[masked[0] :],
            [X] * masked[1] + AOBING_IDS[masked[1] :] + [X] * 17,
        ],
    }


def test_an_alpaca_record_without_an_input_begins_with_the_published_ids():
    tokenizer = vocabulary("HF_CLM_GPT2")
    record = {"instruction": "Name a fruit.", "input": "", "output": "An apple."}

    row = SFTDataset([to_example(record, format="alpaca", render="plain")], tokenizer)[0]

    assert tokenizer.pad_token_id == 50257
    assert row["input_ids"][:24] == ALPACA_IDS
