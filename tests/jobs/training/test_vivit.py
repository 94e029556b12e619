"""Training a ViViT: what captions name, what is held out and measured, and its features for distances."""

import hashlib
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from jobs import toy
from jobs.curate import main as curate
from jobs.training.data.held_out import held_out, trained_on
from jobs.training.exported import load_model
from jobs.training.loop import train
from jobs.training.task import Draws
from jobs.training.vivit import task as training
from jobs.training.vivit.recipe import ViViTRecipe
from jobs.training.vivit.task import Names, label_loss, labels_of
from models.encoders.vivit import ViViT
from models.hub import MissingModel
from models.language.llava import source
from models.language.towers import tower
from models.measures.features import load_features
from pipeline.recipe_file import parse_as
from pipeline.recipe_schema import RecipeError
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.toy_training import Notes, start

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
COLOURS = {"colour": ["red", "yellow", "green", "blue", "purple"], "ground": ["on black", "on white"]}


def recipe(**sections) -> ViViTRecipe:
    plain = {
        "name": "test",
        "trains": "vivit",
        "data": {"fps": 4, "buckets": [{"frames": 4, "height": 16, "width": 16}], "batch": 8, "workers": 0},
        "model": {"kind": "vivit", "model": 3, "tubelet": [2, 8, 8], "dim": 32, "depth": 1, "heads": 2},
        "labels": {"groups": COLOURS},
        "held_out": 0.3,
        "optimizer": {"lr": 3e-3, "warmup": 5},
        "run": {"steps": 160, "sample_every": 160, "save_every": 160, "log_every": 10},
    }
    return parse_as(ViViTRecipe, plain | sections, [], "test")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A run of the small world: 10 videos of 8 scenes."""
    folder = tmp_path_factory.mktemp("world")
    assert toy.main(["--out", str(folder / "toy"), "--videos", "10", "--scenes", "8", "--size", "32"]) == 0
    videos, run = str(folder / "toy/videos"), str(folder / "run")
    assert curate([videos, "--recipe", "toy", "--runner", "local", "--out", run]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vivit") / "out"
    train(recipe(), str(world), out, device="cpu", monitor=Notes)
    return out


def test_the_loss_of_one_label_is_cross_entropy_of_several_its_mean_and_of_none_nothing():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]]).float()
    found = label_loss(logits, target)
    one = F.cross_entropy(logits[:1], torch.tensor([2]))
    two = F.cross_entropy(logits[[1, 1]], torch.tensor([0, 3]))
    torch.testing.assert_close(found, torch.stack([one, two, torch.tensor(0.0)]))
    found.sum().backward()
    assert logits.grad[2].abs().max() == 0


def test_captions_name_whole_words_and_plurals_and_phrases():
    names = Names({"shape": ["circle", "square"], "ground": ["on black"], "words": ["dog", "run"]})
    said = names.named("Three Circles beside a squarely built dog; dogs run on black")
    assert said["shape"].tolist() == [1, 0]
    assert said["ground"].tolist() == [1]
    assert said["words"].tolist() == [1, 1]
    assert names.named("a dog on blackboards")["ground"].tolist() == [0]


def test_common_words_are_those_that_say_something_of_some_captions():
    captions = [
        "a dog runs",
        "the dog sleeps",
        "a cat runs",
        "cats and a bird",
        "a thing of its own",
        "and more",
    ]
    labels = labels_of(recipe(labels={"words": 3}), captions)
    assert labels == {"words": ["cat", "dog", "run"]}
    everywhere = [f"{caption} outside" for caption in captions]
    assert "outside" not in labels_of(recipe(labels={"words": 9}), everywhere)["words"]
    with pytest.raises(ValueError, match="2 captions share too few words"):
        labels_of(recipe(labels={"words": 9}), ["a dog", "a cat"])


def index_of(folder: Path, sources: list[str]) -> str:
    folder.mkdir()
    table = {"clip_id": [str(i) for i in range(len(sources))], "source_sha256": sources}
    pq.write_table(pa.table(table), folder / "index.parquet")
    return str(folder)


def test_sources_are_held_out_whole_the_same_in_any_order(tmp_path):
    sources = [f"source {i % 20}" for i in range(100)]
    folders = [index_of(tmp_path / "a", sources), index_of(tmp_path / "b", sources[::-1])]
    found = []
    for folder in folders:
        kept, held = (
            set(pq.read_table(f"{folder}/index.parquet", filters=part)["source_sha256"].to_pylist())
            for part in (*trained_on([folder], 0.15), held_out(folder, 0.15))
        )
        assert not kept & held
        assert kept | held == set(sources)
        found.append(held)
    assert found[0] == found[1]
    assert len(found[0]) == 3
    with pytest.raises(ValueError, match=r"held_out 0\.1: .* has clips of one source alone; set it to 0"):
        held_out(index_of(tmp_path / "c", ["one"] * 3), 0.1)


def test_a_source_that_one_run_of_a_mixture_holds_out_is_trained_on_in_none(tmp_path):
    sources = sorted((f"source {i}" for i in range(20)), key=lambda s: hashlib.sha256(s.encode()).digest())
    folders = [
        index_of(tmp_path / "a", sources),
        index_of(tmp_path / "b", sources[:10]),
    ]  # 6 and 3 are held out

    def those(folder, part):
        return set(pq.read_table(f"{folder}/index.parquet", filters=part)["source_sha256"].to_pylist())

    held = set().union(*(those(folder, held_out(folder, 0.3)) for folder in folders))
    kept = [those(f, part) for f, part in zip(folders, trained_on(folders, 0.3), strict=True)]
    assert kept == [set(sources) - held, set(sources[:10]) - held]
    alone = those(folders[1], trained_on(folders[1:], 0.3)[0])
    assert alone - kept[1] == set(sources[3:6])


def test_the_step_weighs_every_label_that_a_caption_names_alike(world):
    task, loader = training.build(recipe(), start(str(world)))
    batch = next(iter(loader.examples()))
    batch["caption"][0] = "nothing of the kind"
    assert task.counts(batch) == {"labels": 2 * (len(batch["key"]) - 1)}
    losses = task.loss("vivit", task.phases[0].module, batch, Draws(0, 0, torch.device("cpu")))
    assert losses.each[0] == 0
    parts = [losses.report[group] for group in COLOURS]
    assert [part.parts for part in parts] == [len(batch["key"]) - 1] * 2
    assert float(losses.sums["labels"].detach()) == pytest.approx(
        float(sum(part.sum for part in parts)), rel=1e-5
    )


def test_it_learns_what_the_captions_say_of_clips_that_it_never_saw(trained):
    scalars = Notes.newest.shown[160].scalars
    assert scalars["accuracy/ground"] == 1.0
    assert scalars["accuracy/colour"] > scalars["accuracy/colour/commonest"] + 0.2


def test_what_is_measured_is_the_share_of_held_out_clips_whose_likeliest_label_is_right(world, trained):
    """Against the network alone, a clip at a time."""
    task, loader = training.build(recipe(), start(str(world)))
    keys = {*loader.readers[0].keys}, {*task.held_out.keys}
    assert keys[1]
    assert not keys[0] & keys[1]
    load_model(trained, 0.1).load_into(task.phases[0].module, "vivit")
    network = task.phases[0].module.eval()
    right = []
    for row in range(len(task.held_out.keys)):
        clip = task.held_out.read(row)
        logits = network(torch.from_numpy(clip["video"])[None] / 127.5 - 1).logits[0, :5]
        right.append(COLOURS["colour"][int(logits.argmax())] in clip["caption"])
    assert task.evaluate(network, 0).scalars["accuracy/colour"] == pytest.approx(sum(right) / len(right))
    assert Notes.newest.shown[160].scalars["accuracy/colour"] == pytest.approx(sum(right) / len(right))


def test_its_features_are_those_of_the_averaged_network_and_tell_time_forwards_from_backwards(trained):
    found = load_features(f"vivit:{trained}")
    network = ViViT(**load_model(trained).state["vivit"]).eval()
    load_model(trained, 0.1).load_into(network, "vivit")
    videos = torch.randint(0, 256, (2, 4, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    with torch.no_grad():
        expected = network(videos.permute(0, 4, 1, 2, 3) / 127.5 - 1).features
    torch.testing.assert_close(found(videos), expected, rtol=1e-4, atol=1e-5)
    assert (found(videos.flip(1)) - expected).abs().max() > 1e-3
    assert found.name == "vivit-out"
    assert len(found.hash) == 12


def test_a_language_model_may_see_with_it(trained):
    network = ViViT(**load_model(trained).state["vivit"]).eval()
    load_model(trained, 0.1).load_into(network, "vivit")
    seeing = tower(f"vivit:{trained}").eval()
    clip = torch.rand(2, 4, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = network(clip.transpose(1, 2)).tokens
        assert torch.equal(seeing(clip).flatten(2, 3), expected)
    assert source(f"vivit:{trained}") == f"vivit:{trained} in that folder"


def test_a_folder_without_a_vivit_is_no_tower(tmp_path):
    for found in (tower, source):
        with pytest.raises(MissingModel, match=r"holds no ViViT: train one"):
            found(f"vivit:{tmp_path}")


def test_common_words_belong_to_the_run_and_are_not_chosen_anew_on_going_on(tmp_path):
    make_sharded_run(tmp_path / "run", sources=6)
    wanted = recipe(
        labels={"words": 6}, data={"buckets": [{"frames": 4, "height": 16, "width": 16}], "batch": 2}
    )
    task, _ = training.build(wanted, start(str(tmp_path / "run")))
    saved = task.state() | {"labels": {"words": ["other", "words"]}}
    again, _ = training.build(wanted, start(str(tmp_path / "run"), saved=saved))
    assert again.labels == {"words": ["other", "words"]}
    assert again.phases[0].module.head.out_features == 2
    json.dumps(task.state())  # plain values


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"labels": {}}, "give groups of phrases, or words: 2 or more"),
        ({"labels": {"groups": {"one": ["alone"]}}}, "groups.one: give two or more phrases"),
        ({"labels": {"groups": {"words": ["a", "b"]}}}, "'words' is the name of the group of common words"),
        ({"model": {"kind": "vivit", "classes": 3}}, "vivit takes no 'classes'"),
    ],
)
def test_recipes_that_mean_nothing_are_refused_where_they_are_read(sections, says):
    with pytest.raises(RecipeError, match=says):
        recipe(**sections)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"model": {"kind": "vae"}}, "trains: vivit needs model.kind vivit, not vae"),
        (
            {"data": {"buckets": [{"frames": 4, "height": 16, "width": 32}]}},
            "one bucket, as high as it is wide",
        ),
        ({"labels": {"groups": {"animal": ["cat", "dog"]}}}, "labels.groups.animal: no caption names one of"),
    ],
)
def test_recipes_that_do_not_fit_the_data_are_refused(world, sections, says):
    with pytest.raises(ValueError, match=says):
        training.build(recipe(**sections), start(str(world)))


def test_the_chance_of_the_commonest_label_is_told_beside_the_accuracy(world):
    task, _ = training.build(recipe(), start(str(world)))
    captions = [task.held_out.read(row)["caption"] for row in range(len(task.held_out.keys))]
    told = [sum(f" {colour} " in caption for caption in captions) for colour in COLOURS["colour"]]
    scalars = task.evaluate(task.phases[0].module.eval(), 0).scalars
    assert scalars["accuracy/colour/commonest"] == pytest.approx(max(told) / len(captions))
    assert math.isfinite(scalars["accuracy/ground"])
