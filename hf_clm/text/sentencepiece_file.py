"""Loads a SentencePiece ``.model`` file as a fast tokenizer, with the file's ids and normalization.

Source: ``ModelProto`` of github.com/google/sentencepiece, src/sentencepiece_model.proto
"""

import importlib
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from hf_clm.errors import ModelError

SPACE = "\u2581"  # SentencePiece's character for a space
UNIGRAM, BPE = 1, 2
CONTROL_TYPE, USER_DEFINED_TYPE = 3, 4


def load_sentencepiece(path: str) -> PreTrainedTokenizerFast:
    """Loads the file. Pieces keep their ids; control and user-defined pieces become control tokens.

    The text between two control tokens is encoded as a separate text, with a space in front if the file asks
    for a prefix.

    Raises ModelError if the package is not installed, the file is not a SentencePiece model, or the model is
    a word or character model.
    """
    proto = _read(path)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    tokenizer = Tokenizer(_to_model(proto, pieces, where=path))
    tokenizer.normalizer = _to_normalizer(proto.normalizer_spec)
    if proto.trainer_spec.split_by_whitespace:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]*"), "isolated")
    has_prefix = proto.normalizer_spec.add_dummy_prefix
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if has_prefix else [])])
    control = [piece.piece for piece in proto.pieces if piece.type in (CONTROL_TYPE, USER_DEFINED_TYPE)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    ids = {name: getattr(proto.trainer_spec, f"{name}_id") for name in ("bos", "eos", "unk", "pad")}
    named = {f"{name}_token": pieces[number][0] for name, number in ids.items() if number >= 0}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)


def _read(path: str) -> Any:
    try:
        library: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as error:
        what, fix = "needs the package sentencepiece", "pip install 'hf_clm[sentencepiece]'"
        raise ModelError(what, where=f"tokenizer {path}", fix=fix) from error
    proto = library.ModelProto()
    try:
        proto.ParseFromString(Path(path).read_bytes())
    except Exception as error:  # protobuf's DecodeError; its module depends on the release
        raise ModelError("is not a SentencePiece model", where=f"tokenizer {path}") from error
    if not proto.pieces:
        raise ModelError("is not a SentencePiece model", where=f"tokenizer {path}", got="no pieces")
    return proto


def _to_model(proto: Any, pieces: list[tuple[str, float]], *, where: str) -> Any:
    spec = proto.trainer_spec
    if spec.model_type == UNIGRAM:
        return models.Unigram(pieces, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    if spec.model_type == BPE:
        vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
        options = {"unk_token": spec.unk_piece, "fuse_unk": True, "byte_fallback": spec.byte_fallback}
        return models.BPE(vocab=vocab, merges=generate_merges(vocab), **options)
    raise ModelError("is a word or character model; expected Unigram or BPE", where=f"tokenizer {where}")


def _to_normalizer(spec: Any) -> Any:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
