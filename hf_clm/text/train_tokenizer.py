"""Trains a tokenizer that ``AutoTokenizer`` can load.

bpe         repeatedly merges the most frequent pair of bytes (GPT-2, Llama 3, Qwen)
unigram     the likeliest pieces of words, and bytes for everything else (SentencePiece; arXiv:1804.10959)
characters  every character is a token
"""

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_clm.errors import DataError
from hf_clm.text.tokenizer import UNKNOWN

END_TOKEN = "<|endoftext|>"
VOCAB_SIZE = 4096
MIN_FREQUENCY = 2
# A word with the space before it, or whitespace. Spaces stay in the pieces, so none is lost or added.
WORD_PATTERN = r" ?\S+|\s+(?!\S)|\s+"
BYTE_PIECE = r"<(?=0x[0-9A-F]{2}>)"  # text such as "<0x41>" must not become the piece of that byte
RARE = 10.0  # a byte is this many nats less likely than the rarest piece


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: str = "bpe",
    vocab_size: int = VOCAB_SIZE,
    min_frequency: int = MIN_FREQUENCY,
    pad_token: str = "<|pad|>",
    eos_token: str = END_TOKEN,
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of one of the kinds above; ``characters`` ignores ``vocab_size``.

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
    eos_token: str = END_TOKEN,
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with one token for start and end, and a separate pad token.

    Args:
        vocab_size: includes the 256 bytes and the two control tokens; a small corpus may yield fewer.
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
    counted_texts = _CountedTexts(texts)
    tokenizer.train_from_iterator(counted_texts, trainer)
    counted_texts.require()
    return _to_fast(tokenizer, pad_token=pad_token, eos_token=eos_token)


def train_characters(
    texts: Iterable[str], *, pad_token: str = "<|pad|>", eos_token: str = END_TOKEN
) -> PreTrainedTokenizerFast:
    """Makes a tokenizer in which every character (Unicode code point) of the texts is a token.

    The control tokens come first. Other characters are encoded as ``<|unk|>``, which data preparation and
    ``generate`` refuse. Nothing is normalized, so decoding returns the original text.

    Raises DataError if there is no text.
    """
    counted_texts = _CountedTexts(texts)
    letters = sorted({letter for text in counted_texts for letter in text})
    counted_texts.require()
    vocab = {token: number for number, token in enumerate([eos_token, pad_token, UNKNOWN, *letters])}
    # BPE without merges is the only model that encodes character by character without splitting into words
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    return _to_fast(tokenizer, pad_token=pad_token, eos_token=eos_token, unk_token=UNKNOWN)


def train_unigram(
    texts: Iterable[str],
    *,
    vocab_size: int = VOCAB_SIZE,
    pad_token: str = "<|pad|>",
    eos_token: str = END_TOKEN,
) -> PreTrainedTokenizerFast:
    """Trains a Unigram tokenizer with byte fallback, so that decoding returns the original text.

    Training is not fully deterministic: the pieces are the same, but scores differ by up to 0.001, since the
    library's trainer depends on the order of a hash table.

    Args:
        vocab_size: includes the 256 bytes and the two control tokens; a small corpus may yield fewer.

    Raises DataError if there is no text.
    """
    counted_texts = _CountedTexts(list(texts))
    letters = len({letter for text in counted_texts for letter in text})
    counted_texts.require()
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    specials, room = [eos_token, pad_token], vocab_size - 256
    # the trainer keeps every character: if the vocabulary is too small, the rarest are removed afterwards
    size = max(room, letters + len(specials) + 1)
    options = {"vocab_size": size, "special_tokens": specials, "unk_token": eos_token, "show_progress": False}
    tokenizer.train_from_iterator(counted_texts.texts, trainers.UnigramTrainer(**options))
    trained = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    pieces = sorted(trained[len(specials) :], key=lambda piece: -piece[1])[: room - len(specials)]
    rare = min((score for _, score in pieces), default=0.0) - RARE
    byte_pieces = [(f"<0x{byte:02X}>", rare) for byte in range(256)]
    vocabulary = [*((token, 0.0) for token in specials), *byte_pieces, *pieces]
    spelling = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    parts = [pre_tokenizers.Split(Regex(part), "isolated") for part in (BYTE_PIECE, WORD_PATTERN)]
    spelling.pre_tokenizer = pre_tokenizers.Sequence(parts)
    spelling.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _to_fast(spelling, pad_token=pad_token, eos_token=eos_token)


def _to_fast(
    tokenizer: Tokenizer, *, pad_token: str, eos_token: str, unk_token: str | None = None
) -> PreTrainedTokenizerFast:
    names = {"bos_token": eos_token, "eos_token": eos_token, "pad_token": pad_token}
    names["unk_token"] = unk_token or eos_token  # never produced by a tokenizer with byte fallback
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


class _CountedTexts:
    """Iterates over texts and counts their characters."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.characters = 0

    def __iter__(self):
        for text in self.texts:
            self.characters += len(text)
            yield text

    def require(self) -> None:
        """Raises DataError if there was no text."""
        if self.characters == 0:
            raise DataError("no text to train a tokenizer on", where="tokenizer.train")
