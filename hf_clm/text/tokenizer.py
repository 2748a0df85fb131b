"""Loads a tokenizer that training can trust: a pad token of its own, an end token, a chat template."""

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
from hf_clm.hub import load_options, loading
from hf_clm.schema import Json
from hf_clm.text.sentencepiece_file import load_sentencepiece

# transformers gives templates this function; Llama-3.1's prints the day with it.
DATE = re.compile(r"""strftime_now\(\s*["']([^"']+)["']""")
DATE_FIXED = "{%- macro strftime_now(format) -%}"
UNKNOWN = "<|unk|>"  # of a tokenizer of characters
SHIPPED_TEMPLATES = Path(__file__).parent / "templates"
# A turn must end in one token, or nothing can stop at it.
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
        name_or_path: of a folder or a repository, or of a SentencePiece file (``.model``).
        pad_token: added when the tokenizer has none, or one that equals its end token; else its own is kept.
        eos_token: replaces the end token.
        chat_template: a shipped name (``chatml``, ``plain``) or a ``.jinja`` file; None keeps its own.

    Raises ModelError if there is no such tokenizer, it is not a fast one, or it has no end token.
    """
    name_or_path = os.path.expanduser(name_or_path)
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
    """Adds ``pad_token`` where the tokenizer has no pad token or one that equals its end token.

    A pad token that is also the end token would be masked with it by every collator that masks by id, and the
    model would never learn to stop.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    if pad_token == tokenizer.eos_token:
        got = repr(pad_token)
        raise ModelError("equals the end token", where="tokenizer.pad_token", got=got, fix="name another")
    tokenizer.add_special_tokens({"pad_token": pad_token})


def add_control_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Iterable[str]) -> None:
    """Adds each of ``tokens`` that is none of the tokenizer's: one id, which no text of a user gives."""
    known = set(control_tokens(tokenizer))
    missing = [token for token in tokens if token not in known]
    tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)


def use_chat_template(tokenizer: PreTrainedTokenizerFast, name_or_file: str) -> None:
    """Gives the tokenizer a chat template (``load_chat_template``) and the tokens a shipped one needs."""
    tokenizer.chat_template = load_chat_template(name_or_file)
    known = tokenizer.get_vocab()
    missing = [token for token in TEMPLATE_TOKENS.get(name_or_file, []) if token not in known]
    tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)


def set_template_defaults(tokenizer: PreTrainedTokenizerFast, values: Mapping[str, Json]) -> None:
    """Gives variables of the chat template a default, which is saved with it.

    So whoever asks the model through the template asks as it was trained, with transformers alone.
    Raises ModelError for a variable that the template does not read.
    """
    if not values:
        return
    template: Any = tokenizer.chat_template
    if not template:
        fix = "leave it out, or set tokenizer.chat_template"
        raise ModelError("has no chat template", where="tokenizer.chat_template_kwargs", fix=fix)
    named = template if isinstance(template, dict) else {"default": template}
    if what := unread_variable(values, " ".join(named.values())):
        raise ModelError(what, where="tokenizer.chat_template_kwargs")
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_to_jinja(value)} %}}{{%- endif %}}"
        for name, value in values.items()
    ]
    found = {key: "".join(lines) + text for key, text in named.items()}
    tokenizer.chat_template = found if isinstance(template, dict) else found["default"]


def fix_date(tokenizer: PreTrainedTokenizerFast, date: str) -> None:
    """Lets the chat template print this date ("2026-07-26") in place of today's; saved with it.

    So a prompt is the same on the day of its training, of a resume and of an answer. Nothing is done to a
    template that prints no date.
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
    """A macro takes the place of transformers' function: it knows the formats that the template asks for."""
    formats = sorted(set(DATE.findall(template)))
    if not formats or DATE_FIXED in template:
        return template
    cases = [f"{{%- if format == {json.dumps(one)} -%}}{day.strftime(one)}{{%- endif -%}}" for one in formats]
    return f"{DATE_FIXED}{''.join(cases)}{{%- endmacro -%}}{template}"


