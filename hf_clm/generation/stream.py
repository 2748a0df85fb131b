"""Answers as they come: each piece of text at once, several answers in one batch, each with its own settings.

prompts --left-padded--> model.generate --at each step--> a token for each Answer --> emit("some text")
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_clm.errors import RecipeError
from hf_clm.generation.decoding import Decoding, choose_token, random_state, stop_ids, to_config, under
from hf_clm.generation.padding import pad_id, to_left_padded
from hf_clm.generation.scores import UNFINISHED, Score, score, score_prompt
from hf_clm.model.load import max_positions


class Answer:
    """One answer while it is generated.

    ``finish`` says why it ended: "stop" (a stop token or a stop text, of which neither is in ``text``) or
    "length"; it is empty while the answer is under way and where it was cancelled. ``on_end`` is called after
    the last text, unless it was cancelled. ``hidden_ids``: see ``TextStream``.

    With ``likeliest``, a number of tokens, ``scores`` has those of the answer's tokens, the stop token among
    them, and with ``scores_prompt`` also ``prompt_scores`` those of the prompt's.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        decoding: Decoding,
        *,
        max_new_tokens: int,
        hidden_ids: Collection[int] | None = None,
        likeliest: int | None = None,
        scores_prompt: bool = False,
        emit: Callable[[str], None] = lambda text: None,
        on_end: Callable[[], None] = lambda: None,
    ):
        self.prompt_ids, self.decoding, self.max_new_tokens = prompt_ids, decoding, max_new_tokens
        self.hidden_ids, self.likeliest, self.scores_prompt = hidden_ids, likeliest, scores_prompt
        self.ids: list[int] = []  # without the stop token
        self.prompt_scores: list[Score] = []
        self.scores: list[Score] = []
        self.text, self.finish, self.is_cancelled = "", "", False
        self._emit, self._on_end, self._held = emit, on_end, ""

    @property
    def tokens(self) -> int:
        """How many were generated."""
        return len(self.ids)

    @property
    def is_done(self) -> bool:
        return bool(self.finish) or self.is_cancelled

    def add(self, text: str) -> None:
        """Emits the text, but for an end that may become a stop text; ends before a stop text."""
        text = self._held + text
        stop = self.decoding.stop
        ends = [text.find(one) for one in stop if one in text]
        if ends:
            self._held, text = "", text[: min(ends)]
            self._show(text)
            self._finish("stop")
        else:
            kept = len(text) - max((_overlap(text, one) for one in stop), default=0)
            self._held, text = text[kept:], text[:kept]
            self._show(text)

    def end(self, reason: str, rest: str = "") -> None:
        """Emits what was held back, and ends."""
        self.add(rest)
        if not self.finish:
            self._show(self._held)
            self._finish(reason)

    def _finish(self, reason: str) -> None:
        self.finish = reason
        self._on_end()

    def _show(self, text: str) -> None:
        if text:
            self.text += text
            self._emit(text)


class TextStream:
    """Tokens in, whole characters out. Together they are what the tokenizer makes of all tokens at once.

    ``hidden_ids`` are not shown; None: all special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, hidden_ids: Collection[int] | None = None):
        self._tokenizer, self._hidden_ids = tokenizer, hidden_ids
        self._ids: list[int] = []
        self._start, self._shown = 0, 0  # tokens; those between them give the new ones their context

    def push(self, token: int) -> str:
        """The text that is certain now; empty while a character lacks bytes."""
        self._ids.append(token)
        before, text = (
            self._decode(self._ids[self._start : self._shown]),
            self._decode(self._ids[self._start :]),
        )
        if len(text) <= len(before) or text.endswith(UNFINISHED):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def rest(self) -> str:
        """What is left at the end: bytes that became no character."""
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        if self._hidden_ids is None:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
        shown = [token for token in ids if token not in self._hidden_ids]
        return str(self._tokenizer.decode(shown, skip_special_tokens=False))


@torch.no_grad()
def stream_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    answers: Sequence[Answer],
    with_cache: bool = True,
) -> None:
    """Generates all the answers together, until each has ended or was cancelled.

    An answer that runs past the model's positions rereads the last half of them. The shorter answers of its
    batch then reread all of their text.
    """
    for answer in answers:
        if answer.scores_prompt and answer.likeliest is not None:
            answer.prompt_scores = score_prompt(model, answer.prompt_ids, likeliest=answer.likeliest)
        if not answer.max_new_tokens:
            answer.end("length")
    lines = [_Line(answer, tokenizer, model.device) for answer in answers]
    while going := [line for line in lines if not line.answer.is_done]:
        _stretch(model, tokenizer, going, with_cache=with_cache)


@torch.no_grad()
def search_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    answers: Sequence[Answer],
    with_cache: bool = True,
) -> None:
    """Generates all the answers together by beam search; all have one Decoding, and one number of new tokens.

    Without a cache also models answer rightly whose state does not follow when a beam takes another's place.
    Raises RecipeError for a search that transformers refuses.
    """
    first, stops = answers[0], stop_ids(model)
    pad = pad_id(tokenizer)
    prompts = to_left_padded([answer.prompt_ids for answer in answers], pad, device=model.device)
    width = prompts["input_ids"].shape[1]
    config = to_config(first.decoding, new_tokens=first.max_new_tokens, stops=stops, pad=pad)
    config.use_cache = with_cache
    stop = first.decoding.stop
    ends = StoppingCriteriaList([_StopText(tokenizer, stop, width)] if stop else [])
    decoder: Any = model  # typed without the generate that it has
    try:
        with under(model, config), _seeded(first.decoding, model.device):
            rows = decoder.generate(**prompts, generation_config=config, stopping_criteria=ends)
    except ValueError as error:  # transformers' checks
        raise RecipeError(str(error).splitlines()[0], where="num_beams") from error
    for answer, row in zip(answers, rows[:, width:].tolist(), strict=True):
        line = _Line(answer, tokenizer, model.device)
        for token in row:
            if not answer.is_done:
                line.take(token, stops=stops)
        line.close()


class _StopText(StoppingCriteria):
    """Ends a beam whose answer holds a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str], width: int):
        self._tokenizer, self._stop, self._width = tokenizer, stop, width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """(B * beams,) bool."""
        texts = [self._tokenizer.decode(row, skip_special_tokens=True) for row in input_ids[:, self._width :]]
        found = [any(stop in text for stop in self._stop) for text in texts]
        return torch.tensor(found, device=input_ids.device)


