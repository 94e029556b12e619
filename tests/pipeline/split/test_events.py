import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from pipeline.recipe import Embedder, Events, RecipeError
from pipeline.record import Clip, Sample, Shot, Video
from pipeline.split.events import EventStage, Piece, distance, end_samples, fit, pieces, stitch, thinned
from pipeline.split.shots import given_shots
from tests.fixtures.scenes import Greys, grey_distance, steady, video

AS_MADE = Events(min_s=2.5, max_s=60, longer="truncate", trim=0.1)  # Panda-70M, reference table


def stage(**options: object) -> EventStage:
    """The stage with an embedder whose distances are known; set up without a network."""
    s = EventStage(Events(**options))  # type: ignore[arg-type]
    s.embedder = Greys()
    s.embedding = "greys"
    return s


def spans(v: Video) -> list[tuple[int, int]]:
    return [(c.start_frame, c.end_frame) for c in v.clips]


def irregular(rng: np.random.Generator, n: int, longest: int = 9000) -> Video:
    """n frames shown 1 … longest ticks of 1/90000 s each, beginning late."""
    edges = np.cumsum(rng.integers(1, longest, n + 1)) + 777_777
    return video(edges[:-1], int(edges[-1]), Fraction(1, 90000))


def seconds(v: Video, start: int, end: int) -> float:
    return float((v.pts_of(end) - v.pts_of(start)) * v.time_base)


# ---------------------------------------------------------------- pieces


def test_pieces_of_panda_by_hand():
    """25 fps: a 20 s shot gives four of 5 s; 7 s stay whole; a frame more is cut at int(5 · 25)."""
    v = steady(60, 25)
    assert pieces(v, (0, 500), 5, 2) == [(0, 125), (125, 250), (250, 375), (375, 500)]
    assert pieces(v, (10, 185), 5, 2) == [(10, 185)]
    assert pieces(v, (10, 186), 5, 2) == [(10, 135), (135, 186)]


def test_at_a_fractional_rate_a_piece_has_the_frames_that_fit():
    v = video(np.arange(600) * 1001, 600 * 1001, Fraction(1, 30000))
    assert pieces(v, (0, 300), 5, 2)[0] == (0, int(5 * 30000 / 1001))


def test_pieces_partition_a_shot_by_time_at_any_rate():
    rng = np.random.default_rng(2)
    for _ in range(30):
        v = irregular(rng, 400)
        start, end = sorted(rng.choice(401, 2, replace=False).tolist())
        piece, slack = 1.5, 0.7
        found = pieces(v, (start, end), piece, slack)
        assert found[0][0] == start
        assert found[-1][1] == end
        assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
        for a, b in found[:-1]:
            assert seconds(v, a, b) <= piece < seconds(v, a, b + 1)
            assert seconds(v, a, end) > piece + slack
        assert seconds(v, *found[-1]) <= piece + slack


def test_one_frame_shown_for_long_is_one_piece():
    v = video(np.array([0, 30, 31]), 60, Fraction(1))
    assert pieces(v, (0, 3), 5, 2) == [(0, 1), (1, 2), (2, 3)]


# ---------------------------------------------------------------- where a piece is seen


def test_frames_of_panda_by_hand():
    """[125, 250): int(.95 · 125 + .05 · 249) = 131 and int(.05 · 125 + .95 · 249) = 242."""
    v = steady(20, 25, samples=dict.fromkeys(range(500), 0))
    assert v.frames is not None
    assert end_samples(v.frames, 125, 250, 0.05) == (131, 242)


def test_the_nearest_sample_inside_the_piece_is_used():
    v = steady(20, 25, samples=dict.fromkeys((0, 120, 126, 137, 230, 248, 251), 0))
    assert v.frames is not None
    assert end_samples(v.frames, 125, 250, 0.05) == (2, 5)  # 131 → 126 before 137 is 5 away, 242 → 248
    assert end_samples(v.frames, 249, 251, 0.05) is None


# ---------------------------------------------------------------- stitching


