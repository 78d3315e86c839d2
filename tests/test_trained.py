"""What a trained run says while it answers."""

from tinyonn_jax import trained


def test_pace_is_that_of_what_follows_the_first_compilation(monkeypatch):
    clock, said = [100.0], []
    monkeypatch.setattr(trained.time, "monotonic", lambda: clock[0])
    progress = trained._pace("decoded", said.append)
    for after, done in ((25, 0), (25, 64), (1, 80), (5, 124), (30, 124), (1, 1000)):
        clock[0] += after
        progress(done, 1000)
    assert said == [
        "decoded 64 of 1,000 sequences",
        "decoded 124 of 1,000 sequences, 10 a second, 1:28 left",
        "decoded 124 of 1,000 sequences, 100 a minute, 8:46 left",
        "decoded 1,000 of 1,000 sequences, 25 a second, 0:00 left",
    ]
