"""Trains a byte-level BPE tokenizer: an ordinary folder that ``AutoTokenizer`` opens."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_clm.errors import DataError

END = "<|endoftext|>"


def train_bpe(
    texts: Iterable[str], *, vocab_size: int = 4096, min_frequency: int = 2, pad_token: str = "<|pad|>"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ``<|endoftext|>`` as start and end token and a pad token of its own.

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
        special_tokens=[END, pad_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = _Counted(texts)
    tokenizer.train_from_iterator(seen, trainer)
    if seen.letters == 0:
        raise DataError("no text to train a tokenizer on", where="tokenizer.train")
    tokens = {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **tokens)


class _Counted:
    """Passes texts on and counts their letters."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.letters = 0

    def __iter__(self):
        for text in self.texts:
            self.letters += len(text)
            yield text
