"""lm-evaluation-harness asks ``hf-clm serve`` as it asks any server: ``local-completions``, and local tasks.

The expected figures are computed here, from the model itself.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EOS, byte_tokenizer, save_folder, tiny_model, write_jsonl
from served import Server, served
from transformers import PreTrainedModel

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")  # of its extra "api"
pytestmark = pytest.mark.peer

CHOICES = ["yes", "no", "perhaps"]
RECORDS = [{"question": f"{word}?", "answer": CHOICES[n % 3]} for n, word in enumerate("abcdefgh")]
TASKS = {
    "choose": """\
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no", "perhaps"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
""",
    "say": """\
task: say
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
generation_kwargs: {{until: ["\\x00"], max_gen_toks: 5}}
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(tie_word_embeddings=False, seed=3)
    with torch.no_grad():  # far from uniform, so that the choices differ
        model.get_output_embeddings().weight.mul_(30)
    save_folder(folder, model, byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    with served(str(folder), "--name", "m") as server:
        yield server


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = tiny_model(tie_word_embeddings=False, seed=3)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    return model


def evaluated(server: Server, folder: Path, tmp_path: Path, *, task: str, **options: Any) -> list[Any]:
    """The samples of a task, with what the server answered."""
    file = write_jsonl(tmp_path / "records.jsonl", RECORDS)
    place = tmp_path / f"{task}.yaml"
    place.write_text(TASKS[task].format(file=json.dumps(file)))
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "m",
            "base_url": f"{server.url}/v1/completions",
            "tokenizer": str(folder),
            "tokenizer_backend": "huggingface",
            "max_length": 128,
            **options,
        },
        tasks=[task],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


@torch.no_grad()
def likelihood(model: PreTrainedModel, context: str, continuation: str) -> tuple[float, bool]:
    """The log-probability of a continuation, and whether it is the greedy one."""
    ids, size = list((context + continuation).encode()), len(context)
    logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)[size - 1 : -1]
    own = torch.tensor(ids[size:])
    return float(logprobs.gather(1, own[:, None]).sum()), bool((logprobs.argmax(-1) == own).all())


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_size": 3}, {"tokenized_requests": False, "batch_size": 2}],
    ids=["ids", "lists of ids", "texts"],
)
def test_likelihoods_are_those_of_the_model(server, folder, model, tmp_path, options):
    samples = evaluated(server, folder, tmp_path, task="choose", **options)

    assert len(samples) == len(RECORDS)
    for sample, record in zip(samples, RECORDS, strict=True):
        expected = [likelihood(model, record["question"], f" {choice}") for choice in CHOICES]
        found = [(float(one[0]), one[1]) for one in sample["filtered_resps"]]
        assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-3)
        assert [one[1] for one in found] == [one[1] for one in expected]


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"tokenized_requests": False, "batch_size": 4}])
def test_generated_answers_are_those_of_the_model(server, folder, model, tmp_path, options):
    samples = evaluated(server, folder, tmp_path, task="say", **options)

    for sample, record in zip(samples, RECORDS, strict=True):
        ids = torch.tensor([list(record["question"].encode())])
        plain = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 257, "eos_token_id": EOS}
        row = model.generate(ids, attention_mask=torch.ones_like(ids), **plain)[0, ids.shape[1] :].tolist()
        row = row[: row.index(EOS)] if EOS in row else row
        expected = byte_tokenizer().decode(row, skip_special_tokens=True)
        assert sample["resps"][0][0] == expected.split("\x00")[0]
