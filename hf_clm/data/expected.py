"""What the tokens of a row must spell, told from its example without the code that makes the labels."""

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerFast

from hf_clm.data.spelling import writes_end
from hf_clm.schema import ChatExample, Example, PromptExample, SegmentsExample, TextExample
from hf_clm.tokenizer import bos_token, control_pattern

Run = tuple[str, bool]  # a text, and whether it is learned


@dataclass(frozen=True)
class LabelOptions:
    """What decides how a row is labelled. ``stop_ids`` are those of the generation config."""

    stage: str
    train_on: str = "all_turns"
    special_tokens_in_text: str = "encode_as_text"
    overflow: str = "keep_target"
    stop_ids: tuple[int, ...] = ()


def expected_runs(
    example: Example, tokenizer: PreTrainedTokenizerFast, *, options: LabelOptions
) -> list[Run]:
    """The texts of a row, in order, and whether each is learned; neighbours of one kind are one text."""
    end, bos = str(tokenizer.eos_token), bos_token(tokenizer) or ""
    if isinstance(example, ChatExample):
        runs = _chat_runs(example, tokenizer, options=options)
    elif isinstance(example, TextExample):
        runs = [(bos, False), (example.text + end, True)]
    elif isinstance(example, PromptExample):
        runs = [(bos + example.prompt, False), (example.completion + end, True)]
    else:
        assert isinstance(example, SegmentsExample), type(example)
        pieces = [(segment.text, segment.is_target) for segment in example.segments if segment.text]
        is_learned = pieces and (pieces[-1][1] or options.stage == "pretrain")
        stop = [(end, True)] if is_learned and not writes_end(example, end) else []
        runs = [(bos, False), *pieces, *stop]
    if options.stage == "pretrain" and not isinstance(example, ChatExample):
        runs = [(bos, False), ("".join(text for text, _ in runs).removeprefix(bos), True)]
    kinds = groupby((run for run in runs if run[0]), key=lambda run: run[1])
    return [("".join(text for text, _ in group), learned) for learned, group in kinds]


def _chat_runs(
    example: ChatExample, tokenizer: PreTrainedTokenizerFast, *, options: LabelOptions
) -> list[Run]:
    """Prompt and answer of each turn, by the tokenizer's own rendering of the messages up to it."""
    messages: list[Any] = [{"role": turn["role"], "content": turn["content"]} for turn in example.messages]
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    pattern = control_pattern(tokenizer)
    others = options.stage == "pretrain" or options.train_on == "everything"
    if others:
        whole = whole[: _last_end(pattern, whole)]
    turns = [i for i, turn in enumerate(example.messages) if turn["role"] == "assistant"]
    runs, position = [], 0
    for turn in turns:
        is_chosen = options.train_on != "last_turn" or turn == turns[-1]
        learned = options.stage == "pretrain" or (is_chosen and example.messages[turn].get("train", True))
        if learned == others:
            continue
        prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        until = str(tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False))
        start, stop = len(str(prompt)), _last_end(pattern, until)
        runs += [(str(prompt)[position:], others), (until[start:stop], learned)]
        position = stop
    return [*runs, (whole[position:], others)]


def _last_end(pattern: re.Pattern[str], text: str) -> int:
    """Where the last control token of ``text`` ends."""
    return max((match.end() for match in pattern.finditer(text)), default=0)
