"""Rendering records with a template: T is a target, R is context; <sep> in the template is a token."""

import pandas
import pytest
from helpers import EOS, X, build_recipe, byte_tokenizer, read_split, shown, write_jsonl

from hf_clm.data.label.datasets import PretrainDataset, SFTDataset
from hf_clm.data.label.labels import encode_prompts
from hf_clm.data.label.render import LabelOptions, Renderer
from hf_clm.data.prepared.sets import load_examples
from hf_clm.data.proof.certificate import certify
from hf_clm.data.read.plain_template import is_plain, plain_template
from hf_clm.data.read.templating import to_template_example, to_template_prompt, to_template_words, with_title
from hf_clm.errors import DataError
from hf_clm.recipe.recipe import Data, Source
from hf_clm.schema import Document, Segment
from hf_clm.template import Template
from hf_clm.text.tokenizer import add_control_tokens

PAIR = Template(prompt="{a} = {b}?\n", completion="{label}", labels={"0": "no", "1": "yes"})
ESSAY = Template(text="{title}<sep>{content}")
SEP = 260


def sep_tokenizer():
    tokenizer = byte_tokenizer()
    add_control_tokens(tokenizer, ["<sep>"])
    return tokenizer


def own(text: str) -> Segment:
    return Segment(text, 0.0, is_own=True)


def test_the_prompt_is_context_and_the_label_word_is_the_target():
    example = to_template_example({"a": "x", "b": "y", "label": 1, "idx": 7}, PAIR)

    assert example == Document(
        [Segment("x", 0.0), own(" = "), Segment("y", 0.0), own("?\n"), Segment("yes", 1.0)]
    )
    assert SFTDataset([example], byte_tokenizer())[0] == {
        "input_ids": [*b"x = y?\nyes", EOS],
        "labels": [X] * 7 + [*b"yes", EOS],
    }
    assert shown(PretrainDataset([example], byte_tokenizer())[0], byte_tokenizer()) == (
        "x⟦ = y?\nyes<|endoftext|>⟧"
    )


@pytest.mark.parametrize("label", ["0", 0])
def test_labels_match_numbers_and_text(label):
    assert to_template_example({"a": "x", "b": "y", "label": label}, PAIR).segments[-1].text == "no"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"a": "x", "bb": "y", "label": "1"},
            "pairs.csv:9: missing column 'b' of the template; "
            "got keys 'a', 'bb', 'label'; did you mean 'bb'?",
        ),
        (
            {"a": "x", "b": "y", "label": "2"},
            "pairs.csv:9: column 'label' has a value without a label; got '2'; "
            "fix: add it to the template's labels, which are '0', '1'",
        ),
        ({"a": "x", "b": None, "label": "1"}, "pairs.csv:9: column 'b': expected text or a number; got null"),
        ({"a": "x", "b": float("nan"), "label": "1"},
         "pairs.csv:9: column 'b': expected text or a number; got NaN"),
        ({"a": "x", "b": float("inf"), "label": "1"},
         "pairs.csv:9: column 'b': expected text or a number; got inf"),
        ({"a": "x", "b": pandas.NA, "label": "1"},
         "pairs.csv:9: column 'b': expected text or a number; got <NA>"),
        ({"a": " ", "b": "y", "label": "1"},
         "pairs.csv:9: column 'a' is empty; got ' '; fix: fill it in, or remove the record"),
    ],
)  # fmt: skip
def test_a_record_that_does_not_match_is_reported_with_its_columns(record, message):
    with pytest.raises(DataError) as error:
        to_template_example(record, PAIR, where="pairs.csv:9")

    assert str(error.value) == message


def test_control_tokens_are_tokens_in_templates_and_text_in_records():
    example = to_template_example({"title": "a<sep>", "content": "b<sep>c"}, ESSAY)

    row = PretrainDataset([example], sep_tokenizer())[0]

    assert row["input_ids"] == [*b"a<sep>", SEP, *b"b<sep>c", EOS]
    assert row["labels"] == [X, *b"<sep>", SEP, *b"b<sep>c", EOS]
    assert Renderer(sep_tokenizer(), LabelOptions()).control_texts(example) == ["<sep>", "<sep>"]


