"""A checkpoint counts if it is sealed and intact. Rotation is by step."""

import json
import os
from pathlib import Path

import pytest

from hf_clm.cli import main
from hf_clm.errors import RecipeError
from hf_clm.training.checkpoints import (
    clear_place,
    describe_checkpoints,
    drop_broken,
    fault_of,
    find_checkpoints,
    newest_sealed,
    rotate,
    seal,
)

FILES = {"model.safetensors": "weights", "optimizer.pt": "optimizer", "trainer_state.json": "{}"}


def saved(run: Path, step: int) -> Path:
    """Writes a checkpoint like the Trainer's."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def sealed(run: Path, step: int) -> Path:
    folder = saved(run, step)
    seal(folder, {"step": step, "is_resumable": True, "fingerprints": {"data": "rows"}})
    return folder


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_the_seal_contains_sizes_and_hashes(tmp_path):
    folder = sealed(tmp_path, 4)

    content = json.loads((folder / "SEALED.json").read_text())
    assert content["step"] == 4
    assert sorted(content["files"]) == ["model.safetensors", "optimizer.pt", "trainer_state.json"]
    assert content["files"]["trainer_state.json"] == {
        "size": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",  # of {}
    }
    assert fault_of(folder) == ""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["flipped bit", "cut", "gone"])
def test_a_damaged_file_is_named(tmp_path, name, fault):
    """All three are detected in each file. A flipped bit does not change the size and the time."""
    path = sealed(tmp_path, 4) / name
    content, times = path.read_bytes(), path.stat()
    if fault == "flipped bit":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif fault == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()

    assert (
        fault_of(path.parent)
        == {
            "flipped bit": f"{name} has changed since it was saved (sha256)",
            "cut": f"{name} has {len(content) - 1} bytes instead of {len(content)}",
            "gone": f"{name} is missing",
        }[fault]
    )


def test_a_checkpoint_without_a_complete_seal_does_not_count(tmp_path):
    sealed(tmp_path, 4)
    saved(tmp_path, 8)
    torn = sealed(tmp_path, 12) / "SEALED.json"
    torn.write_bytes(torn.read_bytes()[:40])

    assert newest_sealed(tmp_path) == tmp_path / "checkpoint-4"
    assert drop_broken(tmp_path) == [
        "checkpoint checkpoint-12: SEALED.json is damaged; moved to checkpoint-12.broken",
        "checkpoint checkpoint-8: not sealed: its save was interrupted; moved to checkpoint-8.broken",
    ]
    assert names(tmp_path) == ["checkpoint-12.broken", "checkpoint-4", "checkpoint-8.broken"]


@pytest.mark.parametrize("key", ['"is_resumable"', '"step"', '"sha256"', "true", "rows"])
def test_a_flipped_bit_in_a_seal_is_detected(tmp_path, key):
    path = sealed(tmp_path, 4) / "SEALED.json"
    assert fault_of(path.parent) == ""
    text = path.read_text()
    path.write_text(text.replace(key, key[:2] + chr(ord(key[2]) ^ 1) + key[3:], 1))
    assert path.read_text() != text

    assert fault_of(path.parent) == "SEALED.json is damaged"
    assert newest_sealed(tmp_path) is None


def test_checkpoints_are_ordered_by_step_whatever_their_names_and_times(tmp_path):
    for step in (9, 10, 100):
        os.utime(sealed(tmp_path, step), (10**9 - step, 10**9 - step))
    (tmp_path / "checkpoint-best").mkdir()

    assert [path.name for path in find_checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (2, None, [3, 4]),
        (1, None, [3, 4]),  # were the last damaged, there would be none
        (3, None, [2, 3, 4]),
        (2, "run/checkpoint-1", [1, 3, 4]),
        (None, None, [1, 2, 3, 4]),
    ],
)
def test_rotation_keeps_the_last_by_step_at_least_two_and_the_best(tmp_path, limit, best, kept):
    for step in (1, 2, 3, 4):
        os.utime(sealed(tmp_path, step), (10**9 - step, 10**9 - step))

    rotate(tmp_path, limit=limit, best=best)

    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_rotation_neither_counts_nor_deletes_unsealed_checkpoints(tmp_path):
    for step in (1, 2, 4):
        sealed(tmp_path, step)
    saved(tmp_path, 3)

    rotate(tmp_path, limit=2, best=None)

    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_partly_deleted_checkpoints_are_removed(tmp_path):
    sealed(tmp_path, 2)
    (tmp_path / "checkpoint-1.del").mkdir()

    assert drop_broken(tmp_path) == []
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_save_never_writes_into_an_older_checkpoint(tmp_path):
    clear_place(sealed(tmp_path, 1))
    clear_place(sealed(tmp_path, 1))
    clear_place(saved(tmp_path, 1))

    assert names(tmp_path) == ["checkpoint-1.broken", "checkpoint-1.later", "checkpoint-1.later-2"]


def test_the_list_shows_which_checkpoints_are_intact(tmp_path):
    sealed(tmp_path, 9)
    (sealed(tmp_path, 10) / "optimizer.pt").unlink()

    lines, are_whole = describe_checkpoints(tmp_path)
    assert lines == [
        "checkpoint-9     3 files         0.0 MB  sealed, verified",
        "checkpoint-10    2 files         0.0 MB  optimizer.pt is missing",
    ]
    assert not are_whole


def test_the_command_returns_0_only_if_all_checkpoints_are_intact(tmp_path, capsys):
    sealed(tmp_path, 9)
    assert main(["checkpoints", str(tmp_path)]) == 0
    (sealed(tmp_path, 10) / "optimizer.pt").unlink()

    assert main(["checkpoints", str(tmp_path)]) == 6
    assert capsys.readouterr().out.splitlines()[-1].endswith("optimizer.pt is missing")


def test_a_folder_without_checkpoints_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match="no checkpoint-N folders"):
        describe_checkpoints(tmp_path)
