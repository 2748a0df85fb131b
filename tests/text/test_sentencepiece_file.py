"""SentencePiece files: the ids of the original library, in an ordinary tokenizer folder."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_clm.errors import ModelError
from hf_clm.text.sentencepiece_file import load_sentencepiece
from hf_clm.text.tokenizer import load_tokenizer

LICENSE = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8")
CHINESE = ["早晨的阳光照进来，正好落在她的手上。", "火苗舔着锅底，锅里的水咕嘟咕嘟地响。"]
TEXTS = [*LICENSE.split("\n"), *CHINESE]
NASTY = [
    "  two   spaces ",
    "ｆｕｌｌ，ｗｉｄｔｈ 。",
    "tab\tand\u3000space",
    "emoji 😀 é e\u0301",
    "",
]
OWN = ["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"]


def train(path: Path, **settings) -> str:
    """Like the vocabularies of CPM: <unk>, <s>, </s>, then control tokens, of which <pad> has id 5."""
    options = {"vocab_size": 500, "user_defined_symbols": OWN, "minloglevel": 2, **settings}
    model = io.BytesIO()
    lines = iter([line for line in TEXTS if line.strip()])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_the_ids_are_those_of_sentencepiece(tmp_path, model_type, byte_fallback, rule):
    kind = {"model_type": model_type, "byte_fallback": byte_fallback, "normalization_rule_name": rule}
    file = train(tmp_path / "x.model", vocab_size=600, **kind)
    library = sentencepiece.SentencePieceProcessor(model_file=file)

    tokenizer = load_sentencepiece(file)

    for text in [*TEXTS, *NASTY]:
        assert tokenizer(text)["input_ids"] == library.encode(text), text
        if byte_fallback:  # the library writes an unknown piece as a sign of its own
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == library.decode(library.encode(text))


@pytest.mark.parametrize("options", [{"add_dummy_prefix": False}, {"remove_extra_whitespaces": False}])
def test_the_settings_of_the_file_apply(tmp_path, options):
    file = train(tmp_path / "x.model", byte_fallback=True, vocab_size=600, **options)
    library = sentencepiece.SentencePieceProcessor(model_file=file)
    tokenizer = load_sentencepiece(file)

    for text in [*TEXTS, *NASTY]:
        assert tokenizer(text)["input_ids"] == library.encode(text), text


def test_a_control_token_splits_the_text_into_separate_parts(tmp_path):
    file = train(tmp_path / "x.model", byte_fallback=True)
    library, tokenizer = sentencepiece.SentencePieceProcessor(model_file=file), load_sentencepiece(file)

    assert tokenizer("早晨<sep>火苗")["input_ids"] == [*library.encode("早晨"), 4, *library.encode("火苗")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    file = train(tmp_path_factory.mktemp("spm") / "x.model", byte_fallback=True, vocab_size=600)
    return sentencepiece.SentencePieceProcessor(model_file=file), load_sentencepiece(file)


# The library encodes the text "</s>" as four characters, the tokenizer as the control token.
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\x00\u2581")
OTHERS = ["<s>", "</s>", "<unk>", *OWN]


@settings(deadline=None)
@given(text=st.text(CHARACTERS).filter(lambda text: not any(token in text for token in OTHERS)))
def test_any_text_has_the_ids_of_sentencepiece(opened, text):
    library, tokenizer = opened

    assert tokenizer(text)["input_ids"] == library.encode(text)


def test_the_pad_and_end_tokens_of_the_file_are_used(tmp_path):
    file = train(tmp_path / "chinese.model")

    tokenizer = load_tokenizer(file, pad_token="<pad>", eos_token="<eod>")

    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (5, 7, 0)
    assert tokenizer.convert_tokens_to_ids("<sep>") == 4
    assert len(tokenizer) == 500
    assert load_tokenizer(file).eos_token == "</s>"


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_saved_tokenizer_opens_with_plain_transformers(tmp_path, model_type):
    tokenizer = load_tokenizer(train(tmp_path / "x.model"), pad_token="<pad>", eos_token="<eod>")
    tokenizer.save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    config.write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    code = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps([tokenizer(text)["input_ids"] for text in json.loads(sys.argv[2])]))
"""

    command = [sys.executable, "-c", code, str(tmp_path / "saved"), json.dumps([*CHINESE, *NASTY])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert json.loads(done.stdout) == [tokenizer(text)["input_ids"] for text in [*CHINESE, *NASTY]]


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.model").write_text("no model", encoding="utf-8")

    with pytest.raises(ModelError, match="is not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "x.model"))


def test_a_model_of_words_is_refused(tmp_path):
    file = train(tmp_path / "x.model", model_type="word", vocab_size=40)

    with pytest.raises(ModelError, match="is a word or character model; expected Unigram or BPE"):
        load_sentencepiece(file)


def test_a_missing_package_suggests_its_extra(tmp_path, monkeypatch):
    file = train(tmp_path / "x.model")
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)

    with pytest.raises(
        ModelError, match=r"needs the package sentencepiece; fix: pip install 'hf_clm\[sentencepiece\]'"
    ):
        load_sentencepiece(file)
