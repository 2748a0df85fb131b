"""The data in the page. How the page shows it is tested in a browser."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import EOS, PAD, X, byte_tokenizer

from hf_clm.data.batch.collators import DataCollatorForCausalLM
from hf_clm.pages.labels_page import Charts, to_content, write_page
from hf_clm.pages.rows import Document, Row, Vocabulary, to_rows

VOCABULARY = Vocabulary(byte_tokenizer())


def to_row(ids: list[int], labels: list[int], *documents: Document) -> Row:
    return Row(4, np.array(ids), np.array(labels), documents or (Document(0, len(ids)),))


def read_data(path: Path) -> dict[str, Any]:
    _, _, rest = path.read_text(encoding="utf-8").partition('id="data">')
    return json.loads(rest.partition("</script>")[0])


def test_tokens_are_numbers_into_a_table_of_texts_and_bytes():
    content = to_content([to_row([98, EOS, 97, 97, 0xE8], [X, X, X, X, X])], VOCABULARY)

    assert content["ids"] == [97, 98, 0xE8, EOS]
    assert content["table"] == ["a", "b", [0xE8], "<|endoftext|>"]
    assert content["control"] == [3]
    assert content["bytes"] == 2
    assert list(base64.b64decode(content["tokens"])) == [1, 0, 3, 0, 0, 0, 0, 0, 2, 0]


def test_more_than_65536_different_tokens_take_four_bytes_each():
    ids = list(range(65_537))

    content = to_content([to_row(ids, [X] * len(ids))], VOCABULARY)

    assert content["bytes"] == 4
    assert list(base64.b64decode(content["tokens"])[-4:]) == [0, 0, 1, 0]


def test_a_row_lists_where_it_changes_and_what_is_known_of_its_documents():
    first = Document(0, 3, "a.jsonl:17", ((0, "user"), (1, "assistant")), 0, 5, {"cut answer": "x"})
    second = Document(3, 4, "b.json: record 2", ((3, "user"),), 2, 0, {"duplicate": "of y"})
    row = to_row([97, 98, 99, 100, PAD], [X, 98, 99, 7, X], first, second)

    content = to_content([row], VOCABULARY)

    assert content["rows"] == [
        [
            4,
            5,
            [1, 4],
            {3: 7},
            [
                [0, 3, 0, ":17", 0, 5, {2: "x"}, [[0, 0], [1, 1]]],
                [3, 4, 1, ": record 2", 2, 0, {5: "of y"}, [[3, 0]]],
            ],
        ]
    ]
    assert (content["files"], content["roles"]) == (["a.jsonl", "b.json"], ["user", "assistant"])
    assert [name for name, _ in content["flags"]][2] == "cut answer"


def test_a_row_that_begins_trained_changes_at_its_first_token():
    assert to_content([to_row([97, 98], [97, X])], VOCABULARY)["rows"][0][2] == [0, 1]


def test_nothing_in_the_data_can_end_its_script_element(tmp_path):
    document = Document(0, 1, place="</script><script>alert(1)</script>:3", flags={"duplicate": "<!--"})

    write_page(
        tmp_path / "labels.html",
        [to_row([60], [60], document)],
        vocabulary=VOCABULARY,
        facts={"<b>": "</SCRIPT ><img src=x onerror=alert(1)>"},
    )

    text = (tmp_path / "labels.html").read_text(encoding="utf-8")
    data = text.partition('id="data">')[2].partition("</script>\n<script>")[0]
    assert "<" not in data
    assert json.loads(data)["table"] == ["<"]
    assert read_data(tmp_path / "labels.html")["facts"] == [["<b>", "</SCRIPT ><img src=x onerror=alert(1)>"]]


def test_the_page_names_no_address_to_load_from(tmp_path):
    write_page(tmp_path / "labels.html", [], vocabulary=VOCABULARY, facts={})

    text = (tmp_path / "labels.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert [word for word in ("src=", "href=", "url(", "@import", "https:", "fetch(") if word in text] == []


def test_charts_hold_the_histogram_and_the_share_over_max_length(tmp_path):
    charts = Charts(np.array([1, 10, 30, 40]), 30, {"packed": 0.5})

    write_page(tmp_path / "labels.html", [], vocabulary=VOCABULARY, facts={"rows": 4}, charts=charts)

    data = read_data(tmp_path / "labels.html")
    assert data["charts"]["over"] == 0.25
    assert data["charts"]["fills"] == [["packed", 0.5]]
    assert [i for i, count in enumerate(data["charts"]["counts"]) if count] == [1, 10, 30, 39]
    assert (len(data["charts"]["edges"]), data["charts"]["edges"][-1]) == (41, 40.0)
    assert data["facts"] == [["rows", "4"]]


def test_a_batch_of_a_trainer_can_be_written_without_its_records(tmp_path):
    batch = DataCollatorForCausalLM(PAD)([{"input_ids": [65, 66], "labels": [X, 66]}])
    batch["labels"] = batch["labels"].to(torch.int32)
    facts = {"step": 17, "learning rate": 1e-3, "gradient norm": float("nan")}

    write_page(tmp_path / "batch.html", to_rows(batch), vocabulary=VOCABULARY, facts=facts)

    data = read_data(tmp_path / "batch.html")
    assert data["facts"] == [["step", "17"], ["learning rate", "0.001"], ["gradient norm", "nan"]]
    assert data["rows"] == [[0, 2, [1], {}, [[0, 2, 0, "", 0, 0, {}, []]]]]
    assert data["charts"] is None