def test_a_token_formed_by_user_and_template_together_is_text():
    template = Template(text="{a}ep> {b}")
    example = to_template_example({"a": "<s", "b": "x"}, template)

    assert PretrainDataset([example], sep_tokenizer())[0]["input_ids"] == [*b"<sep> x", EOS]


def test_a_template_with_the_stop_token_has_only_one():
    template = Template(text="{a}<sep>{b}<|endoftext|>")
    example = to_template_example({"a": "x", "b": "y<|endoftext|>"}, template)

    row = PretrainDataset([example], sep_tokenizer())[0]

    assert row["input_ids"] == [*b"x", SEP, *b"y<|endoftext|>", EOS]


@pytest.mark.parametrize("ending", ["", "<|endoftext|>"])
@pytest.mark.parametrize("dataset", [PretrainDataset, SFTDataset])
def test_the_rows_of_a_template_are_certified_and_no_token_of_the_user_is(dataset, ending):
    tokenizer = sep_tokenizer()
    text = Template(text="{title}<sep>{content}" + ending)
    pair = Template(prompt="{title}<sep>", completion="{content}" + ending)
    records = [{"title": "t", "content": "c"}, {"title": "<sep>", "content": "<|pad|> and <sep>"}]
    examples = [to_template_example(record, template) for record in records for template in (text, pair)]
    options = LabelOptions(stage="pretrain" if dataset is PretrainDataset else "sft")

    failed = [
        dict(
            certify(
                dataset(examples, tokenizer, special_tokens_in_text=policy).rows,
                examples,
                tokenizer=tokenizer,
                options=options,
                stop_ids=[EOS],
            ).failed
        )
        for policy in ("encode_as_text", "allow")
    ]

    assert failed[0] == {}
    assert failed[1]


@pytest.mark.parametrize(
    ("record", "ids"),
    [
        ({"title": "t"}, [*b"t", SEP]),
        ({"title": "t", "content": ""}, [*b"t", SEP]),
        ({"title": "t", "content": "once"}, [*b"t", SEP, *b"once"]),
        ({"title": "<sep>", "content": "o"}, [*b"<sep>", SEP, *b"o"]),
    ],
)  # fmt: skip
def test_the_prompt_of_a_text_ends_where_the_record_ends(record, ids):
    template = Template(text="{title}<sep>{content}<|endoftext|>")

    prompt = to_template_prompt(record, template)

    assert encode_prompts([prompt], sep_tokenizer(), LabelOptions()) == [ids]


def test_the_prompt_of_generation_is_that_of_training():
    prompt = to_template_prompt({"a": "x", "b": "y"}, PAIR)
    trained = SFTDataset([to_template_example({"a": "x", "b": "y", "label": 1}, PAIR)], byte_tokenizer())[0]

    assert encode_prompts([prompt], byte_tokenizer(), LabelOptions()) == [[*b"x = y?\n"]]
    assert trained["input_ids"][:7] == [*b"x = y?\n"]


def test_command_line_text_fills_the_first_columns():
    assert to_template_words("x", PAIR, input_text="y") == to_template_prompt({"a": "x", "b": "y"}, PAIR)
    with pytest.raises(DataError) as error:
        to_template_words("x", PAIR)

    assert str(error.value) == "--prompt: missing column 'b' of the template; got keys 'a'"


def test_a_text_only_record_has_title_and_content():
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

    found = load_examples(Data(train=[source]))

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
        split = read_split(recipe)
        rows.append([split.rows[i] for i in range(2)])

    assert rows[0] == rows[1]
    assert rows[0][1]["input_ids"] == [*b"v = w?\nno", EOS]


# --- the chat template that is saved with a model of plain prompts

