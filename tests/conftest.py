"""What holds for all tests: a cache of their own, and the same cases each time they are run.

HYPOTHESIS_PROFILE=default lets Hypothesis search at random.
"""

import os

import hypothesis
import pytest

hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_CLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
