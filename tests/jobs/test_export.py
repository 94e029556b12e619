"""Real components in two stages, saved, loaded by transformers, captioning through the mill: everywhere the same."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from jobs import caption, curate, export, toy, train
from jobs.training.vlm.export import unsaid
from jobs.training.vlm.speaker import load_speaker
from models.curation.vlm.loading import Wanted
from models.curation.vlm.model import VLM, Look
from models.language.budget import Sampling
from pipeline.io.store import Store
from pipeline.layers import Layered
from pipeline.shards.pixels import numbered
from pipeline.shards.reader import ShardReader
from tests.fixtures.shrunken import TINY_VLM, speaking

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
# tower, layer, projector, language model, how the second stage trains it
REAL = {
    "onevision": ("siglip", -1, "{map: mlp, pool: 2, newline: clip, whole_images: true}", "qwen2", "full"),
    "llava": ("clip_vision", -2, "{map: mlp}", "smollm", "lora"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six clips of the small world, curated."""
    folder = tmp_path_factory.mktemp("world")
    assert toy.main(["--out", str(folder / "toy"), "--videos", "2", "--scenes", "3"]) == 0
    local = ["--recipe", "toy", "--runner", "local", "--out", str(folder / "run")]
    assert curate.main([str(folder / "toy/videos"), *local]) == 0
    return str(folder / "run")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return speaking(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module", params=REAL)
def trained(request, run, parts, tmp_path_factory):
    """Two stages of each: the projector alone, then the rest of it too; exported."""
    tower, layer, projector, language, how = REAL[request.param]
    out = tmp_path_factory.mktemp(request.param)
    names = f"tower: {parts[tower]}, language: {parts[language]}"
    model = f"{{kind: llava, {names}, layer: {layer}, projector: {projector}}}"
    common = [
        f"model={model}", "compute={precision: fp32, parallel: ddp, activation_checkpointing: none}",
        "frames.frames=3", "data={tokens: 512, workers: 0, lanes: 1, pool: 2}", "held_out=0",
        "run={steps: 2, sample_every: 0}", "optimizer={lr: 0.01, warmup: 1, rates: {projector: 0.02}}",
    ]  # fmt: skip
    stages = {
        "aligned": ["train={tower: frozen, language: frozen}"],
        "model": [f"start={out}/aligned", f"train={{tower: frozen, language: {how}}}"]
        + (["lora={rank: 2}"] if how == "lora" else []),
    }
    for name, own in stages.items():
        sets = [x for s in [*common, *own] for x in ("--set", s)]
        command = ["vlm", run, "--recipe", "vlm", "--out", str(out / name), "--device", "cpu", *sets]
        assert train.main(command) == 0
    assert export.main([str(out / "model"), "--to", str(out / "student")]) == 0
    return out


def clips(run):
    reader = ShardReader(f"{run}/shards", decode=False, shuffle=False)
    return [reader.read(row)["video"] for row in range(len(reader.keys))]


def test_the_second_stage_goes_on_from_the_first_one(trained):
    first, second = load_speaker(trained / "aligned"), load_speaker(trained / "model")
    a, b = first.model.state_dict(), second.model.state_dict()
    changed = {name.partition(".")[0] for name in a if not torch.equal(a[name], b[name])}
    assert changed == {"projector", "language"}
    assert max((a[n] - b[n]).abs().max() for n in a if n.startswith("projector")) < 0.2


def test_trained_and_exported_say_the_same(trained, run):
    ours, theirs = load_speaker(trained / "model"), load_speaker(trained / "student")
    asked = [{"role": "user", "content": ours.prompts[0]}]
    for mp4 in clips(run)[:2]:
        a, b = ours.frames(mp4), theirs.frames(mp4)
        assert torch.equal(a.frames, b.frames)
        for answer in ("one red circle", "two"):
            (x, n), (y, m) = (s.log_likelihood(asked, [v], [answer])[0] for s, v in ((ours, a), (theirs, b)))
            assert n == m
            assert x == pytest.approx(y, rel=1e-4)
        assert ours.caption([a]) == theirs.caption([b])


def test_transformers_sees_the_pixels_and_tokens_of_training(trained, run):
    """The exported processor's, of a clip as the mill's captioner gives it, and logits."""
    ours = load_speaker(trained / "model")
    kind = json.loads((trained / "student/config.json").read_text())["model_type"]
    mill = VLM(
        Wanted(str(trained / "student")),
        input="video" if kind == "llava_onevision" else "images",
        times="none",
    )
    asked = [{"role": "user", "content": "What is it?"}]
    for mp4 in clips(run)[:3]:
        plan = ours.visuals.planned(mp4)
        clip = ours.frames(mp4)
        look = Look(list(numbered(mp4, plan.numbers)), list(plan.seconds), plan.duration, "What is it?")
        given = mill.inputs([look])
        pixels = next(x for name, x in given.items() if name.startswith("pixel_values"))
        assert torch.equal(pixels.flatten(0, -4), ours.visuals.pixels.scaled(clip.frames))
        tokens = ours._asked(asked, [clip])
        assert given["input_ids"][0].tolist() == tokens
        with torch.no_grad():
            logits = mill.model(**given).logits[0]
            mine = ours.model(torch.tensor(tokens), ours._tensors([clip]))
        torch.testing.assert_close(logits, mine, rtol=1e-3, atol=1e-4)


def test_the_mill_captions_a_run_with_it(trained, run):
    line = f"{{kind: transformers, name: student-{trained.name}, model: {trained}/student, frames: 3}}"
    assert caption.main([run, "--runner", "local", "--set", f"captions=[{line}]"]) == 0
    rows = [row for _, table in Layered(Store(run)).tables() for row in table.to_pylist()]
    told = [c for row in rows for c in row["captions"] if c["model"] == f"student-{trained.name}"]
    assert len(told) == len(rows) == 6
    assert {c["outcome"] for c in told} <= {"ok", "truncated", "empty"}


def test_the_folder_is_one_of_transformers(trained):
    model = AutoModelForImageTextToText.from_pretrained(trained / "student")
    processor = AutoProcessor.from_pretrained(trained / "student")
    ids = processor.tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    assert model.config.image_token_index == ids[0]
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert processor.chat_template


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("frames.static=5", "frames: {static: null}"),
        ("model.projector={map: linear}", "no class of transformers has this projector"),
    ],
)
def test_what_transformers_cannot_compute_is_refused_in_a_sentence(settings, says, run, tmp_path, capsys):
    sets = [f"model={TINY_VLM}", "frames.frames=2", "held_out=0", "data.workers=0", "run.sample_every=0"]
    command = [
        "vlm",
        run,
        "--recipe",
        "small-vlm",
        "--out",
        str(tmp_path / "m"),
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    assert train.main([*command, *(x for s in [*sets, settings] for x in ("--set", s))]) == 0
    capsys.readouterr()
    assert export.main([str(tmp_path / "m"), "--to", str(tmp_path / "s")]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("s*"))


def test_only_what_training_left_is_exported(tmp_path, capsys):
    assert export.main([str(tmp_path), "--to", str(tmp_path / "s")]) == 2
    assert "give a folder that clipmill train wrote" in capsys.readouterr().err


@pytest.mark.parametrize("told", ["{", "{}", "[]"])
def test_a_broken_description_is_one_sentence(tmp_path, capsys, told):
    (tmp_path / "model.json").write_text(told)
    assert export.main([str(tmp_path), "--to", str(tmp_path / "to")]) == 2
    assert "model.json is broken" in capsys.readouterr().err


def test_frames_are_resized_as_bicubic_squares(parts):
    """Against Pillow's, whose arithmetic differs in rounding alone."""
    from PIL import Image

    from models.language.pixels import Pixels

    picture = np.random.default_rng(0).integers(0, 256, (1, 40, 56, 3), dtype=np.uint8)
    got = Pixels(32, (0.5,) * 3, (0.5,) * 3).resized(picture)[0].permute(1, 2, 0).numpy()
    wanted = np.asarray(Image.fromarray(picture[0]).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.abs(got.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize(
    ("sampling", "told", "lost"),
    [
        (Sampling(8), "prompt", []),
        (Sampling(8, 4.0), "none", ["frames.fps 4"]),
        (Sampling(8, ends=True), "llava_next", ["frames.ends", "frames.times llava_next"]),
    ],
)
def test_what_no_captioner_can_be_told_is_said(sampling, told, lost):
    assert unsaid(sampling, told) == lost
