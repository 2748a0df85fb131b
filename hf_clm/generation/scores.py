"""Log-probabilities of the tokens of a prompt or an answer, and of the most likely tokens at each position.

They are computed from the model's logits before temperature, penalties and top_k, as in OpenAI's API.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

UNFINISHED = "\ufffd"  # tokenizers decode an incomplete character to it
CHUNK = 512  # positions of a prompt processed at once, to save memory


class Score(NamedTuple):
    """A token, its log-probability (None for the first token of a text), and the most likely tokens at its
    position with their log-probabilities, in descending order."""

    token: int
    logprob: float | None
    likeliest: tuple[tuple[int, float], ...]


def score(logits: torch.Tensor, token: int, *, likeliest: int) -> Score:
    """Scores one token. ``logits`` (V,), V the vocabulary size; ``likeliest``: the number of top tokens."""
    return _scores(logits[None], [token], likeliest=likeliest)[0]


@torch.no_grad()
def score_prompt(model: PreTrainedModel, ids: Sequence[int], *, likeliest: int) -> list[Score]:
    """Scores each token of a prompt except the first."""
    if len(ids) < 2:
        return []
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1]
    scores: list[Score] = []
    for start in range(0, len(logits), CHUNK):
        tokens = ids[start + 1 : start + 1 + CHUNK]
        scores += _scores(logits[start : start + len(tokens)], tokens, likeliest=likeliest)
    return scores


def _scores(logits: torch.Tensor, tokens: Sequence[int], *, likeliest: int) -> list[Score]:
    """Scores T tokens; ``logits`` (T, V)."""
    logprobs = logits.float().log_softmax(-1)
    actual = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    top = logprobs.topk(min(likeliest, logits.shape[-1]), dim=-1)
    alternatives = [
        tuple(zip(*pair, strict=True)) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    return [Score(*parts) for parts in zip(tokens, actual, alternatives, strict=True)]


class TokenNames:
    """Maps single tokens to the text that they add in the middle of a text.

    Tokens that are not text by themselves, such as part of a character, are named ``token_id:N``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._context: list[int] = list(ids)  # a tokenizer may drop the space before a text's first token
        self._context_text = self._decode(self._context)

    def name(self, token: int) -> str:
        """Returns the text of a token, or ``token_id:N``."""
        text = self._decode([*self._context, token]).removeprefix(self._context_text)
        return text if text and UNFINISHED not in text else f"token_id:{token}"

    def by_name(self, score: Score) -> dict[str, float] | None:
        """Returns log-probabilities by token name: of the actual token and of the most likely ones.

        A token whose name is already taken is named ``token_id:N``.
        """
        if score.logprob is None:
            return None
        logprobs = {self.name(score.token): score.logprob}
        for token, logprob in score.likeliest:
            name = self.name(token)
            if token != score.token:
                logprobs[f"token_id:{token}" if name in logprobs else name] = logprob
        return logprobs

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
