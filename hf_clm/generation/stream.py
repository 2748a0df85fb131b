"""Streams several answers in one batch, each with its own settings.

prompts --left-padded--> model.generate --at each step--> a token for each Answer --> emit("some text")
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteriaList

from hf_clm.errors import RecipeError
from hf_clm.generation.decoding import Decoding
from hf_clm.generation.padding import pad_id, to_left_padded
from hf_clm.generation.sampling import choose_token, random_state, stop_ids, temporary_config, to_config
from hf_clm.generation.scores import UNFINISHED, Score, score, score_prompt
from hf_clm.model.load import max_positions


@dataclass(eq=False)
class Answer:
    """An answer while it is being generated.

    With ``likeliest`` (a number of top tokens), ``scores`` are those of the answer's tokens, including the
    stop token. With ``scores_prompt``, ``prompt_scores`` are those of the prompt. ``hidden_ids``: see
    ``TextStream``. ``emit`` is called with each piece of text.
    """

    prompt_ids: list[int]
    decoding: Decoding
    max_new_tokens: int
    hidden_ids: Collection[int] | None = None
    likeliest: int | None = None
    scores_prompt: bool = False
    emit: Callable[[str], None] = lambda text: None
    ids: list[int] = field(default_factory=list)
    """The tokens so far, without the stop token."""
    prompt_scores: list[Score] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    """Why the answer ended: "stop" (at a stop token or stop text, which ``text`` excludes) or "length"."""
    stop_text: str | None = None
    """The stop text at which the answer ended, if it did."""
    is_cancelled: bool = False
    _held: str = ""

    @property
    def is_done(self) -> bool:
        return bool(self.finish) or self.is_cancelled

    def add(self, text: str) -> None:
        """Emits text and ends at a stop text. Holds back an end that may be the beginning of a stop text."""
        text, self._held = self._held + text, ""
        stop = self.decoding.stop
        if ends := [(text.find(one), one) for one in stop if one in text]:
            end, self.stop_text = min(ends)
            self._emit(text[:end])
            self.close("stop")
        else:
            size = len(text) - max((_overlap(text, one) for one in stop), default=0)
            self._emit(text[:size])
            self._held = text[size:]

    def end(self, reason: str, rest: str = "") -> None:
        """Emits the text held back, and ends the answer."""
        self.add(rest)
        if not self.finish:
            self._emit(self._held)
            self.close(reason)

    def close(self, reason: str) -> None:
        """Sets why the answer ended. Nothing is emitted afterwards."""
        self.finish = reason

    def _emit(self, text: str) -> None:
        if text:
            self.text += text
            self.emit(text)


class TextStream:
    """Decodes tokens to text as they arrive. The pieces add up to the decoded text of all tokens.

    ``hidden_ids`` are left out; None means all special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, hidden_ids: Collection[int] | None = None):
        self._tokenizer, self._hidden_ids = tokenizer, hidden_ids
        self._ids: list[int] = []
        self._start, self._done = 0, 0  # token indices; the tokens between them are context for new ones

    def push(self, token: int) -> str:
        """Adds a token and returns new text; empty while a character is incomplete."""
        self._ids.append(token)
        text = self.rest()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text

    def rest(self) -> str:
        """Returns the text not yet returned by ``push``, such as an incomplete character at the end."""
        before = self._decode(self._ids[self._start : self._done])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        if self._hidden_ids is None:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
        visible = [token for token in ids if token not in self._hidden_ids]
        return str(self._tokenizer.decode(visible, skip_special_tokens=False))


@torch.no_grad()
def stream_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    answers: Sequence[Answer],
    with_cache: bool = True,
) -> None:
    """Generates a batch of answers until each has ended or was cancelled.

    When an answer reaches the model's maximum length, the model starts again from the last half of its text,
    and from the complete text of the shorter answers in the batch.
    """
    for answer in answers:
        if answer.scores_prompt and answer.likeliest is not None:
            answer.prompt_scores = score_prompt(model, answer.prompt_ids, likeliest=answer.likeliest)
        if not answer.max_new_tokens:
            answer.end("length")
    lines = [_Line(answer, tokenizer, model) for answer in answers]
    while open_lines := [line for line in lines if not line.answer.is_done]:
        _stretch(model, open_lines, with_cache=with_cache)


