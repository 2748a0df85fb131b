"""Nothing that a test prepares is kept in the user's own cache."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_CLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
