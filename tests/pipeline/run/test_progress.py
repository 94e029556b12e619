"""The ledger's counts and breakers, and how they are shown."""

import pytest

from pipeline.faults import how_to_go_on
from pipeline.run.progress import BREAKER, FIRST, MAX_DEATHS, Display, Ledger, _clock


def test_plain_progress_lines_state_counts_rates_and_time_left(capsys):
    ledger, display = Ledger(), Display(["decode", "commit"], total=4, every_s=0)
    ledger.done(0, "decode", 2, 0, 20.0, 1.0, [], 2)
    ledger.done(0, "commit", 1, 3, 10.0, 0.1, ["x: is bad"], 0)
    display.start -= 5
    with display:
        display.update(ledger.stages, ledger.errors)
    line = capsys.readouterr().err
    assert "[0:05] 1/4 sources, 3 clips, 1 errors, 2.0× real time, 0:08 left (decode 2)" in line


def test_clocks():
    assert [_clock(s) for s in (0, 59.6, 61, 3600, 7325)] == ["0:00", "1:00", "1:01", "1:00:00", "2:02:05"]


def test_faults_of_one_worker_in_a_row_end_the_run_and_a_unit_well_done_begins_the_count_anew():
    ledger = Ledger()
    for _ in range(3):
        for times in range(1, BREAKER):
            assert ledger.fault(1, "w", "the GPU is lost; mend it") == times
            ledger.fault(1, "another", "the GPU is lost; mend it")
        ledger.end(0, "u", good=1)  # another pool's unit proves nothing
        assert ledger.faults[1, "w"] == BREAKER - 1
        ledger.end(1, "u", good=0)  # nor does one in which all sources are errors
        assert ledger.faults[1, "w"] == BREAKER - 1
        ledger.end(1, "u", good=1)
    assert ledger.fatal is None
    for _ in range(BREAKER):
        ledger.fault(1, "w", "the GPU is lost; mend it")
    assert ledger.fatal.startswith(f"the GPU is lost; mend it ({BREAKER} times in a row)")


def test_one_source_that_ends_its_workers_ends_no_run_but_several_alike_do():
    ledger = Ledger()
    for n in range(BREAKER):
        assert ledger.fatal is None
        for times in range(1, MAX_DEATHS + 1):
            assert ledger.died(0, f"u{n}", "text", f"/{n}", "killed by SIGSEGV") == times
    assert "5 sources in a row in stage 'text': killed by SIGSEGV" in ledger.fatal


def test_many_workers_lost_at_once_with_their_node_end_no_run():
    ledger = Ledger()
    for n in range(100):
        ledger.begin(0, f"u{n}")
        ledger.at(0, f"u{n}", "text", f"/{n}")
    for _ in range(MAX_DEATHS - 1):
        for n in range(100):
            ledger.begin(0, f"u{n}")
            ledger.at(0, f"u{n}", "text", f"/{n}")
    assert ledger.fatal is None


def test_sources_that_hang_alike_in_a_row_end_the_run():
    ledger = Ledger()
    for n in range(BREAKER):
        ledger.done(0, "caption:x", 1, 0, 1, 1, [f"{n}.mp4: no progress for 600 s (limits.stall_s)"], 0)
    assert "5 sources in a row in stage 'caption:x': no progress" in ledger.fatal


@pytest.mark.parametrize("stage", ["decode", "text"])
def test_the_first_sources_that_fail_alike_end_the_run_in_all_stages_but_the_first(stage):
    ledger = Ledger(first="decode")
    for n in range(FIRST + 5):
        ledger.done(0, stage, 1, 0, 1, 1, [f"{n}.mp4: no model number {n}"], 0)
    if stage == "decode":
        assert ledger.fatal is None
    else:
        assert ledger.fatal.startswith(
            "the first 10 sources failed alike in stage 'text', the last with: 9.mp4: no"
        )


def test_sources_that_fail_alike_after_a_good_one_are_rows_and_no_more():
    ledger = Ledger(first="decode")
    ledger.done(0, "text", 1, 0, 1, 1, [], 1)
    for n in range(100):
        ledger.done(0, "text", 1, 0, 1, 1, [f"{n}.mp4: no model"], 0)
    assert ledger.fatal is None


def test_the_first_reason_to_end_stands():
    ledger = Ledger()
    ledger.stop("the disk is full", store=True)
    ledger.stop("another")
    said = ledger.snapshot()
    assert (said.fatal, said.store) == ("the disk is full", True)


@pytest.mark.parametrize(
    ("why", "told"),
    [
        ("a died", "a died; run the same command again, finished work is kept"),
        (
            "free room, then run the same command again",
            "free room, then run the same command again, finished work is kept",
        ),
        (
            "run the same command again, finished work is kept",
            "run the same command again, finished work is kept",
        ),
    ],
)
def test_how_to_go_on_is_said_once(why, told):
    assert how_to_go_on(why) == told
