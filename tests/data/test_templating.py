"""Records through a template: T is learned, R is read; <sep> is a token where the template writes it."""

import pytest
from helpers import EOS, X, build_recipe, byte_tokenizer, write_jsonl

from hf_clm.config import Data, Source
from hf_clm.data.build import build_split, load_examples, load_splits
from hf_clm.data.certificate import LabelOptions, certify, expected_runs
from hf_clm.data.datasets import PretrainDataset, SFTDataset
from hf_clm.data.labels import tokenize_segments
from hf_clm.data.segments import control_texts, to_document, to_prompt_segments, to_segments
from hf_clm.data.templating import to_template_example, to_template_prompt, to_template_words, with_title
from hf_clm.errors import DataError
from hf_clm.schema import Segment, SegmentsExample
from hf_clm.template import Template
from hf_clm.tokenizer import add_control_tokens

PAIR = Template(prompt="{a} = {b}?\n", completion="{label}", labels={"0": "no", "1": "yes"})
ESSAY = Template(text="{title}<sep>{content}")
SEP = 260


def sep_tokenizer():
    tokenizer = byte_tokenizer()
    add_control_tokens(tokenizer, ["<sep>"])
    return tokenizer


def own(text: str, *, is_target: bool) -> Segment:
    return Segment(text, is_target, is_own=True)


def test_the_prompt_is_read_and_the_word_of_the_label_is_learned():
    example = to_template_example({"a": "x", "b": "y", "label": 1, "idx": 7}, PAIR)

    assert example == SegmentsExample(
        [Segment("x", False), own(" = ", is_target=False), Segment("y", False), own("?\n", is_target=False),
         Segment("yes", True)]
    )  # fmt: skip
    assert SFTDataset([example], byte_tokenizer())[0] == {
        "input_ids": [*b"x = y?\nyes", EOS],
        "labels": [X] * 7 + [*b"yes", EOS],
    }


@pytest.mark.parametrize("label", ["0", 0])
def test_a_label_is_found_whether_the_file_gives_a_number_or_text(label):
    assert to_template_example({"a": "x", "b": "y", "label": label}, PAIR).segments[-1].text == "no"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"a": "x", "bb": "y", "label": "1"},
            "pairs.csv:9: the template names a column 'b'; "
            "got columns 'a', 'bb', 'label'; did you mean 'bb'?",
        ),
        (
            {"a": "x", "b": "y", "label": "2"},
            "pairs.csv:9: column 'label' has a value without a label; got '2'; "
            "fix: add it to the template's labels, which name '0', '1'",
        ),
        ({"a": "x", "b": None, "label": "1"}, "pairs.csv:9: column 'b': expected text or a number; got null"),
        (
            {"a": " ", "b": "y", "label": "1"},
            "pairs.csv:9: column 'a' is empty; got ' '; fix: fill it in, or remove the record",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_named_with_its_columns(record, message):
    with pytest.raises(DataError) as error:
        to_template_example(record, PAIR, where="pairs.csv:9")

    assert str(error.value) == message


def test_a_token_of_the_template_is_a_token_and_the_same_letters_of_a_user_are_text():
    example = to_template_example({"title": "a<sep>", "content": "b<sep>c"}, ESSAY)

    row = PretrainDataset([example], sep_tokenizer())[0]

    assert row["input_ids"] == [*b"a<sep>", SEP, *b"b<sep>c", EOS]
    assert row["labels"] == [X, *b"<sep>", SEP, *b"b<sep>c", EOS]
    assert control_texts(example, sep_tokenizer()) == ["<sep>", "<sep>"]


def test_a_token_that_user_and_template_spell_together_is_text():
    template = Template(text="{a}ep> {b}")
    example = to_template_example({"a": "<s", "b": "x"}, template)

    assert PretrainDataset([example], sep_tokenizer())[0]["input_ids"] == [*b"<sep> x", EOS]


def test_a_template_that_writes_the_stop_token_gets_no_second_one():
    template = Template(text="{a}<sep>{b}<|endoftext|>")
    example = to_template_example({"a": "x", "b": "y<|endoftext|>"}, template)

    row = PretrainDataset([example], sep_tokenizer())[0]

    assert row["input_ids"] == [*b"x", SEP, *b"y<|endoftext|>", EOS]


@pytest.mark.parametrize("ending", ["", "<|endoftext|>"])
@pytest.mark.parametrize(("stage", "dataset"), [("pretrain", PretrainDataset), ("sft", SFTDataset)])
def test_the_rows_of_a_template_are_certified(stage, dataset, ending):
    tokenizer = sep_tokenizer()
    text = Template(text="{title}<sep>{content}" + ending)
    pair = Template(prompt="{title}<sep>", completion="{content}" + ending)
    records = [{"title": "t", "content": "c"}, {"title": "<sep>", "content": "<|pad|> and <sep>"}]
    examples = [to_template_example(record, template) for record in records for template in (text, pair)]
    options = LabelOptions(stage=stage, stop_ids=(EOS,))

    found = certify(dataset(examples, tokenizer).rows, examples, tokenizer=tokenizer, options=options)

    assert dict(found.failed) == {}
    assert found.encoded_again == 2  # those in which the user spells no token
    assert expected_runs(examples[0], tokenizer, options=options) == [("t<sep>c<|endoftext|>", True)]


def test_a_token_of_the_user_that_became_one_is_not_certified():
    tokenizer = sep_tokenizer()
    example = to_template_example({"title": "<sep>", "content": "c"}, ESSAY)
    rows = PretrainDataset([example], tokenizer, special_tokens_in_text="allow").rows

    found = certify(rows, [example], tokenizer=tokenizer, options=LabelOptions("pretrain", stop_ids=(EOS,)))

    assert dict(found.failed) == {"control": 1}


def test_as_a_document_all_is_learned_and_the_template_stays_told_from_the_record():
    example = to_template_example({"a": "x", "b": "y", "label": 1}, PAIR)

    assert to_document(example) == SegmentsExample(
        [Segment("x", True), own(" = ", is_target=True), Segment("y", True), own("?\n", is_target=True),
         Segment("yes", True)]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "ids"),
    [
        ({"title": "t"}, [*b"t", SEP]),
        ({"title": "t", "content": ""}, [*b"t", SEP]),
        ({"title": "t", "content": "once"}, [*b"t", SEP, *b"once"]),
        ({"title": "<sep>", "content": "o"}, [*b"<sep>", SEP, *b"o"]),
    ],
)
def test_a_text_is_continued_where_the_record_ends(record, ids):
    template = Template(text="{title}<sep>{content}<|endoftext|>")

    segments = to_prompt_segments(to_template_prompt(record, template), sep_tokenizer())

    assert tokenize_segments(segments, sep_tokenizer())["input_ids"] == ids


