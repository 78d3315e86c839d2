"""Settings that every test shares: CPU, eight simulated devices, quick compilation, repeatable property tests."""

import os
import socket
from collections.abc import Iterator

import hypothesis
import jax
import jaxlib
import pytest

# Programs in tests are compiled once and run for milliseconds, so XLA need not optimise them: compiling is what they wait for.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jaxlib.__version__.startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # newer ones do not know this flag
else:
    QUICK += " --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"  # nor 0.10 this one

LONGEST = ("test_parallel", "test_runs", "test_processes", "test_transformer")
"""Files whose tests take longest where nothing is compiled yet."""

# For the programs that tests start, too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("XLA_FLAGS", QUICK)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # where in the source each operation is from: for profiles alone

jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_traceback_in_locations_limit", int(os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"]))
jax.config.update("jax_num_cpu_devices", 8)  # those programs see one device unless told otherwise

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config):
    """Compilations are kept between runs, and shared with the programs that tests start."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: one more than there are cores, for tests wait for programs of their own now and then."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """The longest files first, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """What a file's tests compiled goes with them: the programs of all tests together hold gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def unused_port() -> int:
    """A port on this machine that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
