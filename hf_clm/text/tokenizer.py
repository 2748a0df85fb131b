"""Loads tokenizers and makes sure of an end token, a separate pad token and, if asked, a chat template."""

import datetime
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_clm.errors import ModelError, did_you_mean
from hf_clm.gguf import local_model
from hf_clm.hub import load_options, loading
from hf_clm.schema import Json
from hf_clm.text.sentencepiece_file import load_sentencepiece

# A function that transformers passes to templates. Llama 3.1's template prints today's date with it.
DATE = re.compile(r"""strftime_now\(\s*["']([^"']+)["']""")
DATE_FIXED = "{%- macro strftime_now(format) -%}"
UNKNOWN = "<|unk|>"  # the unknown token of a character tokenizer
SHIPPED_TEMPLATES = Path(__file__).parent / "templates"
# A turn must end in a single token, or generation cannot stop at it.
TEMPLATE_TOKENS = {"chatml": ["<|im_start|>", "<|im_end|>"]}


def load_tokenizer(
    name_or_path: str,
    *,
    pad_token: str = "<|pad|>",
    eos_token: str | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerFast:
    """Loads a fast tokenizer whose pad token differs from its end token.

    Args:
        name_or_path: a folder, a repository on the Hub, or a SentencePiece (``.model``) or GGUF file.
        pad_token: used only if the tokenizer has no pad token or one that equals its end token.
        eos_token: replaces the end token.
        chat_template: a built-in name (``chatml``, ``plain``) or a ``.jinja`` file; None keeps the
            tokenizer's template.

    Raises ModelError if the tokenizer does not exist, is not a fast tokenizer, or has no end token.
    """
    name_or_path = local_model(os.path.expanduser(name_or_path))
    if name_or_path.endswith(".model") and Path(name_or_path).is_file():
        tokenizer = load_sentencepiece(name_or_path)
    else:
        options = load_options(name_or_path, revision=revision, where="tokenizer.name_or_path")
        with loading(name_or_path, where="tokenizer"):
            options |= {"trust_remote_code": trust_remote_code}
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        got = type(tokenizer).__name__
        raise ModelError("not a fast tokenizer (tokenizer.json)", where="tokenizer", got=got)
    if eos_token is not None:
        tokenizer.add_special_tokens({"eos_token": eos_token})
    if tokenizer.eos_token is None:
        raise ModelError("has no end token", where=f"tokenizer {name_or_path}", fix="set tokenizer.eos_token")
    add_pad_token(tokenizer, pad_token)
    if chat_template is not None:
        use_chat_template(tokenizer, chat_template)
    tokenizer.padding_side = "right"
    return tokenizer


def add_pad_token(tokenizer: PreTrainedTokenizerFast, pad_token: str) -> None:
    """Adds ``pad_token`` if the tokenizer has no pad token or one that equals its end token.

    Collators that mask padding by id would otherwise mask the end token too, and the model would never learn
    to stop.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    if pad_token == tokenizer.eos_token:
        got = repr(pad_token)
        raise ModelError("equals the end token", where="tokenizer.pad_token", got=got, fix="name another")
    tokenizer.add_special_tokens({"pad_token": pad_token})


def add_control_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Iterable[str]) -> None:
    """Adds the ``tokens`` that are not control tokens yet. User text is never encoded to their ids."""
    existing = set(control_tokens(tokenizer))
    missing = [token for token in tokens if token not in existing]
    tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)


def use_chat_template(tokenizer: PreTrainedTokenizerFast, name_or_file: str) -> None:
    """Sets the chat template (see ``load_chat_template``) and adds the tokens that a built-in one needs."""
    tokenizer.chat_template = load_chat_template(name_or_file)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in TEMPLATE_TOKENS.get(name_or_file, []) if token not in vocabulary]
    tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)


def set_template_defaults(tokenizer: PreTrainedTokenizerFast, values: Mapping[str, Json]) -> None:
    """Sets defaults for variables of the chat template, which are saved with the template.

    Prompts rendered with transformers alone are then the same as in training.
    Raises ModelError for a variable that the template does not use.
    """
    if not values:
        return
    template: Any = tokenizer.chat_template
    if not template:
        fix = "remove it, or set tokenizer.chat_template"
        raise ModelError("has no chat template", where="tokenizer.chat_template_kwargs", fix=fix)
    named = template if isinstance(template, dict) else {"default": template}
    if what := unread_variable(values, " ".join(named.values())):
        raise ModelError(what, where="tokenizer.chat_template_kwargs")
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_to_jinja(value)} %}}{{%- endif %}}"
        for name, value in values.items()
    ]
    updated = {key: "".join(lines) + text for key, text in named.items()}
    tokenizer.chat_template = updated if isinstance(template, dict) else updated["default"]


def fix_date(tokenizer: PreTrainedTokenizerFast, date: str) -> None:
    """Makes the chat template print this date ("2026-07-26") instead of today's; saved with the template.

    Prompts are then the same in training, after a resume and at inference. A template that prints no date is
    left unchanged.
    """
    day = datetime.date.fromisoformat(date)
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: _with_date(text, day) for name, text in template.items()}
    elif template:
        tokenizer.chat_template = _with_date(template, day)


def prints_date(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the chat template prints today's date."""
    template: Any = tokenizer.chat_template
    named = template.values() if isinstance(template, dict) else [template or ""]
    return any(DATE.search(text) and DATE_FIXED not in text for text in named)


def _with_date(template: str, day: datetime.date) -> str:
    """Prepends a macro that replaces transformers' function for the date formats that the template uses."""
    formats = sorted(set(DATE.findall(template)))
    if not formats or DATE_FIXED in template:
        return template
    cases = [f"{{%- if format == {json.dumps(one)} -%}}{day.strftime(one)}{{%- endif -%}}" for one in formats]
    return f"{DATE_FIXED}{''.join(cases)}{{%- endmacro -%}}{template}"


def unread_variable(names: Iterable[str], template: str) -> str:
    """Returns a message about the first variable that a template does not use, or "" if it uses them all."""
    name = next((name for name in names if not re.search(rf"\b{re.escape(name)}\b", template)), None)
    if name is None:
        return ""
    words = sorted(set(re.findall(r"\b[a-z_]{4,}\b", template)))
    return f"the chat template does not use {name!r}{did_you_mean(name, words)}"


def _to_jinja(value: Json) -> str:
    """Writes a JSON value as a Jinja literal."""
    if isinstance(value, list):
        return f"[{', '.join(map(_to_jinja, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_to_jinja(key)}: {_to_jinja(item)}" for key, item in value.items()) + "}"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def load_chat_template(name_or_file: str) -> str:
    """Returns the Jinja source of a built-in template (``chatml``, ``plain``) or of a file.

    Raises ModelError if neither exists.
    """
    shipped = sorted(path.stem for path in SHIPPED_TEMPLATES.glob("*.jinja"))
    file = SHIPPED_TEMPLATES / f"{name_or_file}.jinja" if name_or_file in shipped else name_or_file
    path = Path(file).expanduser()
    if not path.is_file():
        got = repr(name_or_file)
        fix = f"use one of {', '.join(shipped)}, or a .jinja file{did_you_mean(name_or_file, shipped)}"
        raise ModelError("no such chat template", where="tokenizer.chat_template", got=got, fix=fix)
    return path.read_text(encoding="utf-8")


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Returns every added or special token, longest first: tokens that user text must not be encoded to.

    Tokens of whitespace only are left out: GPT-NeoX and Phi encode ordinary indentation with them.
    """
    tokens = [token for token in tokenizer.get_added_vocab() if token.strip()]
    return sorted(tokens, key=lambda token: (-len(token), token))


def control_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Returns a regular expression that matches any control token of the tokenizer."""
    return _control_pattern(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _control_pattern(tokenizer: PreTrainedTokenizerFast, size: int) -> re.Pattern[str]:
    """Cached by ``size``, which changes when tokens are added; the pattern is needed for every text."""
    return re.compile(alternatives(control_tokens(tokenizer)))


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Returns the ``control_tokens`` that the vocabulary marks as special.

    The others, such as ``<think>`` and ``<tool_call>``, are written by the model as part of its answer.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    return [token for token in control_tokens(tokenizer) if token in special]


def alternatives(words: Iterable[str]) -> str:
    """Returns a regular expression that matches the longest of the words; without words it never matches.

    It is built as a trie, so words share their common prefixes: with thousands of words, a plain ``a|b|c``
    would try each of them at every ``<`` of a text.
    """
    trie: dict[str, Any] = {}
    for word in words:
        node = trie
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _branches(trie) if trie else r"(?!)"


def _branches(node: dict[str, Any]) -> str:
    branches = [re.escape(letter) + _branches(rest) for letter, rest in sorted(node.items()) if letter]
    if not branches:
        return ""
    pattern = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
    return f"{pattern}?" if "" in node else pattern


def max_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Returns the largest id of the tokenizer. It differs from ``len - 1`` if the ids have gaps."""
    return _max_token_id(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _max_token_id(tokenizer: PreTrainedTokenizerFast, size: int) -> int:
    """Cached by ``size``: it takes 0.1 s for 150,000 tokens and is needed often."""
    return max(tokenizer.get_vocab().values())


def unknown_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Returns the id of the unknown token of a character tokenizer; None for other tokenizers.

    Other tokenizers may legitimately encode rare characters as unknown; ``hf-clm doctor`` reports how many.
    """
    is_of_characters = tokenizer.unk_token == UNKNOWN
    return tokenizer.backend_tokenizer.token_to_id(UNKNOWN) if is_of_characters else None


def find_unknown(text: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Returns the first part of ``text`` that the tokenizer has no token for, or None."""
    unknown = unknown_id(tokenizer)
    if unknown is None:
        return None
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    parts = (text[slice(*encoding.offsets[at])] for at, id in enumerate(encoding.ids) if id == unknown)
    return next((part for part in parts if part != tokenizer.unk_token), None)


def unique_ids(ids: Iterable[int | None]) -> list[int]:
    """Returns the ids in order, without duplicates and None."""
    return list(dict.fromkeys(i for i in ids if i is not None))


def bos_token(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Returns the start token if the tokenizer adds it to every text (Llama does; GPT-2 and Qwen do not)."""
    token: Any = tokenizer.bos_token
    return _bos_token(tokenizer, token)


@lru_cache(maxsize=4)
def _bos_token(tokenizer: PreTrainedTokenizerFast, token: str | None) -> str | None:
    """Cached by the start token."""
    if token is None or tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        return None
    return str(token)
