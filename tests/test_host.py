"""What `host.tune` sets, and what it leaves alone."""

import os

import jax
import pytest

from tinyonn_jax import host

COPIES = "--xla_cpu_copy_insertion_use_region_analysis=true"
EIGEN = "--xla_cpu_multi_thread_eigen=false"


@pytest.mark.parametrize(
    ("cores", "before", "after"),
    [
        (2, "", f"{COPIES} {EIGEN}"),
        (2, "--xla_dump_to=x", f"--xla_dump_to=x {COPIES} {EIGEN}"),
        (2, "--xla_cpu_multi_thread_eigen=true", f"--xla_cpu_multi_thread_eigen=true {COPIES}"),
        (64, "", COPIES),
    ],
)
def test_flags(monkeypatch, cores, before, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    host.tune()
    host.tune()  # a second time changes nothing more
    assert os.environ["XLA_FLAGS"] == after


@pytest.mark.parametrize("alone", [True, False])
def test_steps_run_in_the_main_thread_of_a_process_that_is_alone(monkeypatch, alone):
    monkeypatch.setenv("XLA_FLAGS", "")
    before = jax.config.read("jax_cpu_enable_async_dispatch")
    try:
        host.tune(alone)
        assert jax.config.read("jax_cpu_enable_async_dispatch") != alone
    finally:
        jax.config.update("jax_cpu_enable_async_dispatch", before)


def test_other_c_libraries_are_left_as_they_are(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(host.ctypes, "CDLL", missing)
    host.tune()
