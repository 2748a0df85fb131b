"""Uploads to the Hub, without training texts, tokens and the state of the optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_clm.errors import EnvironmentFault, UserError

# training_args.bin is a pickle that contains hub_token in plain text.
NEVER = ["_*", ".*", "checkpoint-*", "training_args.bin", "ledger.parquet"]
SHOWING_DATA = ["*.html", "label_rows.jsonl"]
WITH_DATA = {"report.html", "label_rows.jsonl"}  # uploaded if card.data_samples is set
LOGIN = "run `hf auth login` where there is a network, or remove push_to_hub and use `hf upload` later"
STATE = ["optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "training_args.bin"]


def check_can_push(arguments: TrainingArguments) -> None:
    """Raises EnvironmentFault if the Hub cannot be reached, or the user is not logged in."""
    if arguments.push_to_hub and arguments.process_index == 0:
        from huggingface_hub import HfApi

        with talking_to_the_hub():
            HfApi(token=arguments.hub_token).whoami()


@contextmanager
def talking_to_the_hub(
    *, what: str = "the Hub refused", where: str = "train.push_to_hub", fix: str = LOGIN
) -> Iterator[None]:
    """Converts errors of the Hub's client to an EnvironmentFault with a one-line message."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the Hub's client and its HTTP library raise various types
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EnvironmentFault(f"{what}: {line}", where=where, fix=fix) from error


def push_folder(
    folder: Path, *, repo_id: str | None, arguments: TrainingArguments, with_data: bool, message: str
) -> None:
    """Uploads a finished run. Raises EnvironmentFault with a command to do it by hand."""
    assert repo_id, "the Trainer creates the repository"
    pages = {path.name for pattern in SHOWING_DATA for path in folder.glob(pattern)}
    ignored = [*NEVER, *sorted(pages - WITH_DATA if with_data else pages)]
    from huggingface_hub import HfApi

    command = f"hf upload {repo_id} {folder} --exclude '*.html'"
    by_hand = f"the run is complete in {folder}; upload it with `{command}`"
    with talking_to_the_hub(what="the push failed", where=repo_id, fix=by_hand):
        HfApi(token=arguments.hub_token).upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            commit_message=message,
            revision=arguments.hub_revision,
            ignore_patterns=ignored,
        )


def push_checkpoint(
    folder: Path, *, repo_id: str | None, arguments: TrainingArguments, path_in_repo: str | None
) -> Any:
    """Starts to upload a checkpoint in the background, and returns the job.

    Uploads the model only or, with a ``path_in_repo``, everything except training_args.bin.
    """
    from huggingface_hub import HfApi

    assert repo_id, "the Trainer creates the repository"
    return HfApi(token=arguments.hub_token).upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        path_in_repo=path_in_repo,
        commit_message=f"Training in progress, {folder.name}",
        revision=arguments.hub_revision,
        ignore_patterns=["training_args.bin"] if path_in_repo else STATE,
        run_as_future=True,
    )
