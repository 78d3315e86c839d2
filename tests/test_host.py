"""What `host.tune` sets, and what it leaves alone."""

import os

import pytest

from tinyonn_jax import host


@pytest.mark.parametrize(
    ("cores", "before", "after"),
    [
        (2, "", "--xla_cpu_multi_thread_eigen=false"),
        (2, "--xla_dump_to=x", "--xla_dump_to=x --xla_cpu_multi_thread_eigen=false"),
        (2, "--xla_cpu_multi_thread_eigen=true", "--xla_cpu_multi_thread_eigen=true"),
        (64, "", ""),
    ],
)
def test_flags(monkeypatch, cores, before, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    host.tune()
    host.tune()  # a second time changes nothing more
    assert os.environ["XLA_FLAGS"] == after


def test_other_c_libraries_are_left_as_they_are(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(host.ctypes, "CDLL", missing)
    host.tune()
