"""What `make ramp` makes of what it saw."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.overload import Answer
from benchmarks.ramp import Moment, Ramp, Sent, counts, plot, rows, table


@pytest.fixture
def ramp() -> Ramp:
    answers = [
        (1, Answer(ttft_s=0.5)),
        (2, Answer(ttft_s=1.5)),
        (11, Answer(retry_after_s=3.0)),
        (12, Answer(ttft_s=9)),
    ]
    return Ramp(
        pace=4.0,
        steps=[(0.0, 10.0, 2.0), (10.0, 20.0, 6.0)],
        sent=[Sent(float(at), answer) for at, answer in answers],
        moments=[Moment(5.0, 1, 1, 2), Moment(12.0, 1, 2, 8), Moment(18.0, 2, 2, 12)],
        from_zero_s=[31.0, 29.0],
        to_zero_s=61.0,
    )


def test_a_request_counts_for_the_step_in_which_it_was_sent(ramp: Ramp) -> None:
    first, second = rows(ramp)
    assert (first["ttft_p50_s"], first["rejected_share"], first["ongoing"]) == (1.5, 0.0, 2.0)
    assert (second["ttft_p50_s"], second["rejected_share"], second["ongoing"]) == (9, 0.5, 10.0)


def test_engines_are_given_as_they_were_during_the_step(ramp: Ramp) -> None:
    assert [row["running"] for row in rows(ramp)] == [[1, 1], [1, 2]]
    lines = table(ramp).splitlines()
    assert lines[2].split()[2:4] == ["2", "1-2"]
    assert lines[-1] == "from zero 31 s, again 29 s; to zero 61 s"


def test_the_last_line_that_counts_engines_is_the_one_that_holds() -> None:
    log = "12:00:00  running  Router 1/1  Engine-tiny 0/1\nx\n12:00:09  running  Router 1/1  Engine-tiny 1/2\n"
    assert counts(log) == (1, 2)
    assert counts("  0 s  starting Ray\n") is None


def test_the_picture_is_one(ramp: Ramp, tmp_path: Path) -> None:
    plot(ramp, tmp_path / "ramp.png")
    assert (tmp_path / "ramp.png").read_bytes().startswith(b"\x89PNG")
