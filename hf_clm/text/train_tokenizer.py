"""Trains a tokenizer on texts: an ordinary folder that ``AutoTokenizer`` opens.

bpe         frequent pairs of bytes are merged again and again (GPT-2, Llama 3, Qwen)
unigram     the likeliest pieces of words, and bytes for all else (SentencePiece; arXiv:1804.10959)
characters  every character is a token
"""

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_clm.errors import DataError
from hf_clm.text.tokenizer import UNKNOWN

END = "<|endoftext|>"
VOCAB_SIZE = 4096
MIN_FREQUENCY = 2
# A word with the space before it, or white space; the spaces stay in the pieces, so none is lost or added.
WORDS = r" ?\S+|\s+(?!\S)|\s+"
BYTE_PIECE = r"<(?=0x[0-9A-F]{2}>)"  # a text that spells the name of a byte's piece must not become that byte
RARE = 10.0  # nats by which a byte is less likely than the rarest piece


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: str = "bpe",
    vocab_size: int = VOCAB_SIZE,
    min_frequency: int = MIN_FREQUENCY,
    pad_token: str = "<|pad|>",
    eos_token: str = END,
) -> PreTrainedTokenizerFast:
    """A tokenizer of one of the kinds above; ``characters`` has as many tokens as the texts need.

    Raises DataError if there is no text.
    """
    if kind == "characters":
        return train_characters(texts, pad_token=pad_token, eos_token=eos_token)
    names = {"pad_token": pad_token, "eos_token": eos_token}
    if kind == "unigram":
        return train_unigram(texts, vocab_size=vocab_size, **names)
    return train_bpe(texts, vocab_size=vocab_size, min_frequency=min_frequency, **names)


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int = VOCAB_SIZE,
    min_frequency: int = MIN_FREQUENCY,
    pad_token: str = "<|pad|>",
    eos_token: str = END,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one start and end token and a pad token of its own.

    Args:
        vocab_size: with the 256 bytes and the two control tokens; a small corpus may give fewer.
        min_frequency: how often a pair must occur to be merged.

    Raises DataError if there is no text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[eos_token, pad_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = _Counted(texts)
    tokenizer.train_from_iterator(seen, trainer)
    seen.require()
    return _to_fast(tokenizer, pad_token=pad_token, eos_token=eos_token)


def train_characters(
    texts: Iterable[str], *, pad_token: str = "<|pad|>", eos_token: str = END
) -> PreTrainedTokenizerFast:
    """Every character (Unicode code point) of the texts is a token; the control tokens come first.

    Another character is ``<|unk|>``: preparing data and ``generate`` refuse it. A text is its tokens, one
    behind the other: nothing is normalised, so that it comes back as it was.

    Raises DataError if there is no text.
    """
    seen = _Counted(texts)
    letters = sorted({letter for text in seen for letter in text})
    seen.require()
    vocab = {token: number for number, token in enumerate([eos_token, pad_token, UNKNOWN, *letters])}
    # BPE without merges: the one model that takes a text letter by letter without cutting it into words first
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    return _to_fast(tokenizer, pad_token=pad_token, eos_token=eos_token, unk_token=UNKNOWN)


def train_unigram(
    texts: Iterable[str],
    *,
    vocab_size: int = VOCAB_SIZE,
    pad_token: str = "<|pad|>",
    eos_token: str = END,
) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer that spells a letter without a piece by its bytes, so that every text comes back.

    Trained again, it has the same pieces, but scores that differ by up to 0.001: the library's trainer
    follows the order of a hash table, which is another one every time.

    Args:
        vocab_size: with the 256 bytes and the two control tokens; a small corpus may give fewer.

    Raises DataError if there is no text.
    """
    seen = _Counted(list(texts))
    letters = len({letter for text in seen for letter in text})
    seen.require()
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    specials, room = [eos_token, pad_token], vocab_size - 256
    # the trainer keeps every letter: where there is no room for all, the rarest are cut off again
    size = max(room, letters + len(specials) + 1)
    options = {"vocab_size": size, "special_tokens": specials, "unk_token": eos_token, "show_progress": False}
    tokenizer.train_from_iterator(seen.texts, trainers.UnigramTrainer(**options))
    learned = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    pieces = sorted(learned[len(specials) :], key=lambda piece: -piece[1])[: room - len(specials)]
    rare = min((score for _, score in pieces), default=0.0) - RARE
    spelled = [(f"<0x{byte:02X}>", rare) for byte in range(256)]
    whole = [*((token, 0.0) for token in specials), *spelled, *pieces]
    spelling = Tokenizer(models.Unigram(whole, unk_id=0, byte_fallback=True))
    parts = [pre_tokenizers.Split(Regex(part), "isolated") for part in (BYTE_PIECE, WORDS)]
    spelling.pre_tokenizer = pre_tokenizers.Sequence(parts)
    spelling.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _to_fast(spelling, pad_token=pad_token, eos_token=eos_token)


def _to_fast(
    tokenizer: Tokenizer, *, pad_token: str, eos_token: str, unk_token: str | None = None
) -> PreTrainedTokenizerFast:
    names = {"bos_token": eos_token, "eos_token": eos_token, "pad_token": pad_token}
    names["unk_token"] = unk_token or eos_token  # of a tokenizer that falls back to bytes, never given
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


class _Counted:
    """Passes texts on and counts their letters."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.letters = 0

    def __iter__(self):
        for text in self.texts:
            self.letters += len(text)
            yield text

    def require(self) -> None:
        """Raises DataError where there was no letter."""
        if self.letters == 0:
            raise DataError("no text to train a tokenizer on", where="tokenizer.train")