ALPACA = (
    "Below is an instruction that describes a task{more}. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd {{1}}.\n\n"
)
MORE = ", paired with an input that provides further context"
PLAIN_PAIR = Template(prompt="{a}'s \\ = {b}?\n", completion="{label}", labels={"1": "yes"})
USER = {"role": "user", "content": "Add {1}."}


@pytest.mark.parametrize(
    ("format", "template", "messages", "prompt"),
    [
        ("prompt_completion", None, [USER], "Add {1}."),
        ("instruct", None, [USER], "Add {1}."),
        ("instruct", None, [{**USER, "input": " 2, 3"}], "Add {1}. 2, 3"),
        ("alpaca", None, [USER], ALPACA.format(more="") + "### Response:\n"),
        ("alpaca", None, [{**USER, "input": "2, 3"}],
         ALPACA.format(more=MORE) + "### Input:\n2, 3\n\n### Response:\n"),
        ("alpaca", None, [{"role": "system", "content": "Be brief."}, USER],
         "Be brief.\n\n### Instruction:\nAdd {1}.\n\n### Response:\n"),
        ("template", PLAIN_PAIR, [{"role": "user", "content": "x", "b": "y"}], "x's \\ = y?\n"),
    ],
)  # fmt: skip
def test_a_plain_template_renders_the_prompts_of_training(format, template, messages, prompt):
    for starts, start in ((False, ""), (True, "<|endoftext|>")):
        tokenizer = byte_tokenizer()
        tokenizer.bos_token = "<|endoftext|>"
        tokenizer.chat_template = plain_template(format, template, starts=starts)

        assert (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            == start + prompt
        )
        whole = [*messages, {"role": "assistant", "content": "6"}]
        assert tokenizer.apply_chat_template(whole, tokenize=False) == f"{start}{prompt}6<|endoftext|>"
        assert is_plain(tokenizer)


@pytest.mark.parametrize(
    ("format", "messages", "message"),
    [
        ("instruct", [USER, {"role": "assistant", "content": "6"}, USER], "was trained on single questions"),
        ("instruct", [{"role": "assistant", "content": "6"}], "was trained on single questions"),
        ("instruct", [{"role": "system", "content": "Be brief."}, USER], "was trained without system texts"),
    ],
)  # fmt: skip
def test_a_plain_template_refuses_other_prompts(format, messages, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = plain_template(format, None, starts=False)

    with pytest.raises(Exception, match=message):
        tokenizer.apply_chat_template(messages, tokenize=False)


def test_texts_and_chats_have_no_plain_template():
    assert plain_template("text", None, starts=False) is None
    assert plain_template("messages", None, starts=False) is None
    assert plain_template("template", ESSAY, starts=False) is None
    assert not is_plain(byte_tokenizer())


def test_a_template_reaches_into_nested_columns():
    template = Template(prompt="{instruction}: {instances[0].input}", completion="{instances[0].output}")
    record = {"instruction": "add", "instances": [{"input": "2+2", "output": "4"}]}

    assert list(to_template_example(record, template).texts) == ["add", ": ", "2+2", "4"]
    assert list(to_template_example({"a.b": "flat", "a": {"b": "x"}}, Template(text="{a.b}")).texts) == [
        "flat"
    ]
    with pytest.raises(DataError) as error:
        to_template_example({**record, "instances": [{"input": "2+2"}]}, template, where="f:1")
    assert str(error.value) == (
        "f:1: missing column 'instances[0].output' of the template; "
        "got instances[0] without 'output', with keys 'input'"
    )
    with pytest.raises(DataError, match=r"got instances, which is a list of 0, without '\[0\]'"):
        to_template_prompt({**record, "instances": []}, template)


def test_a_text_ends_before_its_first_column_with_a_missing_number():
    assert list(to_template_prompt({"a": "x", "b": float("nan")}, Template(text="{a} {b}")).texts) == [
        "x",
        " ",
    ]
