"""Answers as they come: each piece of text at once, several answers in one batch, each with its own settings.

prompts --left-padded--> model.generate --at each step--> a token for each Answer --> emit("some text")
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_clm.generation.generate import stop_ids, to_left_padded

UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen; temperature 0 is greedy, top_k 0 and top_p 1 leave out none.

    Without a ``seed`` every answer is another one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        """True also for a temperature so low that logits divided by it have no number."""
        return self.temperature < 1e-6


def to_sampling(
    temperature: float | None, *, top_k: int | None, top_p: float | None, seed: int | None
) -> Sampling:
    """Greedy where nothing is asked for; the plain distribution where only top_k or top_p are."""
    if temperature is None:
        temperature = 1.0 if top_k is not None or top_p is not None else 0.0
    return Sampling(temperature, top_k or 0, 1.0 if top_p is None else top_p, seed)


class Answer:
    """One answer while it is generated.

    ``finish`` says why it ended: "stop" (a stop token or a stop text, of which neither is in ``text``) or
    "length"; it is empty while the answer is under way and where it was cancelled. ``on_end`` is called after
    the last text, unless it was cancelled. ``hidden_ids``: see ``TextStream``.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        hidden_ids: Collection[int] | None = None,
        emit: Callable[[str], None],
        on_end: Callable[[], None] = lambda: None,
    ):
        self.prompt_ids, self.sampling, self.max_new_tokens = prompt_ids, sampling, max_new_tokens
        self.hidden_ids = hidden_ids
        self.text, self.finish, self.tokens, self.is_cancelled = "", "", 0, False
        self._stop, self._emit, self._on_end, self._held = stop, emit, on_end, ""

    @property
    def is_done(self) -> bool:
        return bool(self.finish) or self.is_cancelled

    def add(self, text: str) -> None:
        """Emits the text, but for an end that may become a stop text; ends before a stop text."""
        text = self._held + text
        ends = [text.find(stop) for stop in self._stop if stop in text]
        if ends:
            self._held, text = "", text[: min(ends)]
            self._show(text)
            self._finish("stop")
        else:
            kept = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, answers: Sequence[Answer]
) -> None:
    """Generates all the answers together, until each has ended or was cancelled."""
    decoder: Any = model  # typed without the generate that it has
    pad: Any = tokenizer.pad_token_id
    decoder.generate(
        **to_left_padded([answer.prompt_ids for answer in answers], pad, device=model.device),
        max_new_tokens=max(answer.max_new_tokens for answer in answers),
        do_sample=False,  # _Choose leaves one token where an answer is sampled
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([_Choose(answers)]),
        stopping_criteria=StoppingCriteriaList([_Deliver(answers, tokenizer, stops=stop_ids(model))]),
    )


class _Choose(LogitsProcessor):
    """Draws the next token of each answer that is sampled, from a random state of its own."""

    def __init__(self, answers: Sequence[Answer]):
        self._answers = answers
        self._states: dict[int, torch.Generator] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, V) scores, V the vocabulary; in a sampled row all but the drawn token are -inf."""
        for row, answer in enumerate(self._answers):
            if not answer.sampling.is_greedy and not answer.is_done:
                left = _warped(scores[row : row + 1], answer.sampling)
                if row not in self._states:
                    self._states[row] = _random_state(answer.sampling.seed, scores.device)
                drawn = torch.multinomial(left.softmax(-1), 1, generator=self._states[row])
                scores[row] = torch.full_like(scores[row], -torch.inf).scatter_(0, drawn[0], 0.0)
        return scores


class _Deliver(StoppingCriteria):
    """Hands each new token to its answer; generate ends when all of them are done."""

    def __init__(
        self, answers: Sequence[Answer], tokenizer: PreTrainedTokenizerFast, *, stops: set[int | None]
    ):
        self._answers, self._stops = answers, stops
        self._streams = [TextStream(tokenizer, answer.hidden_ids) for answer in answers]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """(B,) bool: True for an answer that is done."""
        for answer, stream, token in zip(
            self._answers, self._streams, input_ids[:, -1].tolist(), strict=True
        ):
            if not answer.is_done:
                self._take(answer, stream, token=token)
        return torch.tensor([answer.is_done for answer in self._answers], device=input_ids.device)

    def _take(self, answer: Answer, stream: TextStream, *, token: int) -> None:
        if token in self._stops:
            answer.end("stop", stream.rest())
            return
        answer.tokens += 1
        answer.add(stream.push(token))
        if not answer.finish and answer.tokens >= answer.max_new_tokens:
            answer.end("length", stream.rest())


def _warped(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """(1, V) scores with transformers' own temperature, top_k and top_p."""
    warpers: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    for warp in warpers:
        scores = warp(torch.empty(0, dtype=torch.long), scores)  # none of them looks at the ids
    return scores


def _random_state(seed: int | None, device: torch.device) -> torch.Generator:
    state = torch.Generator(device=device)
    if seed is None:
        state.seed()
    else:
        state.manual_seed(seed)
    return state


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``, but not all of it."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