def test_the_prompt_of_generation_is_that_of_training():
    record = {"a": "x", "b": "y", "label": 1}
    trained = tokenize_segments(
        to_segments(to_template_example(record, PAIR), byte_tokenizer()), byte_tokenizer()
    )
    asked = to_prompt_segments(to_template_prompt({"a": "x", "b": "y"}, PAIR), byte_tokenizer())

    given = tokenize_segments(asked, byte_tokenizer())["input_ids"]

    assert given == [*b"x = y?\n"]
    assert trained["input_ids"][: len(given)] == given


def test_words_of_the_command_line_are_the_first_columns():
    assert to_template_words("x", PAIR, input_text="y") == to_template_prompt({"a": "x", "b": "y"}, PAIR)
    with pytest.raises(DataError) as error:
        to_template_words("x", PAIR)

    assert str(error.value) == "--prompt: the template names a column 'b'; got columns 'a'"


def test_a_text_alone_has_a_title_and_a_content():
    assert with_title({"text": "\n Rain \n\nIt rains.\nIt pours.\n"}) == {
        "text": "\n Rain \n\nIt rains.\nIt pours.\n",
        "title": "Rain",
        "content": "It rains.\nIt pours.",
    }
    assert with_title({"text": "a\nb", "title": "own"}) == {"text": "a\nb", "title": "own"}


def test_a_folder_of_txt_files_becomes_essays(tmp_path):
    for name, text in (("b.txt", "Snow\nIt snows."), ("a.txt", "Rain\nIt rains.\n")):
        (tmp_path / name).write_text(text)
    source = Source(path=str(tmp_path), template=ESSAY)

    found = load_examples([source], Data(train=[source]))

    assert found.places == [f"{tmp_path}/a.txt:1", f"{tmp_path}/b.txt:1"]
    assert [segment.text for segment in found.examples[0].segments] == ["Rain", "<sep>", "It rains."]
    assert (found.formats, found.unknown_keys) == ({"template"}, set())


def test_a_csv_file_and_a_jsonl_file_give_the_same_rows(tmp_path):
    (tmp_path / "a.csv").write_text("idx,a,b,label\n1,x,y,1\n2,v,w,0\n")
    write_jsonl(tmp_path / "a.jsonl", [{"a": "x", "b": "y", "label": 1}, {"a": "v", "b": "w", "label": 0}])

    rows = []
    for name in ("a.csv", "a.jsonl"):
        train = [{"path": str(tmp_path / name), "template": PAIR.model_dump()}]
        recipe = build_recipe(tmp_path, [{"text": "unused"}], data={"train": train})
        split = build_split(load_splits(recipe, 0)[0], recipe, tokenizer=byte_tokenizer(), stage="sft")
        rows.append([split.rows[i] for i in range(2)])

    assert rows[0] == rows[1]
    assert rows[0][1]["input_ids"] == [*b"v = w?\nno", EOS]
