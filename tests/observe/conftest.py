import pytest

from tests.observe import synthetic


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished routed run; tests only read it."""
    return synthetic.write_run(tmp_path_factory.mktemp("runs") / "routed")


@pytest.fixture(scope="session")
def dense_run(tmp_path_factory):
    return synthetic.write_run(tmp_path_factory.mktemp("runs") / "dense", routed=False)
