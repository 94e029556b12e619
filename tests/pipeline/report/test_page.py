"""The report says what the run's files say, opens offline, and nothing in it but its own script can run."""

import base64
import functools
import html
import io
import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.faults import StoreError
from pipeline.io.store import Store
from pipeline.recipe import parse
from pipeline.record import Caption, Clip, Error, Source, Video, clip_id
from pipeline.report import data as report_data
from pipeline.report import histograms
from pipeline.report import page as report
from pipeline.shards.pack import shard
from tests.fixtures import run_folder
from tests.fixtures.run_folder import flip

CHROMIUM = Path("/usr/bin/chromium")
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&'\""


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [a for t, a in self.tags if t == tag and (not kind or kind in a.get("class", "").split())]

    @functools.cached_property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())


def read(root: Path) -> Page:
    return Page((root / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A small finished run with everything in it: drops, duplicates, failed sources."""
    root = tmp_path_factory.mktemp("report") / "run"
    recipe = run_folder.make_run_folder(root)
    shard(Store(str(root)), recipe)
    report.write(Store(str(root)))
    return root


@pytest.fixture
def browser() -> Iterator:
    if not CHROMIUM.exists():
        pytest.skip("needs Debian's chromium at /usr/bin/chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def test_headline_counts_are_those_of_the_tables(root: Path):
    decisions = pq.read_table(root / "decisions.parquet")["keep"].to_pylist()
    videos = pa.concat_tables([pq.read_table(p) for p in (root / "videos").glob("*.parquet")])
    title = f"{sum(decisions)} of {len(decisions)} clips kept from {len(videos)} sources"
    page = read(root)
    assert title in page.text
    assert f"{videos['status'].to_pylist().count('error')} errors" in page.text
    seconds = sum(
        d
        for d, s in zip(videos["duration_s"].to_pylist(), videos["status"].to_pylist(), strict=True)
        if s == "ok"
    )
    assert f"{seconds / 60:.3g} × real time" in page.text  # wall_s of the fixture is 60
    tars = list((root / "shards").rglob("*.tar"))
    assert f"{len(tars)} tars" in page.text


def test_funnel_adds_up_to_the_kept_clips(root: Path):
    run = report_data.Run(Store(str(root)))
    left = len(run.keep)
    for limit in run.limits:
        fails = [limit.name in names for names in run.dropped_by]
        only = [names == [limit.name] for names in run.dropped_by]
        assert (limit.alone, limit.only) == (sum(fails), sum(only))
        assert limit.left <= left
        left = limit.left
    assert left == run.keep.sum()
    assert {r.name for r in run.limits} >= {"too_short", "still", "too_much_text", "duplicate"}


def test_every_kept_and_dropped_clip_of_a_small_run_is_shown_with_three_pictures(root: Path):
    page = read(root)
    decisions = pq.read_table(root / "decisions.parquet").to_pylist()
    shown = {d["clip_id"] for d in decisions if d["clip_id"] in page.text}
    assert shown == {d["clip_id"] for d in decisions}
    cards = len(page.all("article", "clip"))
    pictures = [a["src"] for a in page.all("img")]
    assert len(pictures) == report_data.FRAMES * cards
    for src in pictures:
        assert base64.b64decode(src.removeprefix("data:image/jpeg;base64,"))[:3] == b"\xff\xd8\xff"


def test_candidates_are_all_there_and_one_is_marked_as_chosen(root: Path):
    page = read(root)
    for model in run_folder.CAPTIONERS:
        assert page.text.count(f"{model} says:") >= len(page.all("article")) - 3  # one clip is silent
    described = sum(1 for d in pq.read_table(root / "decisions.parquet")["caption"].to_pylist() if d)
    assert len(page.all("li", "chosen")) >= described


def test_failed_sources_come_first_with_stage_and_reason(root: Path):
    page = read(root)
    table = page.text.split("What went wrong")[1]
    assert table.index("broken 0.mp4") < table.index("broken 1.mp4") < table.index("a folder/video 0.mp4")
    assert "failed in decode no video stream: the file holds sound only" in table


def test_copies_stand_beside_the_clip_that_was_kept(root: Path):
    run = report_data.Run(Store(str(root)))
    pairs = report_data.choose(run).twins
    assert pairs
    for kept, copy in pairs:
        assert run.keep[kept]
        assert run.duplicate_of[copy] == run.clips["clip_id"][kept].as_py()


def test_pictures_are_of_the_clip_they_stand_for(tmp_path: Path, root: Path):
    """Each stored clip is another gradient; its own pictures must match its own frames, decoded by PyAV whole."""
    import av
    import cv2

    clip = pq.read_table(next((root / "clips").glob("*.parquet"))).to_pylist()[1]
    tar = (root / clip["media_tar"]).read_bytes()
    mp4 = tar[clip["media_offset"] :][: clip["media_size"]]
    got = report_data.pictures(io.BytesIO(mp4), clip["duration_s"])
    with av.open(io.BytesIO(mp4)) as container:
        frames = [f.to_ndarray(format="bgr24").astype(float) for f in container.decode(video=0)]
    for i, jpeg in enumerate(got):
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR).astype(float)
        error = [np.abs(picture - f).mean() for f in frames]
        assert min(error) < 6
        assert abs(int(np.argmin(error)) / len(frames) - (i + 0.5) / report_data.FRAMES) < 0.15


def test_a_damaged_clip_is_named_in_place_of_its_pictures(tmp_path: Path):
    run_folder.make_run_folder(tmp_path, sources=2, errors=0)
    run = report_data.Run(Store(str(tmp_path)))
    row = {c: run.clips[c][0].as_py() for c in ("media_tar", "media_offset", "media_size", "media_sha256")}
    flip(tmp_path / row["media_tar"], row["media_offset"] + row["media_size"] // 2)
    got = report_data.all_pictures(run, [0])
    assert "damaged" in got[0]
    assert row["media_sha256"] in got[0]


def write_run(root: Path, videos: list[Video], info: dict | None = None) -> None:
    """A run of one unit whose clips are all the same second of video."""
    data = run_folder.mp4(64, 36, 12, 1)
    run_folder.write_unit(root, "000000-x", videos, {c.clip_id: data for v in videos for c in v.clips})
    if info is not None:
        (root / "run.json").write_text(json.dumps(info))


def a_video(name: str, clips: int, captions: list[Caption] | None = None, **scores: float) -> Video:
    video = Video(
        Source(f"/v/{name}", name, {"title": name}), "", "0" * 64, "h264", 64, 36, 12.0, float(clips)
    )
    for c in range(clips):
        made = Clip(clip_id("0" * 64, name, c, c + 1), 12 * c, 12 * (c + 1), float(c), c + 1.0, dict(scores))
        made.captions = list(captions or [])
        video.clips.append(made)
    video.seconds = {"decode": 0.5}
    return video


def test_hostile_names_captions_and_reasons_are_only_text(tmp_path: Path):
    bad = Video(Source(f"/v/2{EVIL}", f"2{EVIL}"), "")
    bad.error = Error(EVIL, EVIL, "2026-01-01T00:00:00+00:00")
    good = a_video(EVIL, 2, [Caption(EVIL, EVIL, EVIL, EVIL, {EVIL: 0.5})])
    good.clips[0].text = [EVIL]
    good.warnings, good.seconds, good.counts = [EVIL], {EVIL: 1.0}, {EVIL: 1}
    recipe = run_folder.parse(
        {
            "name": EVIL,
            "decide": {"rules": {EVIL: {"column": "duration_s", "min": 5}}, "duplicates": {"enabled": False}},
        },
        [],
        "",
    )
    write_run(tmp_path, [good, bad])
    run_folder.write_run_json(tmp_path, recipe)
    info = json.loads((tmp_path / "run.json").read_text())
    info |= {"command": EVIL, "versions": {EVIL: EVIL}, "finished": EVIL}
    (tmp_path / "run.json").write_text(json.dumps(info))
    shard(Store(str(tmp_path)), recipe)
    report.write(Store(str(tmp_path)))
    page = read(tmp_path)
    assert EVIL in html.unescape("".join(page.words))
    assert len(page.all("script")) == 1
    assert all(a["src"].startswith("data:image/jpeg;base64,") for a in page.all("img"))
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]


def test_only_the_pages_own_script_is_allowed_and_nothing_may_load(root: Path):
    import hashlib

    text = (root / "report.html").read_text(encoding="utf-8")
    policy = next(
        a["content"] for a in Page(text).all("meta") if "content" in a and "script-src" in a["content"]
    )
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text)


def test_a_run_without_sources_says_so(tmp_path: Path):
    (tmp_path / "run.json").write_text("{}")
    report.write(Store(str(tmp_path)))
    assert "this run is empty" in read(tmp_path).text


def test_a_run_of_errors_alone_shows_them(tmp_path: Path):
    bad = [Video(Source(f"/v/{i}", f"{i}.mp4"), "") for i in range(3)]
    for v in bad:
        v.error = Error("fetch", "there is no such file", "2026-01-01T00:00:00+00:00")
    write_run(tmp_path, bad, {})
    report.write(Store(str(tmp_path)))
    page = read(tmp_path)
    assert "0 of 0 clips kept from 3 sources" in page.text
    assert "3 sources could not be used (3 in fetch)" in page.text
    assert page.text.count("there is no such file") == 3


def test_clips_that_were_not_decided_yet_are_pointed_at(tmp_path: Path):
    write_run(tmp_path, [a_video("a.mp4", 2, motion=0.5)], {})
    report.write(Store(str(tmp_path)))
    page = read(tmp_path)
    assert "2 clips not decided on yet: run clipmill shard" in page.text
    assert "This run has not finished" in page.text


def test_a_clip_whose_media_cannot_be_read_says_why_and_the_others_are_shown(tmp_path: Path):
    recipe = run_folder.make_run_folder(tmp_path / "run")
    shard(Store(str(tmp_path / "run")), recipe)
    (tmp_path / "run/media/000000-fixture.tar").unlink()
    report.write(Store(str(tmp_path / "run")))
    page = read(tmp_path / "run")
    blind = len(page.all("button", "blind"))
    assert 0 < blind < len(page.all("article"))
    assert page.text.count("the picture cannot be read from media/000000-fixture.tar") == blind


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path):
    with pytest.raises(StoreError, match="holds no clipmill run"):
        report.write(Store(str(tmp_path / "nothing")))
    assert not (tmp_path / "nothing").exists()


def test_thousands_of_clips_stay_small_and_quick(tmp_path: Path):
    rng = np.random.default_rng(0)
    videos = [a_video(f"{i:04d}.mp4", 10, [Caption("m", "a thing")]) for i in range(500)]
    for v in videos:
        for c in v.clips:
            c.scores = {n: float(x) for n, x in zip("abcdefgh", rng.normal(size=8), strict=True)}
    rules = {n: {"column": f"score_{n}", "min": -1.5} for n in "abcdefgh"}
    recipe = run_folder.parse(
        {"name": "x", "decide": {"rules": rules, "duplicates": {"enabled": False}}}, [], ""
    )
    write_run(tmp_path, videos)
    run_folder.write_run_json(tmp_path, recipe)
    shard(Store(str(tmp_path)), recipe)
    start = time.process_time()
    report.write(Store(str(tmp_path)))
    assert time.process_time() - start < 8
    page = read(tmp_path)
    assert len(page.all("article")) == report_data.KEPT_SHOWN + 8 * report_data.DROPPED_SHOWN
    assert (tmp_path / "report.html").stat().st_size < 10e6


def test_pictures_together_stay_within_their_bytes(root: Path, monkeypatch):
    monkeypatch.setattr(report_data, "PICTURE_BYTES", 20_000)
    run = report_data.Run(Store(str(root)))
    got = report_data.all_pictures(run, report_data.choose(run).rows())
    assert sum(len(p) for ps in got.values() if isinstance(ps, list) for p in ps) <= 20_000
    assert any(ps == "left out to keep this page small" for ps in got.values())


@pytest.mark.parametrize("seed", range(20))
def test_histogram_bins_hold_every_value_once_and_every_threshold(seed: int):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=rng.integers(1, 500)) * 10.0 ** rng.integers(-6, 7)
    if seed % 4 == 0:
        values[0] = 1e9  # an outlier
    marks = [float(values[0] / 3)] if seed % 2 else []
    bins, ticks = histograms.edges(values, marks)
    assert (np.diff(bins) > 0).all()
    assert np.histogram(np.clip(values, bins[0], bins[-1]), bins)[0].sum() == len(values)
    assert all(bins[0] - 1e-9 <= m <= bins[-1] for m in marks)
    assert 2 <= len(ticks) <= 9
    assert len(bins) <= 60


def test_a_constant_score_has_a_histogram():
    bins, _ = histograms.edges(np.full(7, 0.25))
    assert bins[0] < 0.25 < bins[-1]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.00011, "0.11 ms"),
        (0.0996, "0.0996 s"),
        (3.21, "3.21 s"),
        (59.999, "1 min"),
        (61, "1 min 1 s"),
        (3599.9, "1.00 h"),
        (9000, "2.50 h"),
    ],
)
def test_lengths_of_time_read_well(seconds: float, said: str):
    assert report.span(seconds).replace("\N{NO-BREAK SPACE}", " ") == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0:00.0"), (59.96, "1:00.0"), (61.25, "1:01.2"), (3723.5, "1:02:03.5")]
)
def test_places_in_a_video_read_well(seconds: float, said: str):
    assert report.clock(seconds) == said


def test_a_threshold_command_survives_the_shell_and_the_recipe(root: Path):
    """What a bar offers, pasted into a shell, is a setting that `clipmill shard` understands."""
    import shlex

    saved = json.loads((root / "run.json").read_text())["recipe"]
    commands = [a["data-command"] for a in read(root).all("g") if "data-command" in a]
    assert commands
    for command in commands[:: len(commands) // 20]:
        job, name, where, option, item = shlex.split(command)[0:5]
        assert (job, name, where, option) == ("clipmill", "shard", str(root), "--set")
        run_folder.parse(json.loads(json.dumps(saved)), [item], "run.json")


@pytest.mark.parametrize("viewport", [(1360, 900), (390, 844)], ids=["desktop", "phone"])
def test_in_a_browser_nothing_is_logged_or_loaded_and_the_page_answers(root: Path, browser, viewport):
    page = browser.new_page(viewport={"width": viewport[0], "height": viewport[1]})
    logged, asked = [], []
    page.on("console", lambda m: logged.append(m.text))
    page.on("pageerror", lambda e: logged.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(f"file://{root}/report.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport[0]

    frames = page.locator(".clip .frames").first
    box = frames.bounding_box()
    frames.scroll_into_view_if_needed()
    frames.hover(position={"x": box["width"] * 0.9, "y": 20})
    assert frames.get_attribute("data-at") == "2"
    frames.click()
    dialog = page.locator("dialog")
    assert dialog.is_visible()
    assert dialog.locator(".strip img").count() == 3
    first = dialog.locator(".facts").inner_text()
    page.keyboard.press("ArrowRight")
    assert dialog.locator(".facts").inner_text() != first
    page.keyboard.press("Escape")
    assert not dialog.is_visible()

    bar = page.locator("svg.chart g").first
    bar.hover()
    assert "clip" in page.locator("#tip").inner_text()
    bar.click()
    assert page.locator("output.try").inner_text().startswith("clipmill shard")

    rows = page.locator("#source-table tbody tr:visible")
    everything = rows.count()
    page.locator(".find").fill("holds sound only")
    assert rows.count() == 2 < everything
    assert logged == []
    assert [a for a in asked if not a.startswith(("file://", "data:"))] == []


def test_in_a_browser_hostile_text_does_nothing(tmp_path: Path, browser):
    recipe = run_folder.parse({"name": EVIL, "decide": {"duplicates": {"enabled": False}}}, [], "")
    write_run(tmp_path, [a_video(EVIL, 1, [Caption("m", EVIL)])])
    run_folder.write_run_json(tmp_path, recipe)
    shard(Store(str(tmp_path)), recipe)
    report.write(Store(str(tmp_path)))
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/report.html")
    page.locator(".clip .frames").first.click()
    assert "owned" not in page.title()
    assert page.locator("dialog .about").inner_text().count("onerror") > 0
    assert page.locator("dialog .about img, dialog .about script").count() == 0


def test_a_remote_output_gives_the_same_page(tmp_path: Path):
    """A file:// address takes the object store's way through Store: no path is opened, one upload publishes."""
    recipe = run_folder.make_run_folder(tmp_path / "run")
    shard(Store(str(tmp_path / "run")), recipe)
    local, remote = Store(str(tmp_path / "run")), Store(f"file://{tmp_path}/run")
    assert not remote.local
    pages = []
    for store in (local, remote):
        report.write(store)
        pages.append((tmp_path / "run/report.html").read_text(encoding="utf-8").replace(store.uri, "HERE"))
    assert pages[0] == pages[1]


def test_a_rule_on_the_chosen_caption_has_its_histogram_and_its_clips(tmp_path: Path):
    videos = [
        a_video(f"{i}.mp4", 1, [Caption("m", f"thing {i}", scores={"consensus": i / 10}), Caption("n", "x")])
        for i in range(8)
    ]
    rule = {"column": "caption.consensus", "min": 0.35}
    recipe = run_folder.parse(
        {"name": "x", "decide": {"rules": {"unsure": rule}, "duplicates": {"enabled": False}}}, [], ""
    )
    write_run(tmp_path, videos)
    run_folder.write_run_json(tmp_path, recipe)
    shard(Store(str(tmp_path)), recipe)
    run = report_data.Run(Store(str(tmp_path)))
    assert sorted(run.values("caption.consensus").round(6)) == [i / 10 for i in range(8)]
    assert run.keep.sum() == 4
    closest = [run.values("caption.consensus")[i] for i in report_data.choose(run).dropped["unsure"]]
    assert closest == sorted(closest, reverse=True)
    report.write(Store(str(tmp_path)))
    assert "consensus of the caption ≥ 0.35" in read(tmp_path).text


def test_a_clip_that_two_sources_share_counts_once(tmp_path: Path):
    twice = [a_video("same.mp4", 2), a_video("same.mp4", 2)]
    twice[1].source = Source("/elsewhere/same.mp4", "same.mp4")
    recipe = run_folder.parse({"name": "x", "decide": {"duplicates": {"enabled": False}}}, [], "")
    write_run(tmp_path, twice)
    run_folder.write_run_json(tmp_path, recipe)
    shard(Store(str(tmp_path)), recipe)
    report.write(Store(str(tmp_path)))
    page = read(tmp_path)
    assert "2 of 2 clips kept from 2 sources" in page.text
    assert len(page.all("article")) == 2


def test_a_rule_about_a_text_says_what_it_asks_and_is_drawn_without_a_number(tmp_path):
    recipe = run_folder.make_run_folder(tmp_path)
    rules = {
        "dogs": {"column": "caption", "contains": ["dog", "<b>"], "not_matches": "x"},
        "named": {"column": "name", "contains": "video"},
        "titled": {"column": "meta.title", "excludes": "“video 0”"},
    }
    data = recipe.model_dump(mode="json") | {"decide": {"rules": rules}}
    store = Store(str(tmp_path))
    shard(store, parse(data, [], "test"))
    report.write(store)
    page = (tmp_path / "report.html").read_text()
    assert "caption contains “dog” or “&lt;b&gt;” and does not match /x/" in page
    assert "name contains “video”" in page
    assert "title of the list does not contain" in page