@torch.no_grad()
def search_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    answers: Sequence[Answer],
    with_cache: bool = True,
) -> None:
    """Generates a batch of answers by beam search. All have the same settings and number of new tokens.

    Turn the cache off for models whose state is not reordered along with the beams. Raises RecipeError for
    settings that transformers rejects.
    """
    first, decoding = answers[0], answers[0].decoding
    pad = pad_id(tokenizer)
    config = to_config(decoding, new_tokens=first.max_new_tokens, stops=stop_ids(model), pad=pad)
    config.use_cache = with_cache
    prompts = to_left_padded([answer.prompt_ids for answer in answers], pad, device=model.device)
    width = prompts["input_ids"].shape[1]

    def has_stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Returns whether the answer of each beam contains a stop text, (B * beams,) bool."""
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in input_ids[:, width:]]
        stopped = [any(stop in text for stop in decoding.stop) for text in texts]
        return torch.tensor(stopped, device=input_ids.device)

    decoder: Any = model  # transformers does not declare generate on PreTrainedModel
    ends = StoppingCriteriaList([has_stop] if decoding.stop else [])
    try:
        with temporary_config(model, config), _seeded(decoding.seed, model.device):
            rows = decoder.generate(**prompts, generation_config=config, stopping_criteria=ends)
    except ValueError as error:  # the checks of transformers
        raise RecipeError(str(error).splitlines()[0], where="num_beams") from error
    for answer, row in zip(answers, rows[:, width:].tolist(), strict=True):
        line = _Line(answer, tokenizer, model)
        for token in row:
            if not answer.is_done:
                line.take(token)
        if not answer.is_done:  # a stop text matched an incomplete character
            answer.end("stop", line.text.rest())


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds torch's global random state, which beam sampling uses; restores it at the end."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed)
        yield


class _Line:
    """The state of an answer in a batch: what it takes to select and decode its next token."""

    def __init__(self, answer: Answer, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel):
        self.answer, self.pad = answer, pad_id(tokenizer)
        self.text = TextStream(tokenizer, answer.hidden_ids)
        self._draws = random_state(answer.decoding.seed, model.device)
        self._limit, self._stops = max_positions(model.config), stop_ids(model)
        self._logits = torch.empty(0)
        self._skipped = 0  # tokens at the beginning that the model no longer reads

    def input_ids(self) -> list[int]:
        """Returns the ids to start from: prompt and answer, or their end if they are too long."""
        ids = self.answer.prompt_ids + self.answer.ids
        if self._limit is not None and len(ids) - self._skipped >= self._limit:
            self._skipped = len(ids) - max(1, self._limit // 2)
        return ids[self._skipped :]

    @property
    def remaining(self) -> int:
        """The number of tokens that may still be generated."""
        return self.answer.max_new_tokens - len(self.answer.ids)

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Returns scores (1, V) whose arg max is the next token; ``ids`` (1, T) include padding."""
        if self.answer.likeliest is not None:
            self._logits = logits[0].clone()
        length = len(self.answer.prompt_ids) + len(self.answer.ids) - self._skipped
        return choose_token(self.answer.decoding, ids[:, -length:], logits, draws=self._draws)

    def take(self, token: int) -> None:
        """Adds the next token to the answer, and ends the answer if it is the last one."""
        answer = self.answer
        if answer.likeliest is not None:
            answer.scores.append(score(self._logits, token, likeliest=answer.likeliest))
        if token in self._stops:
            answer.end("stop", self.text.rest())
            return
        answer.ids.append(token)
        answer.add(self.text.push(token))
        if not answer.finish and not self.remaining:
            answer.end("length", self.text.rest())


def _stretch(model: PreTrainedModel, lines: Sequence[_Line], *, with_cache: bool) -> None:
    """Generates until all answers are done, or one reaches the model's maximum length."""
    prompts, room = [line.input_ids() for line in lines], max(line.remaining for line in lines)
    limit, pad = max_positions(model.config), lines[0].pad
    if limit is not None:
        room = max(1, min(room, limit - max(map(len, prompts))))
    config = to_config(Decoding(), new_tokens=room, stops=stop_ids(model), pad=pad)
    config.use_cache = with_cache

    def choose(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, line in enumerate(lines):
            if not line.answer.is_done:
                scores[row] = line.choose(input_ids[row : row + 1], scores[row : row + 1])[0]
        return scores

    def deliver(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Adds the new token to each answer; returns which answers are done, (B,) bool."""
        for line, token in zip(lines, input_ids[:, -1].tolist(), strict=True):
            if not line.answer.is_done:
                line.take(token)
        return torch.tensor([line.answer.is_done for line in lines], device=input_ids.device)

    decoder: Any = model  # transformers does not declare generate on PreTrainedModel
    with temporary_config(model, config):
        decoder.generate(
            **to_left_padded(prompts, pad, device=model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([choose]),
            stopping_criteria=StoppingCriteriaList([deliver]),
        )


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of ``text`` that is a proper prefix of ``stop``."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
