"""What goes to the Hub, and what never does: texts of the data, a token, the state of the optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_clm.errors import EnvironmentFault, UserError

# training_args.bin is a pickle that holds hub_token in clear.
NEVER = ["_*", ".*", "checkpoint-*", "training_args.bin", "ledger.parquet"]
SHOWING_DATA = ["*.html", "label_rows.jsonl"]
WITH_DATA = {"report.html", "label_rows.jsonl"}  # of these, where card.data_samples asks for it
LOGIN = "run `hf auth login` where there is a network; or leave out push_to_hub, and use `hf upload` later"
STATE = ["optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "training_args.bin"]


def check_can_push(arguments: TrainingArguments) -> None:
    """Raises EnvironmentFault now for a Hub that cannot be reached, or that nobody is logged in to."""
    if arguments.push_to_hub and arguments.process_index == 0:
        from huggingface_hub import HfApi

        with talking_to_the_hub():
            HfApi(token=arguments.hub_token).whoami()


@contextmanager
def talking_to_the_hub(
    *, what: str = "the Hub refuses", where: str = "train.push_to_hub", fix: str = LOGIN
) -> Iterator[None]:
    """What the Hub's client raises becomes an EnvironmentFault of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the HTTP library and of the Hub's client: they differ by version
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EnvironmentFault(f"{what}: {line}", where=where, fix=fix) from error


def push_folder(
    folder: Path, *, repo_id: str | None, arguments: TrainingArguments, with_data: bool, message: str
) -> None:
    """Uploads a finished run. Raises EnvironmentFault, with the way to do it by hand."""
    assert repo_id, "the Trainer made the repository"
    shown = {path.name for pattern in SHOWING_DATA for path in folder.glob(pattern)}
    ignored = [*NEVER, *sorted(shown - WITH_DATA if with_data else shown)]
    from huggingface_hub import HfApi

    by_hand = f"the run is whole in {folder}; push it by `hf upload {repo_id} {folder} --exclude '*.html'`"
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
    """Starts the upload of a checkpoint: its model or, with a ``path_in_repo``, all but the arguments.

    Returns the job, as the Trainer keeps it.
    """
    from huggingface_hub import HfApi

    assert repo_id, "the Trainer made the repository"
    return HfApi(token=arguments.hub_token).upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        path_in_repo=path_in_repo,
        commit_message=f"Training in progress, {folder.name}",
        revision=arguments.hub_revision,
        ignore_patterns=["training_args.bin"] if path_in_repo else STATE,
        run_as_future=True,
    )