def unread_variable(names: Iterable[str], template: str) -> str:
    """What to say of the first variable that a template does not read; "" where it reads all of them."""
    name = next((name for name in names if not re.search(rf"\b{re.escape(name)}\b", template)), None)
    if name is None:
        return ""
    words = sorted(set(re.findall(r"\b[a-z_]{4,}\b", template)))
    return f"the chat template does not read {name!r}{did_you_mean(name, words)}"


def _to_jinja(value: Json) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_to_jinja, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_to_jinja(key)}: {_to_jinja(item)}" for key, item in value.items()) + "}"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def load_chat_template(name_or_file: str) -> str:
    """The Jinja text of a shipped template (``chatml``, ``plain``) or of a file.

    Raises ModelError if there is neither.
    """
    shipped = sorted(path.stem for path in SHIPPED_TEMPLATES.glob("*.jinja"))
    file = SHIPPED_TEMPLATES / f"{name_or_file}.jinja" if name_or_file in shipped else name_or_file
    path = Path(file).expanduser()
    if not path.is_file():
        got = repr(name_or_file)
        fix = f"one of {', '.join(shipped)}, or a .jinja file{did_you_mean(name_or_file, shipped)}"
        raise ModelError("no such chat template", where="tokenizer.chat_template", got=got, fix=fix)
    return path.read_text(encoding="utf-8")


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Every added or special token: the strings that must not come out of a user's text. Longest first.

    Without those of white space alone: to GPT-NeoX and Phi these are the ordinary spelling of an indentation.
    """
    tokens = [token for token in tokenizer.get_added_vocab() if token.strip()]
    return sorted(tokens, key=lambda token: (-len(token), token))


def control_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """A regular expression that finds any control token of the tokenizer."""
    return _control_pattern(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _control_pattern(tokenizer: PreTrainedTokenizerFast, size: int) -> re.Pattern[str]:
    """Once for a tokenizer of this ``size``: it is asked for at every text."""
    return re.compile(alternatives(control_tokens(tokenizer)))


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Those of ``control_tokens`` that the vocabulary calls special.

    The others, such as ``<think>`` and ``<tool_call>``, are written by the model as part of its answer.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    return [token for token in control_tokens(tokenizer) if token in special]


def alternatives(words: Iterable[str]) -> str:
    """A regular expression for the longest of the words at a place; one that never matches without words.

    Words with a common start share it, as in a trie: with thousands of words a plain ``a|b|c`` tries each of
    them at every ``<`` of a text.
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
    whole = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
    return f"{whole}?" if "" in node else whole


def max_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The largest id the tokenizer can give. Not ``len - 1`` where the ids have holes."""
    return _max_token_id(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _max_token_id(tokenizer: PreTrainedTokenizerFast, size: int) -> int:
    """Once for a tokenizer of this ``size``: it takes 0.1 s for 150,000 tokens, and is asked for often."""
    return max(tokenizer.get_vocab().values())


def unknown_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that stands for every character without a token, in a tokenizer of characters; None in others.

    A tokenizer of words or pieces that was made elsewhere may have met rare characters as unknown all along:
    there the doctor tells how many they are.
    """
    is_of_characters = tokenizer.unk_token == UNKNOWN
    return tokenizer.backend_tokenizer.token_to_id(UNKNOWN) if is_of_characters else None


def find_unknown(text: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The first part of ``text`` that the tokenizer has no token for; None where it spells the whole."""
    unknown = unknown_id(tokenizer)
    if unknown is None:
        return None
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    parts = (text[slice(*encoding.offsets[at])] for at, id in enumerate(encoding.ids) if id == unknown)
    return next((part for part in parts if part != tokenizer.unk_token), None)


def unique_ids(ids: Iterable[int | None]) -> list[int]:
    """The ids in their order, each once, without None."""
    return list(dict.fromkeys(i for i in ids if i is not None))


def bos_token(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The start token, if the tokenizer puts it before every text (Llama does; GPT-2 and Qwen do not)."""
    token: Any = tokenizer.bos_token
    return _bos_token(tokenizer, token)


@lru_cache(maxsize=4)
def _bos_token(tokenizer: PreTrainedTokenizerFast, token: str | None) -> str | None:
    """Once for a tokenizer with this start token."""
    if token is None or tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        return None
    return str(token)
