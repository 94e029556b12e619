"""The page of a training run says what its files say, opens from disk, and runs no text that it shows."""

import base64
import hashlib
import html
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.training.page import charts, measures, page, said
from jobs.training.page.charts import Curve, Line, Scale, chart, linear_ticks, log_ticks, short
from jobs.training.page.monitor import Metrics, write_samples
from jobs.training.task import Told
from tests.pipeline.report.test_page import CHROMIUM, EVIL, Page

RECIPE = {
    "name": "toy",
    "trains": "diffusion",
    "model": {"kind": "dit", "preset": "S/2"},
    "run": {"steps": 400},
}
PROMPTS = ["a red circle moves left", "two blue squares stand still"]


def moving(step: int, n: int) -> np.ndarray:
    """uint8 [8, 32, 32, 3], another at every step."""
    frames = np.full((8, 32, 32, 3), 30 + 20 * n, np.uint8)
    for t in range(8):
        frames[t, 8:16, 2 + 3 * t : 10 + 3 * t, n] = 200 + step // 100
    return frames


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A run of 300 of 400 steps with everything in it."""
    out = tmp_path_factory.mktemp("page") / "run"
    (out / "samples").mkdir(parents=True)
    metrics = Metrics(out / "metrics.jsonl")
    rng = np.random.default_rng(0)
    for step in range(5, 301, 5):
        loss = 0.1 + np.exp(-step / 80)
        values = {"loss": loss * rng.uniform(0.8, 1.2), "grad_norm": 0.5, "lr": 1e-4, "step_seconds": 0.5}
        values |= {"tokens_per_second": 12_345.0, "samples_per_second": 6.0, "mfu": 0.41, "data_wait": 0.003}
        values |= {f"loss/level_{i}": loss * (2 - i / 10) for i in range(10)}
        metrics.write(step, values | {"psnr": 20 + step / 100})
        if step % 100 == 0:
            metrics.write(
                step, {"frechet/net": 1000.0 / step, "kernel/net": 1 / step, "frechet/net/real": 2.5}
            )
            write_samples(out / "samples", step, {p: moving(step, n) for n, p in enumerate(PROMPTS)}, 8)
    metrics.close()
    (out / "plan.txt").write_text("parameters   12.3 M trained")
    page.write(out, RECIPE)
    return out


def read(out: Path) -> Page:
    return Page((out / "page.html").read_text(encoding="utf-8"))


@pytest.fixture
def browser() -> Iterator:
    if not CHROMIUM.exists():
        pytest.skip("needs Debian's chromium at /usr/bin/chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def test_headline_numbers_are_those_of_the_last_row(out: Path):
    text = read(out).text
    assert "toy: step 300 of 400" in text
    assert "Step 300 75 % of 400" in text
    assert "Tokens a second 12,345 6 samples a second" in text
    assert "MFU 41 %" in text
    assert "Data wait 0.3 %" in text
    assert "Fréchet distance 3.33 net; best 3.33 at step 300" in text
    assert "50 s left" in text  # 100 steps of half a second


def test_everything_that_was_logged_has_a_curve(out: Path):
    labels = [a["aria-label"] for a in read(out).all("svg")]
    for title in (
        "Loss by step",
        "Gradient norm by step",
        "Learning rate by step",
        "Loss by noise level by level",
        "Over time by step",
        "Fréchet distance by step",
        "Kernel distance by step",
        "Tokens a second by step",
        "Model FLOPs utilisation by step",
        "Waiting for data by step",
        "PSNR by step",
    ):
        assert title in labels
    assert len(labels) == len(set(labels)) == 13  # with samples a second and seconds a step


def test_loss_by_level_is_the_mean_of_the_first_and_last_tenth(out: Path):
    """Of the six last of 60 rows, at the middles of ten levels: what the pointer is told is what is in the file."""
    text = (out / "page.html").read_text(encoding="utf-8")
    svg = re.search(r'<svg[^>]*aria-label="Loss by noise level by level">.*?</svg>', text, re.S)[0]
    tips = [html.unescape(t) for t in re.findall(r'data-tip="([^"]+)"', svg)]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for i, tip in enumerate(tips):
        first, last = (np.mean([r[f"loss/level_{i}"] for r in part]) for part in (rows[:6], rows[-6:]))
        assert (
            tip == f"level {i / 10 + 0.05:.3g}\nfirst tenth of the run: {first:.4g}\nlast tenth: {last:.4g}"
        )
    assert len(tips) == 10


def test_curves_go_through_the_logged_values(out: Path):
    """The Fréchet distance's three points, from the picture back to numbers by the chart's own ticks."""
    text = (out / "page.html").read_text(encoding="utf-8")
    svg = re.search(r'<svg[^>]*aria-label="Fréchet distance by step">.*?</svg>', text, re.S)[0]
    ticks = [
        (float(m[3].replace("−", "-")), float(m[1]))
        for m in re.finditer(
            r'<line class="grid"[^>]*y1="([\d.]+)"[^>]*></line><text( [^>]*)text-anchor="end">([^<]+)</text>',
            svg,
        )
    ]
    (v0, y0), (v1, y1) = ticks[0], ticks[-1]
    points = [
        tuple(map(float, p.split(","))) for p in re.search(r'class="line" points="([^"]+)"', svg)[1].split()
    ]
    found = [v0 + (y - y0) / (y1 - y0) * (v1 - v0) for _, y in points]
    np.testing.assert_allclose(found, [10, 5, 10 / 3], atol=0.05)
    assert points[0][0] < points[1][0] < points[2][0]


def test_samples_are_the_newest_videos_and_the_sheets_of_all_steps(out: Path):
    found = read(out)
    videos = [base64.b64decode(a["src"].removeprefix("data:video/mp4;base64,")) for a in found.all("video")]
    assert videos == [f.read_bytes() for f in sorted((out / "samples/step-00000300").glob("*.mp4"))]
    assert [a["data-step"] for a in found.all("figure") if "data-step" in a] == [
        "step 100",
        "step 200",
        "step 300",
    ]
    assert all(p in found.text for p in PROMPTS)
    for picture in found.all("img"):
        assert base64.b64decode(picture["src"].removeprefix("data:image/jpeg;base64,"))[:3] == b"\xff\xd8\xff"


def test_plan_and_every_value_of_the_recipe_are_there(out: Path):
    text = read(out).text
    assert "parameters 12.3 M trained" in text
    assert "preset: S/2" in text


def test_many_steps_and_large_videos_stay_small(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(page, "VIDEO_BYTES", 20_000)
    monkeypatch.setattr(page, "SHEET_BYTES", 200_000)
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(1, 3001):
        metrics.write(step, {"loss": 1 / step, "lr": 1e-4})
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    first = write_samples(tmp_path / "samples", 0, {f"noise {i}": noise for i in range(3)}, 8)
    for step in range(100, 3001, 100):
        (tmp_path / f"samples/step-{step:08d}").symlink_to(first)
    page.write(tmp_path, RECIPE)
    found = read(tmp_path)
    embedded = sum(len(a["src"]) for kind in ("img", "video") for a in found.all(kind))
    assert embedded < 4 / 3 * 220_000 + 1000
    assert "more are in samples/step-00003000" in found.text
    shown = [a["data-step"] for a in found.all("figure") if "data-step" in a]
    assert shown[-1] == "step 3,000"
    assert 0 < len(shown) < 24
    assert (tmp_path / "page.html").stat().st_size < 700_000


def test_a_run_that_has_not_begun_says_so(tmp_path: Path):
    page.write(tmp_path, RECIPE)
    assert "No step was logged yet." in read(tmp_path).text
    assert "toy: step 0 of 400" in read(tmp_path).text


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("texts/step-00000030.json", '[{"wanted": "Two'),
        ("texts/step-00000030.json", '[{"text": "of another version"}]'),
        ("texts/step-last.json", "[]"),
        ("samples/step-00000030/samples.json", '[{"name": "x", "file": "gone.mp4"}]'),
        ("samples/step-00000030/samples.json", "[{"),
        ("plan.txt", b"\xff\xfe"),
        ("metrics.jsonl", b'{"step": 20, "time": 2.0, "loss": "low"}\n{"step": 40, "loss": 1.0}\n'),
    ],
)
def test_what_cannot_be_read_is_left_out_and_training_goes_on(captioner: Path, tmp_path: Path, file, text):
    out = shutil.copytree(captioner, tmp_path / "run")
    (out / file).parent.mkdir(parents=True, exist_ok=True)
    (out / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    page.write(out, RECIPE | {"trains": "vlm"})
    assert "Captions" in read(out).text
    assert 'id="samples"' not in (out / "page.html").read_text()


def test_one_row_nan_and_names_of_any_kind_are_drawn(tmp_path: Path):
    out = tmp_path / "run"  # the folder's name is on the page
    out.mkdir()
    metrics = Metrics(out / "metrics.jsonl")
    metrics.write(7, {"loss": float("nan"), "lr": 0.0, "a b/c": -3.0, "discriminator/loss": 1e9})
    page.write(out, RECIPE)
    found = read(out)
    assert not found.all("svg")  # a curve of one point is a number
    for said_of_it in (
        "Learning rate 0 at step 7",
        "a b/c −3 at step 7",
        "Loss, discriminator 1,000,000,000 at step 7",
    ):
        assert said_of_it in found.text
    assert "nan" not in (out / "page.html").read_text().lower().split("<main>")[1]


WANTED = ["Two red circles move left.", "One blue square stands still.", "Two red circles move left."]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    """The run of a model that says something of three clips, two of which have one caption."""
    out = tmp_path_factory.mktemp("said") / "run"
    out.mkdir()
    metrics = Metrics(out / "metrics.jsonl")
    saying = {10: ["", "red", "circle"], 20: ["Two red", "One", "Two circles"]}
    saying[30] = ["Two red squares move left.", WANTED[1], "One circle."]
    for step, each in saying.items():
        metrics.write(
            step, {"loss": 1 / step, "cider": step / 10, "exact": 0.25, "skipped": 0.0, "filled": 0.9}
        )
        told = [
            Told(wanted, text, torch.from_numpy(moving(0, n)))
            for n, (wanted, text) in enumerate(zip(WANTED, each, strict=True))
        ]
        said.write(out / "texts", step, told)
    said.write(out / "texts", 40, [Told("before", "a resume")])
    metrics.close()
    page.write(out, RECIPE | {"name": "captioner", "trains": "vlm"})
    return out


def test_what_a_model_says_stands_beside_what_it_should_with_the_pictures_that_it_saw(captioner: Path):
    text = (captioner / "page.html").read_text(encoding="utf-8")
    cards = re.findall(r'<article class="told">.*?</article>', text, re.S)
    assert len(cards) == 3  # two of one caption are two
    words = [re.sub(r"<[^>]+>", "|", card) for card in cards]
    assert all(wanted.split()[0] in card for wanted, card in zip(WANTED, words, strict=True))
    assert re.findall("<mark>(.*?)</mark>", cards[0]) == ["circles", "squares"]
    assert "the same" in words[1]
    assert "<mark>" not in cards[1]
    assert re.findall(r'class="num">(\d+)</td>', cards[2]) == ["20", "10"]  # the latest first
    assert "a resume" not in text
    strips = [base64.b64decode(x) for x in re.findall(r"data:image/jpeg;base64,([^\"]+)", text)]
    assert [Image.open(io.BytesIO(x)).size for x in strips] == [(4 * 98 - 2, 96)] * 3


def test_pictures_of_clips_are_kept_once_for_all_steps(captioner: Path):
    assert len(list((captioner / "texts/seen").iterdir())) == 3


def test_the_page_has_the_figures_of_what_is_trained_and_no_others(captioner: Path):
    found = read(captioner)
    assert "trains a vision–language model" in found.text
    assert "CIDEr-D 3 best 3 at step 30" in found.text
    assert "Fréchet" not in found.text
    labels = [a["aria-label"] for a in found.all("svg")]
    assert {"CIDEr-D by step", "Captions that equal the chosen one by step", "Packing by step"} <= set(labels)
    assert "Broken samples skipped by step" not in labels


@pytest.mark.parametrize(
    ("text", "other", "marks"),
    [
        ("a red dog", "a blue dog", ["red"]),
        ("a dog", "A dog.", []),
        ("x", "", ["x"]),
        ("", "x", []),
        ("a b c d", "a d", ["b c"]),
    ],
)
def test_the_words_that_another_text_does_not_have_there_are_marked(text, other, marks):
    found = "".join(str(part) for part in said.marked(text, other))
    assert re.findall("<mark>(.*?)</mark>", found) == marks
    assert re.sub("<[^>]*>", "", found) == (text or "–")


LOGGED = {  # what trainers log, beside what all do
    "vae": "vae/loss discriminator/loss vae/lr l1 kl psnr perceptual adversarial adaptive_weight held_out/psnr "
    "held_out/ssim held_out/psnr/dct held_out/ssim/dct",
    "vq": "loss l1 codebook psnr codes/usage codes/perplexity codes/again held_out/psnr held_out/ssim",
    "vivit": "loss colour accuracy/colour accuracy/colour/commonest",
    "vlm": "loss filled cider exact",
    "world": "loss loss/text loss/vision packed captions/exact held_out/loss/video_to_text "
    "held_out/loss/text_to_video needles/found",
    "selector": "loss loss/rivals loss/contrastive loss/matching chosen/selector chosen/chance chosen/visual_fit auc "
    "text_of_clip/R@1 text_of_clip/R@5 text_of_clip/R@10 clip_of_text/R@1 clip_of_text/R@5 clip_of_text/R@10",
}
EACH = "tokens_per_second samples_per_second step_seconds mfu data_wait peak_memory_gb skipped grad_norm lr"


@pytest.mark.parametrize("trains", LOGGED)
def test_what_trainers_log_is_called_by_words_on_the_page(trains: str):
    names = f"{LOGGED[trains]} {EACH}".split()
    found = measures.charts(names)
    assert sorted(name for chart in found for name in chart.lines.values()) == sorted(names)
    for made in found:
        assert not re.search(r"[_/]|^[a-z]", made.title), made.title
        assert all(line == line.strip("/_ ") for line in made.lines)
    headline = measures.headline(names)
    assert (headline is None) == (trains == "vivit")


def hostile(out: Path) -> None:
    metrics = Metrics(out / "metrics.jsonl")
    metrics.write(1, {EVIL: 1.0, f"frechet/{EVIL}": 2.0, f"{EVIL}/loss": 3.0})
    metrics.write(2, {EVIL: 2.0})
    write_samples(out / "samples", 1, {EVIL: moving(0, 0)}, 8)
    said.write(out / "texts", 1, [Told(EVIL, EVIL[::-1]), Told(EVIL, EVIL)])
    (out / "plan.txt").write_text(EVIL)
    page.write(out, {"name": EVIL, "model": {"kind": EVIL}, "run": {"steps": 2}, EVIL: [EVIL]})


def test_hostile_prompts_names_and_plans_are_only_text(tmp_path: Path):
    hostile(tmp_path)
    found = read(tmp_path)
    assert html.unescape(" ".join(found.words)).count(EVIL) >= 5
    assert len(found.all("script")) == 1
    assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on")]


def test_only_the_pages_own_script_is_allowed_and_nothing_may_load(out: Path):
    text = (out / "page.html").read_text(encoding="utf-8")
    policy = next(a["content"] for a in Page(text).all("meta") if "script-src" in a.get("content", ""))
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text)


# ---------------------------------------------------------------- charts


def test_a_thinned_curve_keeps_the_mean_of_every_stretch():
    curve = Curve(np.arange(10_000.0), np.random.default_rng(0).normal(size=10_000))
    thin = curve.thinned()
    assert len(thin.steps) == charts.POINTS
    np.testing.assert_allclose(thin.values, curve.values.reshape(charts.POINTS, -1).mean(1))


def test_smoothing_is_an_unbiased_mean_that_follows():
    flat = Curve(np.arange(500.0), np.full(500, 3.0)).smoothed()
    np.testing.assert_allclose(flat.values, 3.0)
    noisy = Curve(np.arange(4000.0), 1 + np.random.default_rng(0).normal(size=4000)).smoothed()
    assert noisy.values[1000:].std() < 0.1  # a mean over about 100 points: 1/√200 = .07
    step = Curve(np.arange(400.0), (np.arange(400) >= 200).astype(float)).smoothed()
    assert step.values[199] == 0
    assert step.values[240] > 0.95


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (1e-5, 3e-5), (100, 101), (0, 123_456)])
def test_ticks_are_few_round_and_evenly_spaced(low: float, high: float):
    ticks = linear_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0])
    assert f"{steps[0]:e}"[0] in "125"
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] <= high + 1e-12


def test_logarithmic_ticks_lie_between_the_ends():
    assert log_ticks(0.03, 1.2) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1])
    assert log_ticks(1e-8, 1e3)[0] >= 1e-8
    assert len(log_ticks(1e-8, 1e3)) <= 8


def test_a_peak_does_not_flatten_the_rest():
    values = np.ones(1000)
    values[500] = 1e4
    scale = Scale.of([Line("logged", Curve(np.arange(1000.0), values), "raw")], False)
    assert scale.high < 10


@pytest.mark.parametrize("values", [[20.0, 23.0], [-5.0, 7.0], [0.01, 40.0], [3.0, 3.0], [0.0, 0.0]])
def test_a_scale_maps_its_ends_to_the_edges_and_its_ticks_in_between(values: list[float]):
    scale = Scale.of([Line("a", Curve(np.array([0.0, 10.0]), np.array(values)))], False)
    assert scale.low <= min(values) <= max(values) <= scale.high
    assert (scale.y(scale.low), scale.y(scale.high)) == pytest.approx((charts.HIGH, charts.TOP))
    assert (scale.x(0), scale.x(10)) == (charts.LEFT, charts.WIDE)
    assert scale.log == (values == [0.01, 40.0])
    for tick in scale.ticks:
        assert charts.TOP - 1e-9 <= scale.y(tick) <= charts.HIGH + 1e-9


@pytest.mark.parametrize(
    ("x", "said"),
    [(0, "0"), (0.0003, "3e−4"), (1234, "1234"), (12_000, "12k"), (2.5e6, "2.5M"), (-0.5, "−0.5")],
)
def test_ticks_read_well(x: float, said: str):
    assert short(x) == said


def test_nothing_to_draw_is_no_chart():
    assert chart("x", [Line("a", Curve(np.array([]), np.array([])))]) is None


# ---------------------------------------------------------------- in a browser


@pytest.mark.parametrize("viewport", [(1360, 900), (390, 844)], ids=["desktop", "phone"])
def test_in_a_browser_videos_play_and_nothing_is_logged_or_loaded(out: Path, browser, viewport):
    tab = browser.new_page(viewport={"width": viewport[0], "height": viewport[1]})
    logged, asked = [], []
    tab.on("console", lambda m: logged.append(m.text))
    tab.on("pageerror", lambda e: logged.append(str(e)))
    tab.on("request", lambda r: asked.append(r.url))
    tab.goto(f"file://{out}/page.html")
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport[0]

    video = tab.locator("video").first
    video.scroll_into_view_if_needed()
    tab.wait_for_function("document.querySelector('video').currentTime > 0")
    shown = video.evaluate("v => [v.videoWidth, v.videoHeight, Math.round(v.duration * 1000)]")
    assert shown == [128, 128, 1000]  # 32 pixels four times as large, 8 frames at 8 a second

    sheets = tab.locator(".history figure:visible")
    assert sheets.count() == 1
    newest = sheets.locator("img").get_attribute("src")
    slider = tab.locator(".history input")
    slider.focus()
    slider.press("ArrowLeft")
    assert tab.locator(".history output").inner_text() == "step 200"
    assert sheets.count() == 1
    assert sheets.locator("img").get_attribute("src") != newest

    tab.locator("#loss svg.chart g").nth(30).hover()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert f"logged: {rows[30]['loss']:.4g}" in tab.locator("#tip").inner_text()
    assert logged == []
    assert [a for a in asked if not a.startswith(("file://", "data:"))] == []


@pytest.mark.parametrize("width", [1360, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_no_words_overlap_and_all_can_be_read(
    captioner: Path, out: Path, browser, width, scheme
):
    """No two texts of a chart lie on one another, none leaves the window, and each stands out from what is behind it
    (WCAG's contrast of 4.5)."""
    for run in (captioner, out):
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.goto(f"file://{run}/page.html")
        for details in tab.locator("details").all():
            details.evaluate("d => { d.open = true }")
        assert tab.evaluate(OVERLAPS) == []
        assert tab.evaluate(FAINT) == []
        tab.close()


OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg.chart")) {
    const boxes = [...svg.querySelectorAll("text")].map((t) => [t.textContent, t.getBoundingClientRect()]);
    for (const [i, [a, p]] of boxes.entries()) {
      if (p.left < 0 || p.right > innerWidth) found.push([a, "outside"]);
      for (const [b, q] of boxes.slice(i + 1)) {
        if (p.left < q.right && q.left < p.right && p.top < q.bottom - 2 && q.top < p.bottom - 2) found.push([a, b]);
      }
    }
  }
  for (const e of document.querySelectorAll("main :not(pre, svg, svg *, option)")) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > innerWidth + 1) found.push([e.tagName, e.textContent.slice(0, 40)]);
  }
  return found;
}"""
FAINT = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => {
    const linear = (x) => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
    const [r, g, b] = c.slice(0, 3).map((x) => linear(x / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("main *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.matches("script, style")) continue;
    const style = getComputedStyle(e), ink = rgba(e instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) found.push([e.tagName, e.textContent.slice(0, 40)]);
  }
  return found;
}"""


def test_in_a_browser_hostile_text_does_nothing(tmp_path: Path, browser):
    hostile(tmp_path)
    tab = browser.new_page()
    tab.goto(f"file://{tmp_path}/page.html")
    tab.locator("svg.chart g").first.hover()
    assert "owned" not in tab.evaluate("document.title").replace(EVIL, "")
    assert "onerror" in tab.locator("figcaption").first.inner_text()
    assert tab.locator("main script, main img[onerror]").count() == 0
