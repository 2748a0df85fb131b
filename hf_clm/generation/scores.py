"""Log-probabilities: those of the tokens of an answer, of a prompt, and the likeliest others at each place.

They are the model's own, before temperature, penalties and top_k, as OpenAI's API gives them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to
CHUNK = 512  # positions of a prompt whose log-probabilities are computed at once


class Score(NamedTuple):
    """A token and its log-probability, None for the first of a text; the likeliest tokens in its place with
    theirs, likeliest first."""

    token: int
    logprob: float | None
    likeliest: tuple[tuple[int, float], ...]


def score(logits: torch.Tensor, token: int, *, likeliest: int) -> Score:
    """Of one place; ``logits`` (V,), V the vocabulary."""
    return _scores(logits[None], [token], likeliest=likeliest)[0]


@torch.no_grad()
def score_prompt(model: PreTrainedModel, ids: Sequence[int], *, likeliest: int) -> list[Score]:
    """Of each token of a prompt but the first, which nothing precedes."""
    if len(ids) < 2:
        return []
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1]
    found: list[Score] = []
    for start in range(0, len(logits), CHUNK):
        tokens = ids[start + 1 : start + 1 + CHUNK]
        found += _scores(logits[start : start + len(tokens)], tokens, likeliest=likeliest)
    return found


def _scores(logits: torch.Tensor, tokens: Sequence[int], *, likeliest: int) -> list[Score]:
    """``logits`` (T, V) of T tokens."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(likeliest, logits.shape[-1]), dim=-1)
    others = [
        tuple(zip(*pair, strict=True))
        for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return [Score(*parts) for parts in zip(tokens, own, others, strict=True)]


class TokenNames:
    """The text of single tokens, as it stands inside a text.

    What is no text by itself, such as half a character, is called ``token_id:N``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._before: list[int] = list(ids)  # a tokenizer may drop the space of a text's first token
        self._start = self._decode(self._before)

    def name(self, token: int) -> str:
        """The text of a token, or ``token_id:N``."""
        text = self._decode([*self._before, token])
        own = text.removeprefix(self._start)
        return own if own and UNFINISHED not in own else f"token_id:{token}"

    def by_name(self, score: Score) -> dict[str, float] | None:
        """The likeliest tokens of a place, and the one that stands there, each under a name of its own."""
        if score.logprob is None:
            return None
        found = {self.name(score.token): score.logprob}
        for token, logprob in score.likeliest:
            name = self.name(token)
            if token != score.token:
                found[f"token_id:{token}" if name in found else name] = logprob
        return found

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
