"""Looks up folders and Hub names, and turns loading errors into one line with a fix."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError

from hf_clm.errors import EnvironmentFault, ModelError, UserError

LOCAL_PREFIXES = ("/", "./", "../", "~")
TIMEOUT_SECONDS = 10
# Names that a script of ours gets from elsewhere: what to do without the Hub.
ELSEWHERE = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "run `python data/get_smollm2.py`, and set model.name_or_path to "
    "data/local/smollm2-135m-instruct",
}
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, EOFError, pickle.UnpicklingError)


@contextmanager
def loading(name_or_path: str, *, where: str) -> Iterator[None]:
    """Converts the errors of a ``from_pretrained`` call to a one-line ModelError."""
    try:
        yield
    except UserError:
        raise
    except (*LOADING_ERRORS, SafetensorError) as error:
        runs_code = "trust_remote_code" in str(error)
        what = "contains custom code" if runs_code else f"cannot be loaded: {_first_line(error)}"
        fix = "review the code, then set model.trust_remote_code and model.revision" if runs_code else ""
        raise ModelError(what, where=f"{where} {name_or_path}", fix=fix) from error


@lru_cache(maxsize=16)
def load_options(name_or_path: str, *, revision: str | None, where: str) -> dict[str, object]:
    """Returns the ``revision`` and ``local_files_only`` arguments for ``from_pretrained``.

    Queries the Hub once, without retries, as ``from_pretrained`` retries for most of a minute without a
    network. A cached repository needs no network.

    Raises ModelError for a missing folder, a missing, gated or private repository or a missing revision;
    EnvironmentFault if the Hub cannot be reached and the repository is not cached.
    """
    if Path(name_or_path).expanduser().is_dir():
        return {"revision": revision}
    if name_or_path.startswith(LOCAL_PREFIXES) or name_or_path.count("/") > 1:
        from hf_clm.recipe.shipped import how_to_make

        fix = how_to_make(name_or_path) or "a Hub id has the form 'organisation/name'"
        raise ModelError("no such folder", where=where, got=repr(name_or_path), fix=fix)
    return {"revision": revision, "local_files_only": not _is_on_hub(name_or_path, revision, where=where)}


def _is_on_hub(name: str, revision: str | None, *, where: str) -> bool:
    """Returns True if it is on the Hub, False if the Hub cannot be reached but it is cached; else raises."""
    from huggingface_hub import (
        HfApi,
        try_to_load_from_cache,
    )  # 0.3 s to import; not needed for a local folder
    from huggingface_hub import errors as hub

    got = repr(name)
    try:
        HfApi().model_info(name, revision=revision, timeout=TIMEOUT_SECONDS)
        return True
    except hub.GatedRepoError as error:
        fix = "accept the licence on the model's page, then run `hf auth login`"
        raise ModelError("the repository is gated", where=where, got=got, fix=fix) from error
    except hub.RevisionNotFoundError as error:
        raise ModelError(
            f"no revision {revision!r}", where=where, got=got, fix="correct model.revision"
        ) from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        fix = "correct the name; a private repository needs `hf auth login`"
        raise ModelError(
            "neither a local folder nor a repository on the Hub", where=where, got=got, fix=fix
        ) from error
    except Exception as error:  # the HTTP library, and with it the exceptions, differ between versions
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return False
        raise _unreachable(name, error, where=where) from error


def is_offline() -> bool:
    """Returns whether the environment puts the Hub's client in offline mode."""
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")


def _unreachable(name: str, error: Exception, *, where: str) -> EnvironmentFault:
    from huggingface_hub.constants import HF_HUB_CACHE

    reason = "HF_HUB_OFFLINE is set" if is_offline() else _first_line(error)
    fetched = f"run `hf download {name}` where there is a network, or use a local folder"
    return EnvironmentFault(
        f"{name!r} is neither a local folder nor in the cache {HF_HUB_CACHE}, and the Hub cannot be reached"
        f" ({reason})",
        where=where,
        fix=ELSEWHERE.get(name, fetched),
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