def test_stitching_agrees_with_the_rule_said_in_another_way():
    """Brute force: two pieces share an event where every joint between them is without gap and close."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        n = int(rng.integers(0, 12))
        edges = np.sort(rng.choice(500, n + 1, replace=False))
        features = rng.normal(size=(n, 2, 3))
        features /= np.linalg.norm(features, axis=-1, keepdims=True)
        given = [Piece(int(edges[i]), int(edges[i + 1]), *features[i]) for i in range(n)]
        given = [p for p in given if rng.random() < 0.8]
        joined = [
            a.end == b.start and np.sqrt(2 - 2 * a.last @ b.first) <= 0.9
            for a, b in itertools.pairwise(given)
        ]
        group = np.concatenate([[0], np.cumsum(~np.array(joined, bool))]) if given else []
        wanted = {
            (min(given[i].start for i in np.flatnonzero(group == g)),
             max(given[i].end for i in np.flatnonzero(group == g)))
            for g in np.unique(group)
        }  # fmt: skip
        assert stitch(given, 0.9) == sorted(wanted)


# ---------------------------------------------------------------- lengths


def test_panda_as_made_by_hand():
    """25 fps, trim 10 %: 20 s → the middle 16 s; 70 s → 60 s → the middle 48; 2.4 s → nothing."""
    v = steady(100, 25)
    counts: dict[str, int] = dict.fromkeys(("events_too_short", "events_truncated"), 0)
    assert fit(v, (0, 500), AS_MADE, counts) == [(50, 450)]
    assert fit(v, (100, 1850), AS_MADE, counts) == [(250, 1450)]
    assert fit(v, (0, 60), AS_MADE, counts) == []
    assert counts == {"events_too_short": 1, "events_truncated": 1}


@pytest.mark.parametrize("longer", ["truncate", "split"])
def test_clips_of_an_event_are_ordered_apart_and_no_longer_than_asked(longer):
    rng = np.random.default_rng(8)
    for _ in range(60):
        v = irregular(rng, 500)
        start, end = sorted(rng.choice(501, 2, replace=False).tolist())
        o = Events(min_s=1, max_s=4, longer=longer, trim=float(rng.choice([0, 0.1])))
        counts = {"events_too_short": 0, "events_split": 0, "events_truncated": 0}
        got = fit(v, (start, end), o, counts)
        whole = seconds(v, start, end)
        assert all(start <= a < b <= end for a, b in got)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(got))
        assert all(seconds(v, a, b) <= 4 for a, b in got)
        if whole < 1:
            assert got == []
        elif longer == "truncate":
            assert len(got) == 1
        else:
            assert whole / 4 <= len(got) <= whole / 4 + 2
            if o.trim == 0:
                assert (got[0][0], got[-1][1]) == (start, end)
                assert all(a[1] == b[0] for a, b in itertools.pairwise(got))
                assert all(seconds(v, a, b) > 1.8 for a, b in got) or len(got) == 1


# ---------------------------------------------------------------- the stage


def test_a_video_by_hand():
    """50 s at 2 fps, three shots: two alike are one event, a third differs; one piece hides a cut."""
    levels = [100] * 20 + [104] * 30 + [180] * 20 + [20] * 4 + [250] * 6 + [180] * 20
    v = steady(50, 2, samples=dict(enumerate(levels)), shots=[(0, 20), (20, 50), (50, 100)])
    stage(max_inner=0.5, max_outer=0.2)([v])
    # pieces: 0–10 10–20 | 20–30 30–40 40–50 | 50–60 60–70 70–80 (20 → 250: missed cut) 80–90 90–100
    assert spans(v) == [(0, 50), (50, 70), (80, 100)]
    assert v.counts == {
        "pieces": 10,
        "pieces_unseen": 0,
        "pieces_missed_cut": 1,
        "events": 3,
        "events_too_short": 0,
        "events_truncated": 0,
        "events_split": 0,
    }
    assert [c.scores["end_distance"] for c in v.clips] == pytest.approx(
        [grey_distance(100, 104), 0, 0], abs=1e-3
    )
    angle = 102 / 255 * np.pi / 2
    np.testing.assert_allclose(v.clips[0].embeddings["greys"], [np.cos(angle), np.sin(angle)], atol=1e-3)


def test_features_are_taken_anew_at_the_final_ends():
    levels = list(range(0, 200, 2))
    v = steady(50, 2, samples=dict(enumerate(levels)), shots=[(0, 100)])
    stage(max_inner=2, max_outer=2, max_s=20, longer="truncate", trim=0.1)([v])
    assert spans(v) == [(4, 36)]  # of [0, 40)
    first, last = int(0.95 * 4 + 0.05 * 35), int(0.05 * 4 + 0.95 * 35)
    wanted = grey_distance(levels[first], levels[last])
    assert v.clips[0].scores["end_distance"] == pytest.approx(wanted, abs=2e-3)


def test_clips_partition_their_shots_and_nothing_disappears_uncounted():
    rng = np.random.default_rng(4)
    for _ in range(20):
        n = 240
        v = irregular(rng, n, longest=60000)
        assert v.frames is not None
        kept = np.sort(rng.choice(n, 80, replace=False))
        levels = np.clip(np.cumsum(rng.normal(0, 25, 80)) % 255, 0, 255).astype(int)
        sampled = video(
            np.arange(n), n, Fraction(1), samples=dict(zip(kept.tolist(), levels.tolist(), strict=True))
        )
        assert sampled.frames is not None
        v.frames.samples = sampled.frames.samples
        cuts = [0, *sorted(rng.choice(np.arange(1, n), 5, replace=False).tolist()), n]
        v.shots = [Shot(a, b) for a, b in itertools.pairwise(cuts)]
        s = stage(max_inner=0.6, max_outer=0.3, min_s=2.0, max_s=9.0)
        s([v])
        got = spans(v)
        assert all(a < b for a, b in got)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(got))
        assert all(2.0 <= seconds(v, a, b) <= 9.0 for a, b in got if v.counts["events_split"] == 0)
        c = v.counts
        if not (c["pieces_unseen"] or c["pieces_missed_cut"] or c["events_too_short"]):
            assert sum(b - a for a, b in got) == n
        assert c["events"] - c["events_too_short"] <= len(got)


def test_seconds_are_pts_not_frames():
    """Half the frames at 50 fps, half at 5: the pieces are 5 s long in both halves."""
    pts = np.concatenate([np.arange(500) * 2, 1000 + np.arange(50) * 20])
    v = video(pts, 2000, Fraction(1, 100), shots=[(0, 550)], samples=dict.fromkeys(range(0, 550, 5), 9))
    assert pieces(v, (0, 550), 5, 2) == [(0, 250), (250, 500), (500, 525), (525, 550)]
    stage(max_s=12)([v])
    assert [(c.start_s, c.end_s) for c in v.clips] == [(0, 10), (10, 20)]


def test_given_intervals_are_clips_as_they_are():
    v = steady(
        20, 10, samples={0: 10, 60: 250, 150: 40}, shots=[(0, 3), (2, 200), (90, 95)], intervals=((0, 0.3),)
    )
    stage()([v])
    assert spans(v) == [(0, 3), (2, 200), (90, 95)]
    assert v.counts == {"events": 3}
    assert v.clips[0].scores == {"end_distance": 0.0}
    assert v.clips[2].scores == {}  # holds no sample: not measured
    assert v.clips[2].embeddings == {}


def test_a_video_whose_pieces_are_all_dropped_has_no_clips():
    v = steady(4, 10, samples={0: 0, 39: 255}, shots=[(0, 40)])
    stage(max_inner=0.5)([v])
    assert v.clips == []
    assert v.counts["pieces_missed_cut"] == v.counts["pieces"] == 1
    assert v.frames is not None
    assert v.frames.samples == []


def test_a_second_call_changes_nothing():
    v = steady(20, 10, samples=dict.fromkeys(range(200), 50), shots=[(0, 200)])
    s = stage(clip_samples=3)
    s([v])
    once = (spans(v), dict(v.counts), [c.scores for c in v.clips], list(v.frames.samples if v.frames else []))
    s([v])
    assert once == (spans(v), v.counts, [c.scores for c in v.clips], v.frames.samples if v.frames else [])


def test_each_sample_is_embedded_once_at_most():
    v = steady(20, 10, samples=dict.fromkeys(range(0, 200, 5), 50), shots=[(0, 200)])
    s = stage()
    s([v])
    assert isinstance(s.embedder, Greys)
    assert s.embedder.seen <= 10  # two for each of 4 pieces, two for the event


def test_samples_are_thinned_evenly_within_clips():
    samples = [Sample(f, b"") for f in range(0, 100, 2)]
    clips = [Clip("a", 10, 50, 0, 0), Clip("b", 60, 64, 0, 0)]
    assert [s.frame for s in thinned(samples, clips, 5)] == [10, 20, 30, 38, 48, 60, 62]
    assert len(thinned(samples, clips, 99)) == 22


def test_distance_is_the_chord_of_the_cosine():
    a, b = np.array([1.0, 0.0]), np.array([0.955, np.sqrt(1 - 0.955**2)])
    assert distance(a, b) == pytest.approx(0.3, abs=1e-12)


def test_a_unit_is_looked_at_in_two_calls_of_the_embedder_and_each_video_is_split_as_alone():
    class Counting(Greys):
        calls = 0

        def embed(self, images):
            self.calls += 1
            return super().embed(images)

    def made() -> list[Video]:
        found = []
        for n, seconds_ in enumerate((20, 33, 7)):
            levels = {f: (60 + 7 * n + f // 100 * 9) % 250 for f in range(0, seconds_ * 25, 12)}
            v = steady(seconds_, 25, samples=levels)
            v.shots = [Shot(0, 50 * (n + 1)), Shot(50 * (n + 1), len(v.frames.pts))]
            found.append(v)
        return found

    together, alone = made(), made()
    s = stage()
    s.embedder = Counting()
    s(together)
    assert s.embedder.calls == 2
    for v in alone:
        stage()([v])
    for a, b in zip(together, alone, strict=True):
        assert [(c.clip_id, c.scores, c.embeddings["greys"].tolist()) for c in a.clips] == [
            (c.clip_id, c.scores, c.embeddings["greys"].tolist()) for c in b.clips
        ]
        assert a.counts == b.counts
        assert a.frames.samples == b.frames.samples
    assert sum(len(v.clips) for v in together) >= 3


def test_an_impossible_embedder_is_a_recipe_error_before_any_work():
    with pytest.raises(RecipeError, match=r"events\.embedder: open_clip ViT-B-32: pretrained 'opnai'"):
        EventStage(Events(embedder=Embedder(kind="open_clip", pretrained="opnai")))


def test_what_is_produced_is_declared():
    assert EventStage(Events()).produces.embeddings == {"efficientnet_lite0": 1280}
    clip = EventStage(Events(embedder=Embedder(kind="open_clip", pretrained="openai")))
    assert clip.produces.embeddings == {"open_clip_vit_b_32": 512}
    assert clip.produces.scores == ["end_distance", "damaged", "repeated"]


def test_given_clips_carry_their_own_metadata_in_any_order_and_once():
    v = steady(20, 10)
    intervals = ((6.0, 8.0), (1.0, 2.0), (6.0, 8.0))
    meta = ({"caption": "late"}, {"caption": "early"}, {"caption": "again"})
    v.source = replace(v.source, intervals=intervals, interval_meta=meta)
    v.shots = given_shots(v, intervals)
    stage()([v])
    assert [(c.start_s, c.meta) for c in v.clips] == [(1.0, {"caption": "early"}), (6.0, {"caption": "late"})]


def test_without_an_embedder_every_shot_is_one_event_of_allowed_length():
    s = EventStage(Events(embedder=Embedder(kind="none"), min_s=2, max_s=10, longer="split"))
    s.setup()
    assert (s.produces.scores, s.produces.embeddings) == (["damaged", "repeated"], {})
    v = steady(30, 10)
    v.shots = [Shot(0, 15), Shot(15, 60), Shot(60, 300)]
    s([v])
    assert spans(v) == [(15, 60), (60, 140), (140, 220), (220, 300)]
    assert (v.counts["events"], v.counts["events_too_short"], v.counts["events_split"]) == (3, 1, 1)
