"""Helpers for many tests: a tokenizer with readable ids, tiny models, recipes."""

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_clm.recipe.recipe import Recipe
from hf_clm.schema import Document, Segment, Tokens

X = -100  # no label
CONTROL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
EOS, PAD, IM_START, IM_END = 256, 257, 258, 259

SIZES = {
    "gpt2": {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "qwen2": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
    },
    "mixtral": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_local_experts": 4,
    },
    "llama": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
    },
}


def byte_tokenizer(
    *,
    pad: str | None = "<|pad|>",
    eos: str | None = "<|endoftext|>",
    merges: Sequence[tuple[str, str]] = (),
) -> PreTrainedTokenizerFast:
    """Returns a tokenizer in which each byte is its id: ``"A"`` is 65. Ids 256 to 259 are ``CONTROL``.

    Merged pairs have ids from 260; they are spelled with Ċ for a newline and Ġ for a space.
    """
    letters = [*_byte_letters(), *CONTROL, *(left + right for left, right in merges)]
    vocab = {letter: number for number, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(CONTROL)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=pad)


def sentencepiece_tokenizer(
    *, prepend: str = "first", adds_bos: bool = False, merged: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Returns a Unigram tokenizer of letters with byte fallback, which prepends a space (▁) like Llama's.

    Args:
        prepend: the scheme of Metaspace, ``first`` or ``always``; ``normalizer`` prepends like Llama 2.
        merged: pieces of more than one letter.
    """
    letters = ["▁", *(chr(code) for code in range(33, 127)), *merged]
    pieces = [(token, 0.0) for token in ("<unk>", "<s>", "</s>", "<|pad|>")]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)] + [(letter, -2.0) for letter in letters]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    if prepend == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def tiny_model(
    kind: str = "qwen2", *, vocab_size: int = 260, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """Returns a model with a few thousand random parameters and without dropout."""
    torch.manual_seed(seed)
    sizes = {**SIZES[kind], "vocab_size": vocab_size, "bos_token_id": EOS, "eos_token_id": EOS, **settings}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()


def save_folder(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    """Writes a model folder with ``save_pretrained``."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_jsonl(path: Path, records: list[Any]) -> str:
    """Writes one JSON object per line."""
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return str(path)


def document(text: str) -> Document:
    """Returns a text that is learned completely."""
    return Document([Segment(text, 1.0)])


def prompted(prompt: str, completion: str) -> Document:
    """Returns a prompt and a completion that is learned."""
    return Document([Segment(prompt, 0.0), Segment(completion, 1.0)])


def build_recipe(folder: Path, records: list[Any], **changes: Any) -> Recipe:
    """Returns the recipe of a run on the records, with 2 rows per step and a tiny model.

    ``changes`` update sections. The round trip is off, as its process takes a few seconds.
    """
    model = changes.get("model", {}).get("name_or_path")
    sections: dict[str, Any] = {
        "stage": "sft",
        "model": {"name_or_path": model or save_folder(folder / "model", tiny_model(), byte_tokenizer())},
        "data": {
            "train": [write_jsonl(folder / "rows.jsonl", records)],
            "max_length": 64,
            "packing": "none",
            "cache_dir": None,  # a test of a broken part must not use a set from the cache
        },
        "doctor": {"round_trip": "off"},
        "train": {
            "output_dir": str(folder / "run"),
            "use_cpu": True,
            "bf16": False,  # for the same numbers on every machine
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
        },
    }
    for name, change in changes.items():
        sections[name] = {**sections.get(name, {}), **change} if isinstance(change, dict) else change
    return Recipe.model_validate(sections)


def read_split(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None = None, *, proves: bool = True
) -> Any:
    """Returns the training split of a recipe, prepared in a temporary folder; certified if ``proves``."""
    from hf_clm.data.prepared.cache import read_splits  # in here: most tests need none of it
    from hf_clm.data.proof.certificate import Certificate

    with nullcontext() if proves else patch.object(Certificate, "require"):
        return read_splits(recipe, tokenizer or byte_tokenizer(), seed=0)["train"]


def count_letters(answers: list[str], targets: list[str]) -> float:
    """A metric of answers: their total length."""
    return float(sum(map(len, answers)))


def split_of(
    folder: Path, examples: Sequence[Any], recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None = None
) -> Any:
    """Returns the training split of examples, written as records to ``folder``, without certification."""
    from hf_clm.recipe.recipe import Source

    path = write_jsonl(folder / "examples.jsonl", list(map(to_record, examples)))
    data = recipe.data.model_copy(update={"train": [Source(path=path)], "eval": [], "cache_dir": None})
    return read_split(recipe.model_copy(update={"data": data}), tokenizer, proves=False)


def to_record(example: Any) -> dict[str, Any]:
    """Returns a record that is read as this example."""
    if isinstance(example, Document):
        segments = [{"text": part.text, "train": part.weight > 0} for part in example.segments]
        return {"segments": segments}
    if isinstance(example, Tokens):
        return {"input_ids": example.input_ids, "labels": example.labels}
    return {"messages": example.messages}


def prove_records(
    folder: Path, records: list[Any], *, evaluation: list[Any] | None = None, **data: Any
) -> Any:
    """Returns the ProofReport of SFT records, evaluated on others; ``data``: more options of the section."""
    from hf_clm.data.prepared.prepare import write_prepared
    from hf_clm.data.prepared.store import read_index
    from hf_clm.data.proof.proof import ProofReport
    from hf_clm.recipe.recipe import Recipe  # in here: most tests need none of it

    folder.mkdir(exist_ok=True)
    content = {"train": [write_jsonl(folder / "a.jsonl", records)], "max_length": 32} | data
    if evaluation:
        content["eval"] = [write_jsonl(folder / "b.jsonl", evaluation)]
    sections = {"stage": "sft", "model": {"name_or_path": "m"}, "train": {"output_dir": "run"}}
    recipe = Recipe.model_validate({**sections, "data": content})
    place = Path(mkdtemp(dir=folder)) / "prepared"
    write_prepared(place, recipe, byte_tokenizer(), seed=0)
    index = read_index(place)
    assert index is not None
    return ProofReport(index["proof"]["facts"], index["proof"]["lines"])


def _byte_letters() -> list[str]:
    """Returns the character of each byte in byte-level BPE (GPT-2's table keeps printable bytes)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def shown(row: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    """A row as text: what has a label stands in ⟦ ⟧, and an added token that is only spelled in ` `."""
    added = {number: token for token, number in tokenizer.get_added_vocab().items()}
    spelled = re.compile("|".join(map(re.escape, sorted(added.values(), key=len, reverse=True))) or "(?!)")
    places = list(zip(row["input_ids"], row["labels"], strict=True))
    assert all(label in (X, token) for token, label in places)
    text = ""
    for is_learned, run in groupby(places, key=lambda place: place[1] != X):
        part = ""
        for token, group in groupby((token for token, _ in run), key=lambda token: added.get(token)):
            ids = list(group)
            letters = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            part += token * len(ids) if token else spelled.sub(r"`\g<0>`", letters)
        text += f"⟦{part}⟧" if is_learned else part
    return text
