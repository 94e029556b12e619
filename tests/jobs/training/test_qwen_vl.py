"""Qwen-VL through the trainer: clips at their own size in packed sequences, exported, served and asked as trained."""

import io
import itertools
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from jobs import caption, chat, curate, evaluate, export, toy
from jobs.training import needs
from jobs.training.loop import train as run_training
from jobs.training.parallelize import compile_blocks
from jobs.training.recipe import load_training
from jobs.training.task import Draws
from jobs.training.vlm.conversations import Collate, Documents
from jobs.training.vlm.speaker import load_speaker
from jobs.training.vlm.task import Runs, build
from jobs.training.vlm.visuals import budget_table
from models.curation.vlm.loading import Wanted
from models.curation.vlm.model import VLM, Look
from models.language.budget import Sampling
from pipeline.io.store import Store
from pipeline.layers import Layered
from pipeline.recipe import RecipeError
from pipeline.shards.pixels import numbered, picture, size_of_clip, size_of_picture
from pipeline.shards.reader import BrokenSample, ShardReader
from tests.fixtures import tiny_qwen_vl
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.toy_training import Notes, start

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SMALL = [
    "frames.frames=3", "held_out=0", "measured=2", "answer=4", "run={steps: 2, sample_every: 0, log_every: 1}",
    "data={tokens: 512, workers: 0, lanes: 1, pool: 2, micro_batches: 1}", "ema.lengths=[]",
    "compute={precision: fp32, parallel: ddp, activation_checkpointing: none}", "optimizer={lr: 0.01, warmup: 1}",
]  # fmt: skip
WHOLE = ["lora=null", "train={tower: full, projector: full, language: full}"]
DRAWS = Draws(0, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Clips of three aspects."""
    folder = tmp_path_factory.mktemp("run") / "run"
    make_sharded_run(folder, sources=3)
    return str(folder)


@pytest.fixture(scope="module", params=["2.5", "3"])
def published(request, tmp_path_factory):
    return str(tiny_qwen_vl.checkpoint(tmp_path_factory.mktemp("published"), request.param))


@pytest.fixture(scope="module")
def talks(tmp_path_factory, run):
    """Conversations about pictures of several sizes, one of them turned, a clip, and nothing."""
    folder = tmp_path_factory.mktemp("talks")
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, size, exif in (("a", (40, 50), None), ("b", (90, 30), None), ("c", (30, 80), turned)):
        picture = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        picture.save(folder / f"{name}.png", **({"exif": exif} if exif else {}))
    reader = ShardReader(f"{run}/shards", decode=False, shuffle=False)
    (folder / "clip.mp4").write_bytes(reader.read(0)["video"])

    def turn(asked, said):
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]

    lines = [
        {"messages": turn("what?", "a picture") + turn("sure?", "yes"), "images": ["a.png"]},
        {"messages": turn("<video> or <image>?", "neither"), "images": ["c.png"], "video": "clip.mp4"},
        {"messages": turn("which?", "b"), "images": ["a.png", "b.png", "c.png"]},
        {"messages": turn("how are you?", "well, and never seen")},
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def recipe(published, *more):
    return load_training("qwen-vl", [f"model.weights={published}", "model.max_pixels=3072", *SMALL, *more])


def packed(task, items, length=None):
    collate = Collate(task.visuals, task.chat.tokenizer.pad_token_id, packed=True)
    lengths = [item["length"] for item in items]
    return collate(items, length or sum(lengths)) | {"key": [i["key"] for i in items], "lengths": lengths}


def loss(task, batch):
    task.model.train()
    task.model.zero_grad()
    total = task.loss("vlm", task.model, batch, DRAWS).sums["documents"]
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def made(run, published, talks):
    """(task, items): clips and conversations."""
    wanted = recipe(published, *WHOLE, f"data.mixture=[{{data: {talks}/talks.jsonl, share: 0.5}}]")
    task, loader = build(wanted, start(run))
    process = Documents(task.chat, task.visuals)
    source = Runs(wanted, run).source()
    assert budget_table(task.model, task.visuals, 512) in loader.table()
    assert "3 frames of 640×360" in loader.table()
    return task, [process(source.nth(i)) | {"key": str(i)} for i in range(10)]


def test_packed_documents_weigh_and_teach_as_each_does_alone(made):
    task, items = made
    assert {len(item["visuals"]) for item in items} == {0, 1, 2, 3}
    assert len({x.sides for item in items for x in item["visuals"]}) > 2
    batch = packed(task, items, sum(i["length"] for i in items) + 9)
    assert batch["positions"].shape == (3, len(batch["tokens"]))
    whole, gradients = loss(task, batch)
    alone = [loss(task, packed(task, [item])) for item in items]
    assert whole == pytest.approx(sum(x for x, _ in alone), rel=1e-5)
    assert {name.partition(".")[0] for name in gradients} == {"tower", "projector", "language"}
    for name, g in gradients.items():
        torch.testing.assert_close(g, sum(own[name] for _, own in alone), rtol=2e-3, atol=2e-5)


def test_the_tower_s_blocks_are_not_compiled_as_they_part_at_each_picture(made):
    task, _ = made
    blocks = list(task.model.blocks())
    tower = [b for b in blocks if not getattr(b, "one_graph", True)]
    assert [id(b) for b in tower] == [id(b) for b in task.model.tower.blocks]
    compile_blocks(tower, [])
    assert all("forward" not in vars(b) for b in tower)


def test_rows_give_the_loss_of_a_sequence(made):
    task, items = made
    rows = Collate(task.visuals, task.chat.tokenizer.pad_token_id, packed=False)
    batch = rows(items, max(i["length"] for i in items)) | {
        "lengths": [[i["length"]] for i in items],
        "key": [],
    }
    assert batch["positions"].shape == (3, *batch["tokens"].shape)
    assert loss(task, batch)[0] == pytest.approx(loss(task, packed(task, items))[0], rel=1e-5)


def test_a_clip_that_breaks_late_teaches_nothing(made):
    task, items = made
    clip = next(i for i, item in enumerate(items) if [len(x.numbers) for x in item["visuals"]] == [3])
    broken = dict(items[clip], visuals=[replace(items[clip]["visuals"][0], media=b"no mp4")])
    other = next(item for item in items if item is not items[clip])
    batch = packed(task, [broken, other])
    assert batch["skipped"] == [broken["key"]]
    assert batch["documents"] == 1
    assert loss(task, batch)[0] == pytest.approx(loss(task, packed(task, [other]))[0], rel=1e-5)


def test_a_broken_clip_is_captioned_as_a_black_one(run, published):
    wanted = recipe(published, "held_out=0.4", "frames.frames=1")
    task, _ = build(wanted, start(run))

    def broken(media):
        raise BrokenSample("broken")

    task.visuals.clip = broken
    assert task.evaluate(task.model, 1).texts


def test_sizes_are_told_without_decoding_as_decoding_gives_them(run, talks):
    reader = ShardReader(f"{run}/shards", decode=False, shuffle=False)
    found = set()
    for row in range(len(reader.keys)):
        mp4 = reader.read(row)["video"]
        assert size_of_clip(mp4) == numbered(mp4, [0]).shape[1:3]
        found.add(size_of_clip(mp4))
    assert len(found) > 1
    assert size_of_picture(str(talks / "b.png")) == (90, 30)
    assert size_of_picture(str(talks / "c.png")) == (80, 30)  # turned
    shapes = []
    for turned, kind in itertools.product(range(1, 9), ("JPEG", "PNG", "WEBP", "TIFF")):
        exif, file = Image.Exif(), io.BytesIO()
        exif[ExifTags.Base.Orientation] = turned
        Image.new("RGB", (40, 20)).save(file, kind, exif=exif)
        shapes.append(size_of_picture(file.getvalue()))
        assert shapes[-1] == picture(file.getvalue()).shape[1:3], (turned, kind)
    assert set(shapes) == {(20, 40), (40, 20)}
    for broken in (b"no mp4", b""):
        with pytest.raises(BrokenSample):
            size_of_clip(broken)
        with pytest.raises(BrokenSample):
            size_of_picture(broken)


def test_a_mere_line_is_a_broken_sample(made, tmp_path):
    task, _ = made
    Image.new("RGB", (3000, 10)).save(tmp_path / "line.png")
    with pytest.raises(BrokenSample, match="10×3000 pixels: one side is more than 200 times"):
        task.visuals.image(str(tmp_path / "line.png"))


# ---------------------------------------------------------------- trained, exported, asked


@pytest.fixture(scope="module")
def trained(run, published, tmp_path_factory):
    """Two stages: the projector alone, then adapters of the language model beside it; exported."""
    out = tmp_path_factory.mktemp("trained")
    aligned = ["lora=null", "train={tower: frozen, projector: full, language: frozen}"]
    run_training(recipe(published, *aligned), run, out / "aligned", device="cpu", monitor=Notes)
    adapted = [f"start={out}/aligned", "lora={rank: 2}", "train.projector=full"]
    rates = "optimizer.rates={projector: 0.02}"
    run_training(recipe(published, *adapted, rates), run, out / "model", device="cpu", monitor=Notes)
    assert export.main([str(out / "model"), "--to", str(out / "student")]) == 0
    return out


def clips(run):
    reader = ShardReader(f"{run}/shards", decode=False, shuffle=False)
    return [reader.read(row)["video"] for row in range(len(reader.keys))]


def test_the_second_stage_goes_on_from_the_first_one(trained, published):
    models = [
        load_speaker(where).model.state_dict()
        for where in (published, trained / "aligned", trained / "model")
    ]
    changed = [{n.partition(".")[0] for n in a if not torch.equal(a[n], b[n])} for a, b in pairwise(models)]
    assert changed == [{"projector"}, {"projector", "language"}]


def test_trained_and_exported_say_the_same(trained, run):
    ours, theirs = load_speaker(trained / "model"), load_speaker(trained / "student")
    asked = [{"role": "user", "content": ours.prompts[0]}]
    assert theirs.prompts == ours.prompts
    for mp4 in clips(run)[:3]:
        a, b = ours.frames(mp4), theirs.frames(mp4)
        assert torch.equal(a.frames, b.frames)
        answers = ["one red circle", "two"]
        pairs = zip(
            *(s.log_likelihood(asked, [v], answers) for s, v in ((ours, a), (theirs, b))), strict=True
        )
        for (x, n), (y, m) in pairs:
            assert (x, n) == (pytest.approx(y, rel=1e-4), m)
        assert ours.caption([a]) == theirs.caption([b])


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_the_mill_and_transformers_see_the_pixels_and_tokens_of_training(trained, run, frames):
    """And give the same answers and logits."""
    ours, mill = load_speaker(trained / "model"), VLM(Wanted(str(trained / "student")), max_new_tokens=4)
    ours.visuals = ours.visuals.with_sampling(ours.model, Sampling(frames))
    assert mill.input == "video"
    asked = [{"role": "user", "content": "What is it?"}]
    for mp4 in clips(run)[:3]:
        plan = ours.visuals.planned(mp4)
        clip = ours.frames(mp4)
        look = Look(list(numbered(mp4, plan.numbers)), list(plan.seconds), plan.duration, "What is it?")
        given = mill.inputs([look])
        (visual,) = ours._tensors([clip])
        assert torch.equal(given["pixel_values_videos"], ours.model.looks.patches(visual))
        tokens = torch.tensor([ours._asked(asked, [clip])])
        assert torch.equal(given["input_ids"], tokens)
        with torch.no_grad():
            logits = mill.model(**given).logits[0]
            positions = ours.model.positions(tokens, [visual], **ours.visuals.timing([clip]))
            mine = ours.model(tokens, [visual], positions=positions)[0]
        torch.testing.assert_close(logits, mine, rtol=1e-3, atol=1e-4)
        assert mill([look])[0].text == ours.answer([asked], [[clip]], most=4)[0]


def test_the_folder_is_one_of_transformers(trained, published):
    model = AutoModelForImageTextToText.from_pretrained(trained / "student")
    first = AutoModelForImageTextToText.from_pretrained(published)
    assert type(model) is type(first)
    assert model.state_dict().keys() == first.state_dict().keys()
    processor = AutoProcessor.from_pretrained(trained / "student")
    assert processor.image_processor.size["longest_edge"] == 3072
    assert processor.chat_template == AutoProcessor.from_pretrained(published).chat_template


def test_the_mill_captions_a_run_with_it(trained, tmp_path):
    run = str(tmp_path / "run")
    assert toy.main(["--out", str(tmp_path / "toy"), "--videos", "1", "--scenes", "3"]) == 0
    assert curate.main([f"{tmp_path}/toy/videos", "--recipe", "toy", "--runner", "local", "--out", run]) == 0
    line = f"{{kind: transformers, name: student, model: {trained}/student, frames: 3}}"
    assert caption.main([run, "--runner", "local", "--set", f"captions=[{line}]"]) == 0
    rows = [row for _, table in Layered(Store(run)).tables() for row in table.to_pylist()]
    told = [c for row in rows for c in row["captions"] if c["model"] == "student"]
    assert len(told) == len(rows)
    assert {c["outcome"] for c in told} <= {"ok", "truncated", "empty"}


def test_it_is_talked_to_and_evaluated(trained, run, talks, tmp_path, capsys):
    command = [str(trained / "model"), "--video", str(talks / "clip.mp4"), "--image", str(talks / "c.png")]
    assert chat.main([*command, "--ask", "what?", "--most", "4", "--device", "cpu"]) == 0
    speaker = load_speaker(trained / "model")
    shown = [speaker.frames(str(talks / "clip.mp4")), speaker.image(str(talks / "c.png"))]
    asked = [{"role": "user", "content": "what?"}]
    assert capsys.readouterr().out.strip() == speaker.answer([asked], [shown], most=4)[0]
    against = [
        "vlm",
        str(trained / "model"),
        "probability",
        "--against",
        run,
        "--out",
        str(tmp_path / "eval"),
    ]
    assert evaluate.main([*against, "--frames", "2", "--device", "cpu"]) == 0
    assert "chance 50.0%" in capsys.readouterr().out
    against = ["vlm", str(trained / "model"), "needle", "--against", run, "--out", str(tmp_path / "needle")]
    few = [
        "--lengths",
        "2",
        "--depths",
        "2",
        "--trials",
        "1",
        "--options",
        "2",
        "--frames",
        "1",
        "--by",
        "words",
    ]
    assert evaluate.main([*against, *few, "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["frames.static=3"], "sees all tokens of a clip"),
        (["model={kind: qwen_vl}"], "give weights"),
        (["model={kind: qwen_vl, config: {model_type: llava}}"], "none of qwen2_vl, qwen2_5_vl, qwen3_vl"),
        (["model={kind: qwen_vl, weights: /nowhere}"], "'/nowhere': no such folder"),
        (["compute.attention=flex"], "no such kernel"),
        (["model.max_pixels=255"], "max_pixels 255 is less than a token of 16×16: give 256 or more"),
        (["model.min_pixels=1024", "model.max_pixels=512"], "min_pixels 1024 is more than max_pixels 512"),
        (["data.tokens=30"], "raise data.tokens"),
    ],
)
def test_what_cannot_be_trained_is_said_in_a_sentence(more, says, run, published):
    with pytest.raises(ValueError) as told:  # noqa: PT011
        _, loader = build(recipe(published, *more), start(run))
        next(iter(loader))
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_what_it_needs_is_known_before_any_work(published, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def needed(recipe):
        return {name: where for name, where in needs.models(recipe) if name.startswith("model: ")}

    (name, where), *others = needed(recipe(published)).items()
    assert (name, others, where()) == (f"model: {published}", [], f"{published} a folder")
    (where,) = needed(load_training("qwen-vl")).values()
    with pytest.raises(
        RecipeError, match=r"model\.weights: model 'Qwen/Qwen2.5-VL-3B-Instruct' is neither a folder"
    ):
        where()
    with pytest.raises(RecipeError, match="qwen_vl takes no 'tower'"):
        load_training("qwen-vl", ["model.tower=x"])
