"""Blocks made by Ray equal those of one process, whatever happens to its workers."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest
from helpers import byte_tokenizer, write_jsonl
from prepared_sets import content_of, differing, recipe_of, write_set

import hf_clm
from hf_clm.data.prepared import chunks
from hf_clm.data.prepared.cluster import RayBlocks
from hf_clm.errors import DataError, EnvironmentFault, ExitCode, RecipeError
from hf_clm.text.tokenizer import use_chat_template
from hf_clm.training.prepare import prepare_recipe

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # a worker imports torch and transformers

RECORDS = [{"prompt": f"p{n}", "completion": "x" * (n % 9 + 1)} for n in range(60)]
BAD = {"prompt": "p", "completion": 7}
# Custom formats that kill the process that reads a certain record.
FORMATS = """
import os
import signal
from pathlib import Path

from hf_clm.schema import Document, Segment

KILLED = Path(__file__).with_name("killed")


def read(record):
    return Document([Segment(record["prompt"], 0.0), Segment(record["completion"], 1.0)])


def die_once(record):
    if record["prompt"] == "p30" and not KILLED.exists():
        KILLED.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return read(record)


def die(record):
    if record["prompt"] == "p30":
        os.kill(os.getpid(), signal.SIGKILL)
    return read(record)
"""


@pytest.fixture(scope="module", autouse=True)
def formats(tmp_path_factory):
    """The folder of the formats' module, which workers find through PYTHONPATH."""
    terminate = signal.getsignal(signal.SIGTERM)
    folder = tmp_path_factory.mktemp("formats")
    (folder / "formats_of_ray_test.py").write_text(FORMATS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join((str(folder), str(Path(hf_clm.__file__).parents[1]))))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield folder
    ray.shutdown()
    signal.signal(signal.SIGTERM, terminate)  # ray.init leaves its own
    sys.modules.pop("formats_of_ray_test", None)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch):
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 300)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 100)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "no-such-host.invalid:6379", "nonsense"]
)
def test_a_cluster_that_does_not_respond_is_a_one_line_error(address):
    ray.shutdown()
    write_jsonl(Path("a.jsonl"), RECORDS)

    with pytest.raises(EnvironmentFault) as error:
        write_set(recipe_of(["a.jsonl"]), make_blocks=RayBlocks(address))

    message = rf"--ray: no Ray cluster responds: .+; got {address}; fix: start one: ray start --head"
    assert re.fullmatch(message, str(error.value))
    assert error.value.exit_code == ExitCode.ENVIRONMENT
    assert list(Path("cache").iterdir()) == []


def test_a_missing_package_suggests_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    write_jsonl(Path("a.jsonl"), RECORDS)

    with pytest.raises(EnvironmentFault) as error:
        write_set(recipe_of(["a.jsonl"]), make_blocks=RayBlocks("local"))

    assert str(error.value) == "--ray: needs the package ray; fix: pip install 'hf_clm[ray]'"


def mixed_recipe() -> Any:
    """Two formats, weights in the second half, unusable records, duplicates, and held-out records."""
    weighted = [{**record, "weight": 0.5 if n > 30 else 1.0} for n, record in enumerate(RECORDS)]
    write_jsonl(Path("a.jsonl"), [*weighted[:20], BAD, *weighted[20:], *weighted[3:9]])
    turns = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo" * n}] for n in range(9)
    ]
    write_jsonl(Path("b.jsonl"), [{"messages": messages} for messages in turns[1:]])
    return recipe_of(["a.jsonl", "b.jsonl"], eval_fraction=0.2, duplicates="drop", on_bad_record="drop")


def test_a_set_that_ray_made_is_the_one_that_one_process_makes():
    recipe, cluster, tokenizer = mixed_recipe(), RayBlocks("local"), byte_tokenizer()
    use_chat_template(tokenizer, "chatml")

    write_set(recipe, Path("cache/ray"), tokenizer=tokenizer, make_blocks=cluster)
    write_set(recipe, Path("cache/loop"), tokenizer=tokenizer)

    found = content_of(Path("cache/ray"))
    assert differing(found, content_of(Path("cache/loop"))) == []
    assert found["prepared.json"]["proof"]["facts"]["train"]["ledger"]["unreadable"]["rows"] == 1
    assert sum(cluster.made.values()) > 4
    assert all(re.fullmatch(r"ray       \S+ process \d+: \d+ blocks", line) for line in cluster.to_lines())


def test_blocks_of_a_killed_worker_are_made_again(formats):
    write_jsonl(Path("a.jsonl"), RECORDS)
    recipe = recipe_of([{"path": "a.jsonl", "format": "formats_of_ray_test:die_once"}])

    write_set(recipe, Path("cache/ray"), make_blocks=RayBlocks("local"))

    assert (formats / "killed").exists()
    write_set(recipe, Path("cache/loop"))
    assert differing(content_of(Path("cache/ray")), content_of(Path("cache/loop"))) == []


def test_the_command_reports_who_made_the_blocks(tmp_path):
    data = {"cache_dir": str(tmp_path / "cache")}

    lines = prepare_recipe(helpers.build_recipe(tmp_path, RECORDS, data=data), ray="local")
    again = prepare_recipe(helpers.build_recipe(tmp_path, RECORDS, data=data), ray="local")

    made = [int(line.split()[-2]) for line in lines if line.startswith("ray       ")]
    assert sum(made) > 4
    assert [line for line in again if line.startswith("ray")] == []


def test_unusable_records_in_all_blocks_are_listed_by_file_and_line():
    write_jsonl(Path("a.jsonl"), [BAD, *RECORDS[:15], BAD, *RECORDS[15:], BAD])

    with pytest.raises(DataError) as error:
        write_set(recipe_of(["a.jsonl"]), make_blocks=RayBlocks("local"))

    lines = str(error.value).splitlines()
    assert lines[0].startswith("3 errors in the data")
    places = [line.split()[0] for line in lines if line.startswith("  ")]
    assert places == ["a.jsonl:1", "a.jsonl:17", "a.jsonl:63"]


def test_an_error_that_a_task_raises_is_raised_as_it_is():
    write_jsonl(Path("a.jsonl"), RECORDS)
    recipe = recipe_of([{"path": "a.jsonl", "format": "formats_of_ray_test:no_such"}])

    with pytest.raises(RecipeError, match=r"^format: no such format 'formats_of_ray_test:no_such'"):
        write_set(recipe, make_blocks=RayBlocks("local"))


@pytest.mark.large  # Ray tries again for a while
def test_a_block_that_kills_every_worker_is_a_one_line_error():
    write_jsonl(Path("a.jsonl"), RECORDS)
    recipe = recipe_of([{"path": "a.jsonl", "format": "formats_of_ray_test:die"}])

    message = r"^--ray: Ray failed: .+; got local; fix: see Ray's logs$"
    with pytest.raises(EnvironmentFault, match=message):
        write_set(recipe, make_blocks=RayBlocks("local"))

    assert list(Path("cache").iterdir()) == []