@contextmanager
def _seeded(decoding: Decoding, device: torch.device) -> Iterator[None]:
    """Beams that are sampled draw from torch's own random state, which is put back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if decoding.seed is None:
            torch.seed()
        else:
            torch.manual_seed(decoding.seed)
        yield


class _Line:
    """An answer with what it takes to choose and to show its next token."""

    def __init__(self, answer: Answer, tokenizer: PreTrainedTokenizerFast, device: torch.device):
        self.answer = answer
        self.draws = random_state(answer.decoding.seed, device)
        self._text = TextStream(tokenizer, answer.hidden_ids)
        self._logits = torch.empty(0)
        self.read: list[int] = []  # by the model, in this stretch
        self._skipped = 0  # tokens at the beginning that it reads no more

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(1, V) scores of which the next token has the highest; ``ids`` (1, T) with the padding."""
        answer = self.answer
        if answer.likeliest is not None:
            self._logits = logits[0].clone()
        own = ids[:, ids.shape[1] - self._length :]
        return choose_token(answer.decoding, own, logits, draws=self.draws)

    def begin(self, limit: int | None) -> None:
        """Decides what the model is to read: what it has read and said, or the last half of that."""
        ids = self.answer.prompt_ids + self.answer.ids
        if limit is not None and len(ids) - self._skipped >= limit:
            self._skipped = len(ids) - max(1, limit // 2)
        self.read = ids[self._skipped :]

    @property
    def left(self) -> int:
        """The tokens that it may still have."""
        return self.answer.max_new_tokens - self.answer.tokens

    def take(self, token: int, *, stops: set[int]) -> None:
        """The next token."""
        answer = self.answer
        if answer.likeliest is not None:
            answer.scores.append(score(self._logits, token, likeliest=answer.likeliest))
        if token in stops:
            answer.end("stop", self._text.rest())
            return
        answer.ids.append(token)
        answer.add(self._text.push(token))
        if not answer.finish and not self.left:
            answer.end("length", self._text.rest())

    def close(self) -> None:
        """Ends an answer whose tokens ended before their time: at a stop text, seen in half a character."""
        if not self.answer.is_done:
            self.answer.end("stop", self._text.rest())

    @property
    def _length(self) -> int:
        """Of prompt and answer, as far as the model read them."""
        return len(self.answer.prompt_ids) + self.answer.tokens - self._skipped


def _stretch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lines: Sequence[_Line], *, with_cache: bool
) -> None:
    """Generates until all are done, or the positions are used up."""
    limit, stops = max_positions(model.config), stop_ids(model)
    for line in lines:
        line.begin(limit)
    room = max(line.left for line in lines)
    if limit is not None:
        room = max(1, min(room, limit - max(len(line.read) for line in lines)))
    pad = pad_id(tokenizer)
    config = to_config(Decoding(), new_tokens=room, stops=stops, pad=pad)
    config.use_cache = with_cache
    decoder: Any = model  # typed without the generate that it has
    with under(model, config):
        decoder.generate(
            **to_left_padded([line.read for line in lines], pad, device=model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Choose(lines)]),
            stopping_criteria=StoppingCriteriaList([_Deliver(lines, stops)]),
        )


class _Choose(LogitsProcessor):
    """Chooses the next token of each answer."""

    def __init__(self, lines: Sequence[_Line]):
        self._lines = lines

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, V) scores, V the vocabulary."""
        for row, line in enumerate(self._lines):
            if not line.answer.is_done:
                scores[row] = line.choose(input_ids[row : row + 1], scores[row : row + 1])[0]
        return scores


class _Deliver(StoppingCriteria):
    """Hands each new token to its answer; generate ends when all of them are done."""

    def __init__(self, lines: Sequence[_Line], stops: set[int]):
        self._lines, self._stops = lines, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """(B,) bool: True for an answer that is done."""
        for line, token in zip(self._lines, input_ids[:, -1].tolist(), strict=True):
            if not line.answer.is_done:
                line.take(token, stops=self._stops)
        return torch.tensor([line.answer.is_done for line in self._lines], device=input_ids.device)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``, but not all of it."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
