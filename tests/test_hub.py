"""Names on the Hub. No test uses the network: the client raises or returns the answers of the Hub."""

import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from hf_clm.errors import EnvironmentFault, ModelError
from hf_clm.hub import load_options, loading

RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    load_options.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield
    load_options.cache_clear()


def answer(monkeypatch, error: Exception | None) -> list[tuple]:
    """Lets the Hub raise ``error``, or find the model. Returns its requests."""
    asked = []

    def model_info(self, name, *, revision=None, timeout=None):
        asked.append((name, revision, timeout))
        if error is not None:
            raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return asked


def fill_cache(folder: Path, name: str, revision: str) -> None:
    snapshot = folder / "cache" / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / revision).write_text("abc")


def test_a_folder_is_never_looked_up(tmp_path, monkeypatch):
    asked = answer(monkeypatch, None)

    assert load_options(str(tmp_path), revision="v1", where="model") == {"revision": "v1"}
    assert asked == []


@pytest.mark.parametrize("name", ["/no/such", "./such", "../such", "~/such", "runs/poems/checkpoint-3"])
def test_a_path_without_a_folder_is_never_looked_up(monkeypatch, name):
    asked = answer(monkeypatch, None)

    with pytest.raises(ModelError, match=r"^model: no such folder; got '.*such|checkpoint-3'") as error:
        load_options(name, revision=None, where="model")

    assert error.value.exit_code == 4
    assert asked == []


def test_a_name_on_the_hub_is_looked_up_once(monkeypatch):
    asked = answer(monkeypatch, None)

    for _ in range(2):
        options = load_options("org/name", revision="v1", where="model")

    assert options == {"revision": "v1", "local_files_only": False}
    assert asked == [("org/name", "v1", 10)]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            GatedRepoError("403", response=RESPONSE),
            "model: the repository is gated; got 'org/name'; "
            "fix: accept the licence on the model's page, then run `hf auth login`",
        ),
        (
            RepositoryNotFoundError("404", response=RESPONSE),
            "model: neither a local folder nor a repository on the Hub; got 'org/name'; "
            "fix: correct the name; a private repository needs `hf auth login`",
        ),
        (
            RevisionNotFoundError("404", response=RESPONSE),
            "model: no revision 'v9'; got 'org/name'; fix: correct model.revision",
        ),
    ],
)
def test_a_refusal_by_the_hub_is_a_model_error_even_if_the_model_is_cached(
    tmp_path, monkeypatch, error, message
):
    answer(monkeypatch, error)
    fill_cache(tmp_path, "org/name", "v9")

    with pytest.raises(ModelError) as caught:
        load_options("org/name", revision="v9", where="model")

    assert str(caught.value) == message


def test_an_invalid_name_is_refused_without_a_network():
    with pytest.raises(ModelError, match=r"neither a local folder nor .* got 'a model!'"):
        load_options("a model!", revision=None, where="model")


def test_without_a_network_an_uncached_name_is_refused_quickly(monkeypatch):
    """Port 9 of this machine does not answer; the request itself is real."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()

    with pytest.raises(
        EnvironmentFault, match=r"^model: 'org/name' is neither a local folder nor in the cache"
    ) as error:
        load_options("org/name", revision=None, where="model")

    assert time.monotonic() - started < 3
    assert "the Hub cannot be reached" in str(error.value)
    assert "fix: run `hf download org/name` where there is a network, or use a local folder" in str(
        error.value
    )
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 6


def test_without_a_network_a_cached_name_is_used(tmp_path, monkeypatch):
    answer(monkeypatch, ConnectionError("no route to host"))
    fill_cache(tmp_path, "org/name", "main")

    assert load_options("org/name", revision=None, where="model") == {
        "revision": None,
        "local_files_only": True,
    }
    with pytest.raises(EnvironmentFault, match=r"\(no route to host\)"):
        load_options("org/other", revision=None, where="model")


def test_offline_mode_is_named_as_the_reason(monkeypatch):
    answer(monkeypatch, ConnectionError("cannot reach it: offline mode is enabled"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    with pytest.raises(EnvironmentFault, match=r"\(HF_HUB_OFFLINE is set\)"):
        load_options("org/name", revision=None, where="model")


def test_errors_of_from_pretrained_become_one_line():
    with pytest.raises(ModelError) as error, loading("folder", where="model"):
        raise ValueError("\nfirst line\nsecond line")

    assert str(error.value) == "model folder: cannot be loaded: first line"


def test_an_error_without_a_message_is_named_by_its_type():
    with (
        pytest.raises(ModelError, match=r"^model folder: cannot be loaded: KeyError$"),
        loading("folder", where="model"),
    ):
        raise KeyError


def test_a_user_error_passes_through_unchanged():
    with pytest.raises(EnvironmentFault, match=r"^no disk$"), loading("folder", where="model"):
        raise EnvironmentFault("no disk")
