"""The ledger's counts and breakers, and how they are shown."""

import pytest

from pipeline.faults import how_to_go_on
from pipeline.run.progress import BREAKER, FIRST, MAX_DEATHS, WIDTH, Display, Ledger, _clock


def test_plain_progress_lines_state_counts_rates_and_time_left(capsys):
    ledger, display = Ledger(), Display(["decode", "commit"], total=4, every_s=0)
    ledger.done(0, "decode", 2, 0, 20.0, 1.0, ["x: is bad"], 1)
    ledger.done(0, "commit", 1, 1, 10.0, 0.1, [], 0)
    display.start -= 5
    with display:
        display.update(ledger.snapshot())
    line = capsys.readouterr().err
    assert "[0:05] 1/4 sources, 1 clip, 1 error, 2.0× real time, 0:08 left (decode 2)" in line


def test_no_rate_and_no_time_left_are_told_before_a_source_is_finished(capsys):
    ledger, display = Ledger(), Display(["decode", "cut", "commit"], total=4, every_s=0)
    ledger.done(0, "decode", 4, 0, 20.0, 1.0, [], 4)
    ledger.done(0, "cut", 3, 0, 20.0, 1.0, [], 3)
    display.start -= 5
    display.update(ledger.snapshot())
    said = capsys.readouterr().err
    assert said.startswith("[0:05] 0/4 sources, 0 clips, 0 errors (decode 4, cut 3); ")
    assert display._table(ledger.stages, 0, 5.0).title == "0:05 elapsed · 0 errors"
    ledger.done(0, "commit", 2, 0, 20.0, 1.0, [], 2)
    display.update(ledger.snapshot())
    assert "0:02 left" in capsys.readouterr().err  # 9 of 12 in 5 s


def test_a_line_is_short_however_many_stages_and_whatever_the_names(capsys):
    names = [f"caption:a-model-of-a-long-name-{n}" for n in range(12)]
    ledger, display = Ledger(), Display(["decode", *names, "commit"], total=99, every_s=0)
    for n, name in enumerate(["decode", *names]):
        ledger.done(0, name, 90 - n, 0, 20.0, 1.0, [], 90 - n)
    ledger.begin(0, "u")
    ledger.at(0, "u", names[0], f"/{'x' * 200}.mp4")
    display.update(ledger.snapshot())
    line = capsys.readouterr().err.strip()
    assert len(line) <= WIDTH
    assert "still at xxx" in line
    assert line.endswith(names[0])


def test_of_stages_that_as_many_sources_have_passed_the_last_is_named(capsys):
    names = ["decode", "shots", "events", "cut", "signature", "commit"]
    ledger, display = Ledger(), Display(names, total=6, every_s=0)
    for name, n in zip(names, (3, 3, 3, 2, 1, 1), strict=True):
        ledger.done(0, name, n, 0, 20.0, 1.0, [], n)
    display.update(ledger.snapshot())
    assert "left (events 3, cut 2)" in capsys.readouterr().err


def test_a_source_that_failed_is_not_waited_for_by_later_stages(capsys):
    """Two of four failed in the first stage; the other two are through all but the last."""
    ledger, display = Ledger(), Display(["decode", "cut", "commit"], total=4, every_s=0)
    ledger.done(0, "decode", 4, 0, 20.0, 1.0, ["a: bad", "b: bad"], 2)
    ledger.done(0, "cut", 2, 0, 20.0, 1.0, [], 2)
    ledger.done(0, "commit", 2, 0, 20.0, 1.0, [], 0)
    display.start -= 8
    display.update(ledger.snapshot())
    line = capsys.readouterr().err
    assert "2/4 sources, 0 clips, 2 errors" in line
    assert "(" not in line  # nothing is under way before the last stage
    assert "0:02 left" in line  # 8 of 10 in 8 s
    table = display._table(ledger.stages, 2, 8.0)
    assert list(table.columns[2].cells) == ["4/4", "2/2", "2/4"]


def test_what_is_in_work_is_named_while_nothing_is_finished(capsys):
    ledger, display = Ledger(), Display(["decode", "commit"], total=9, every_s=0)
    ledger.begin(0, "u")
    display.update(ledger.snapshot())
    assert "; loading models" in capsys.readouterr().err
    ledger.at(0, "u", "caption:x", "https://host/bikes.mp4?signature=s3cr3t")
    display.update(ledger.snapshot())
    assert capsys.readouterr().err.endswith("; still at bikes.mp4, caption:x\n")
    for n in range(3):
        ledger.begin(1, f"v{n}")
        ledger.at(1, f"v{n}", "cut", f"/{n}.mp4")
    display.update(ledger.snapshot())
    assert "; still at bikes.mp4, caption:x; 0.mp4, cut and 2 more\n" in capsys.readouterr().err
    ledger.done(0, "commit", 1, 3, 10.0, 0.1, [], 1)
    display.update(ledger.snapshot())
    assert "still" not in capsys.readouterr().err


def test_every_death_of_a_worker_is_told_once_and_at_once(capsys):
    ledger, display = Ledger(), Display(["decode", "commit"], total=9, every_s=1000)
    ledger.begin(0, "u")
    ledger.at(0, "u", "cut", "/bikes.mp4")
    ledger.died(0, "u", "cut", "/bikes.mp4", "killed by SIGSEGV")
    ledger.begin(0, "u")
    for _ in range(2):
        display.update(ledger.snapshot())
    first, second = capsys.readouterr().err.splitlines()
    assert first == "a worker died at bikes.mp4, cut: killed by SIGSEGV"
    assert second.startswith("a worker died at bikes.mp4, cut (death 2 there): it was lost")


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
