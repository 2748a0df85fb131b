"""The data and models of the comparisons: rows of token ids, and the same weights for every arm."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

MAX_LENGTH = 512  # tokens of a row
MEDIAN_TOKENS, SPREAD = (
    120,
    0.8,
)  # of the log-normal lengths; a batch of 8 random rows is half padding
TARGET_SHARE = 0.65  # of an SFT row's tokens
PAD, EOS, FIRST = 0, 1, 2  # FIRST: the lowest id of an ordinary token
IGNORE = -100
LORA = {"r": 16, "lora_alpha": 32}

Rows = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Case:
    """Rows and a model. ``kind``: sft | pretrain; ``model``: qwen2 | gpt2, with random weights.

    Or a pretrained model in ``folder`` with the rows in ``rows_file``, of which the first ``rows`` are read.
    """

    name: str
    title: str
    kind: str
    model: str
    vocab: int
    rows: int = 800
    width: int = 256
    layers: int = 4
    spread: float = 0.02  # of the random weights
    steps: int = 3  # a measured window has a multiple of it
    threads: tuple[int, ...] = (2, 1)  # in the windows of a run
    held_out: int = 24  # rows for the loss after an epoch
    learning_rate: float = 1e-3
    folder: str = ""
    rows_file: str = ""
    lora: bool = False

    def narrow(self) -> "Case":
        """Returns a smaller case for correctness checks, with large weights, so that attention leaks show."""
        if self.folder:
            return replace(self, rows=3 * self.held_out)
        return replace(self.tiny(), rows=48 if self.vocab > 8192 else 120, spread=0.1)

    def tiny(self) -> "Case":
        """Returns a tiny case for trying out. The vocabulary stays large, so that the loss uses chunks."""
        if self.folder:
            return replace(self, rows=100, steps=1, held_out=2)
        vocab = self.vocab if self.vocab > 8192 else 2048
        title = f"{self.title}, made tiny"
        return replace(self, title=title, width=64, layers=2, vocab=vocab, rows=200)


CASES = {
    case.name: case
    for case in (
        Case("sft-8k", "SFT, Qwen2 4x256, vocabulary 8,192", "sft", "qwen2", 8192),
        Case("sft-152k", "SFT, Qwen2 4x256, vocabulary 151,936", "sft", "qwen2", 151_936, steps=2),
        Case("sft-gpt2", "SFT, GPT-2 4x256, vocabulary 8,192", "sft", "gpt2", 8192),
        Case(
            "pretrain-8k",
            "Pretraining, rows of 512, Qwen2 4x256, vocabulary 8,192",
            "pretrain",
            "qwen2",
            8192,
        ),
        Case(
            "pretrain-gpt2",
            "Pretraining, rows of 512, GPT-2 4x256, vocabulary 8,192",
            "pretrain",
            "gpt2",
            8192,
        ),
    )
}


def build_rows(case: Case, *, seed: int = 0) -> Rows:
    """Returns rows of ``input_ids`` and ``labels``. The last token is a labelled EOS, the first has no label.

    Half of the tokens follow from the one before, half are drawn by Zipf's law: the loss can fall.
    """
    if case.rows_file:
        return json.loads(Path(case.rows_file).read_text("utf-8"))[: case.rows]
    draw = np.random.default_rng(seed)
    lengths = np.full(case.rows, MAX_LENGTH)
    if case.kind == "sft":
        drawn = draw.lognormal(np.log(MEDIAN_TOKENS), SPREAD, case.rows)
        lengths = np.clip(drawn, 8, MAX_LENGTH).astype(int)
    return list(_rows(case, lengths.tolist(), draw))


def _rows(case: Case, lengths: list[int], draw: np.random.Generator) -> Iterator[dict[str, list[int]]]:
    ids = case.vocab - FIRST
    shares = np.cumsum(1 / np.arange(1, ids + 1))
    drawn = np.searchsorted(shares / shares[-1], draw.random(sum(lengths)))
    follows = draw.random(sum(lengths)) < 0.5
    at = 0
    for length in lengths:
        tokens = drawn[at : at + length].tolist()
        for place in np.flatnonzero(follows[at + 1 : at + length]).tolist():
            tokens[place + 1] = (tokens[place] * 7 + 3) % 1000
        at += length
        input_ids = [token + FIRST for token in tokens[:-1]] + [EOS]
        prompt = max(1, round(length * (1 - TARGET_SHARE))) if case.kind == "sft" else 1
        yield {"input_ids": input_ids, "labels": [IGNORE] * prompt + input_ids[prompt:]}


def load_tokenizer(case: Case, *, vocab: int = FIRST + 1) -> Any:
    """Returns the tokenizer of a case, with ``vocab`` words if the model is not pretrained."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(case.folder) if case.folder else build_tokenizer(vocab)


def load_model(case: Case, *, is_bf16: bool = False) -> Any:
    """Returns the model of a case, like a user of transformers and peft; a frozen one may be in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    if not case.folder:
        return AutoModelForCausalLM.from_config(build_config(case))
    dtype = torch.bfloat16 if case.lora and is_bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=dtype)
    if not case.lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **LORA))


def build_tokenizer(vocab: int = FIRST + 1) -> Any:
    """Returns a tokenizer with a word for each id, which is never used, as the rows are token ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": FIRST}
    words |= {f"w{token}": token for token in range(FIRST + 1, vocab)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def build_config(case: Case) -> Any:
    """Returns a config with heads of size 64, no dropout, and tied embeddings; or the pretrained model's."""
    from transformers import AutoConfig

    if case.folder:
        return AutoConfig.from_pretrained(case.folder)
    heads = case.width // 64
    ids: dict[str, Any] = {
        "vocab_size": case.vocab,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    ids["initializer_range"] = case.spread
    if case.model == "gpt2":
        sizes = {"n_embd": case.width, "n_layer": case.layers, "n_head": heads, "n_positions": MAX_LENGTH}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return AutoConfig.for_model("gpt2", **sizes, **dropout, **ids)
    return AutoConfig.for_model(
        "qwen2",
        hidden_size=case.width,
        intermediate_size=4 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        **ids,
    )
