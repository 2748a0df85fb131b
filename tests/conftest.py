"""What holds for all tests: a cache of their own, and the same cases each time they are run.

HYPOTHESIS_PROFILE=default lets Hypothesis search at random.
"""

import os

import hypothesis
import pytest

from hf_clm.errors import Preempted

hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_CLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_exception_interact(call):
    """Ends the tests where a run under test took the SIGTERM that was meant for them: by a time limit."""
    stopped = call.excinfo.value
    if isinstance(stopped, Preempted) and stopped.reason == "SIGTERM":
        pytest.exit("SIGTERM", returncode=143)
