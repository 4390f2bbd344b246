"""What a run says about its time."""

import time

import pytest

from utils.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_a_stage_inside_another_counts_for_itself(clock):
    watch = Stopwatch()
    with watch.stage("texts"):
        clock(1)
        with watch.stage("loading T5"):
            clock(10)
        clock(2)
    with watch.stage("texts"):
        clock(4)
    assert watch.seconds == {"loading T5": 10, "texts": 7} and str(watch) == "loading T5 10.0 s, texts 7.0 s"


def test_a_stage_that_fails_is_counted(clock):
    watch = Stopwatch()
    with pytest.raises(OSError), watch.stage("saving"):
        clock(3)
        raise OSError
    with watch.stage("decoding"):
        clock(1)
    assert watch.seconds == {"saving": 3, "decoding": 1}
