"""The datasets and collators with a stock transformers.Trainer, and the loss computed by hand."""

import math
from pathlib import Path

import pytest
import torch
from helpers import X, byte_tokenizer, prompted, save_folder, tiny_model
from transformers import Trainer, TrainingArguments

from hf_clm import (
    DataCollatorForCausalLM,
    DataCollatorForPackedCausalLM,
    PackedDataset,
    PretrainDataset,
    SFTDataset,
    load_model,
    load_tokenizer,
    to_example,
)

RECORDS = [
    {"instruct": "Count to three.", "input": "", "label": "1 2 3"},
    {"instruct": "Say it twice.", "input": "la", "label": "lala"},
    {"instruct": "Greet.", "input": "", "label": "Hello there, how are you?"},
    {"instruct": "Name a colour.", "input": "warm", "label": "red"},
]
EXAMPLES = [prompted(record["instruct"] + "\n", record["label"]) for record in RECORDS]


def stock_trainer(folder: Path, dataset, collator, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=tiny_model(), args=arguments, train_dataset=dataset, data_collator=collator)


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "llama"])
def test_the_loss_of_a_batch_is_the_cross_entropy_of_its_targets(kind):
    """Computes the loss by hand: logits t against labels t+1, over the target tokens of all rows."""
    dataset = SFTDataset(EXAMPLES, byte_tokenizer())
    batch = DataCollatorForCausalLM(pad_token_id=257)([dataset[0], dataset[2]])
    model = tiny_model(kind)

    nlls = []
    with torch.no_grad():
        loss = model(**batch).loss
        for number in (0, 2):  # each row alone, unpadded: padding must not count
            ids = torch.tensor(dataset[number]["input_ids"])
            logits = model(input_ids=ids[None]).logits[0]
            prompt = len(RECORDS[number]["instruct"]) + 1  # and its newline
            for position in range(prompt, len(ids)):
                nlls.append(torch.nn.functional.cross_entropy(logits[position - 1], ids[position]))

    assert len(nlls) == len("1 2 3") + len("Hello there, how are you?") + 2  # and two end tokens
    assert loss.item() == pytest.approx(torch.stack(nlls).mean().item(), rel=1e-5)


def test_a_stock_trainer_trains_on_an_sft_dataset_with_the_expected_first_loss(tmp_path):
    dataset = SFTDataset(EXAMPLES[:2], byte_tokenizer())
    collator = DataCollatorForCausalLM(pad_token_id=257)
    batch = collator([dataset[0], dataset[1]])
    with torch.no_grad():
        logits = tiny_model()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=X).item()

    first, second, third = losses(stock_trainer(tmp_path, dataset, collator))

    assert first == pytest.approx(expected, rel=1e-4)
    assert third < second < first < 1.2 * math.log(260)


def test_a_stock_trainer_has_equal_losses_with_packed_rows(tmp_path):
    """A packed row contains both rows of the batch: the losses are equal if documents are isolated."""
    dataset = SFTDataset(EXAMPLES[:2], byte_tokenizer())
    packed = PackedDataset(dataset, max_length=64)
    options = {"remove_unused_columns": False}  # else the Trainer drops cu_seq_lens_*

    padded_losses = losses(stock_trainer(tmp_path, dataset, DataCollatorForCausalLM(257), **options))
    packed_losses = losses(stock_trainer(tmp_path, packed, DataCollatorForPackedCausalLM(), **options))

    assert len(packed) == 1
    assert packed_losses == pytest.approx(padded_losses, rel=1e-3)


def test_a_stock_trainer_counts_targets_like_labels(tmp_path):
    """The rows have 6, 5, 26 and 4 targets, so the two micro-batches of a step never have equal weight."""
    dataset = SFTDataset(EXAMPLES, byte_tokenizer())
    options = {"remove_unused_columns": False, "gradient_accumulation_steps": 2}

    by_labels = losses(stock_trainer(tmp_path, dataset, DataCollatorForPackedCausalLM(), **options))
    targets = DataCollatorForPackedCausalLM(with_targets=True)
    by_targets = losses(stock_trainer(tmp_path, dataset, targets, **options))

    assert by_targets == pytest.approx(by_labels, rel=1e-5)


def test_a_stock_trainer_trains_on_a_packed_pretrain_dataset(tmp_path):
    stream = PackedDataset(PretrainDataset(EXAMPLES, byte_tokenizer()), max_length=16, packing="stream")

    first, _, third = losses(stock_trainer(tmp_path, stream, DataCollatorForPackedCausalLM()))

    assert third < first


def test_the_example_of_the_documentation_runs(tmp_path):
    folder = save_folder(tmp_path, tiny_model(), byte_tokenizer(pad=None))

    tokenizer = load_tokenizer(folder, pad_token="[PAD]")
    examples = [to_example(record, format="instruct") for record in RECORDS]
    dataset = SFTDataset(examples, tokenizer, max_length=1024)
    batch = DataCollatorForCausalLM(pad_token_id=tokenizer.pad_token_id)([dataset[0], dataset[1]])

    assert dataset[0] == {
        "input_ids": [*b"Count to three.1 2 3", 256],
        "labels": [X] * 15 + [*b"1 2 3", 256],
    }
    assert batch["input_ids"].tolist() == [
        [*b"Count to three.1 2 3", 256],
        [*b"Say it twice.lalala", 256, 260],
    ]
    assert load_model(folder, tokenizer)(**batch).loss.item() == pytest.approx(math.log(261), rel=0.1)
