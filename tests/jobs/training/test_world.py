"""Training a world model: what its loss is, whatever is packed with what, on however many ranks; and its stages."""

from pathlib import Path

import pytest
import torch

import jobs.train
from jobs.training import needs
from jobs.training.loop import train
from jobs.training.recipe import TRAINING, load_training
from jobs.training.task import Draws
from jobs.training.world import task as training
from jobs.training.world.documents import PLACEMENT, Collate
from jobs.training.world.recipe import WorldRecipe
from jobs.training.world.stages import train_all
from jobs.training.world.system import load_vq, load_world
from models.language.loss import Goal
from models.ring_attention import split
from pipeline.recipe_file import parse_as
from pipeline.recipe_schema import RecipeError
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.toy_training import Notes, in_ranks, start, weights

CPU = torch.device("cpu")
VQ = ["data.buckets=[{frames: 2, height: 16, width: 16}]", "data.batch=2", "data.workers=0"]
VQ += ["model={kind: vq, stride: [1, 8, 8], width: 16, multipliers: [1], depth: 1, codes: 24, dct: true}"]
VQ += ["vq={channels: 8, perceptual: none, adversarial: 0}", "run={steps: 2, sample_every: 0}"]
MODEL = {"kind": "world", "dim": 32, "ffn": 48, "heads": 2, "depth": 2}
DATA = {"fps": 8, "buckets": [{"frames": 2, "height": 16, "width": 16}], "tokens": 256, "workers": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(make_sharded_run(tmp_path_factory.mktemp("world") / "run", sources=4))


@pytest.fixture(scope="module")
def vq(run, tmp_path_factory):
    """A folder of a trained one."""
    from jobs.training.recipe import load_training

    out = tmp_path_factory.mktemp("vq")
    train(load_training("toy-vq", VQ), run, out, device="cpu", monitor=Notes)
    return str(out)


def recipe(path: str | None, **sections) -> WorldRecipe:
    plain = {"name": "test", "trains": "world", "model": MODEL, "data": DATA, "vq": {"path": path}, "pool": 2}
    plain |= {"documents": {"text_to_video": 0.5, "video_to_text": 0.5, "dropped": 0}}
    plain |= {"optimizer": {"lr": 1e-3, "warmup": 2}, "run": {"steps": 4, "save_every": 2, "sample_every": 0}}
    return parse_as(WorldRecipe, plain | sections, [], "test")


def alone(batch: dict, task, number: int) -> dict:
    """The document of that number of a batch as a batch of its own."""
    before = sum(batch["lengths"][:number])
    length = batch["lengths"][number]
    tokens = task.tokens_of(batch)[before : before + length]
    found = {"tokens": tokens, "vision": batch["vision"][before : before + length], "lengths": [length]}
    for kind in ("text", "vision"):
        here = (batch[f"{kind}_at"] >= before) & (batch[f"{kind}_at"] < before + length)
        found |= {f"{kind}_at": batch[f"{kind}_at"][here] - before}
        found |= {f"{kind}_weights": batch[f"{kind}_weights"][here]}
    return found


def test_the_loss_and_gradients_of_packed_documents_are_the_mean_of_those_of_each(run, vq):
    task, loader = training.build(recipe(vq), start(run))
    batch = next(iter(loader))
    assert len(batch["lengths"]) > 1
    counts = task.counts(
        batch
    )  # of each something of the text is learnt: a caption, or the marks around a video
    assert 0 < counts["vision"] < counts["text"] == len(batch["lengths"])
    model = task.system.model

    def gradients(batches):
        model.zero_grad()
        sums = {"text": 0.0, "vision": 0.0}
        for b in batches:
            losses = task.loss("world", model, b, Draws(0, 0, CPU)).sums
            sum(losses[k] * task.weights[k] / max(task.counts(batch)[k], 1) for k in losses).backward()
            sums = {k: sums[k] + float(x) for k, x in losses.items()}
        return sums, [p.grad.clone() for p in model.parameters()]

    packed, ours = gradients([batch])
    each, theirs = gradients([alone(batch, task, i) for i in range(len(batch["lengths"]))])
    assert packed == pytest.approx(each, rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_batch_holds_the_codes_of_its_clips_where_the_layout_has_them(run, vq):
    made = recipe(vq, documents={"video_to_text": 1.0, "text_to_video": 0})
    task, loader = training.build(made, start(run))
    batch = next(iter(loader))
    tokens, frozen = task.tokens_of(batch), load_vq(vq, "vq.path", CPU)
    first = slice(0, batch["lengths"][0])
    read = task.system.layout.read(tokens[first], batch["vision"][first])
    pixels = batch["pixels"][:2].float() / 127.5 - 1
    assert torch.equal(read[0], frozen.encode(pixels[:, :, None]).flatten(1))
    assert read[1] == next(c for c in captions(run) if c == read[1])
    assert float(batch["text_weights"].sum()) == pytest.approx(batch["text_documents"])
    assert batch["vision_documents"] == 0


def captions(run: str) -> list[str]:
    from pipeline.shards.index import read_index

    return read_index(f"{run}/shards", ["caption"])["caption"].to_pylist()


def test_videos_before_their_text_are_learnt_where_prompts_say_so(run, vq):
    documents = {"video_to_text": 1.0, "text_to_video": 0, "prompts": ["vision"]}
    task, loader = training.build(recipe(vq, documents=documents), start(run))
    batch = next(iter(loader))
    assert task.counts(batch) == {"text": len(batch["lengths"]), "vision": len(batch["lengths"])}


def test_captions_are_dropped_for_guidance_as_often_as_the_recipe_says(run, vq):
    made = recipe(
        vq, documents={"text_to_video": 1.0, "video_to_text": 0, "dropped": 0.4}, data=DATA | {"tokens": 128}
    )
    task, loader = training.build(made, start(run))
    bare = task.system.layout.cost(2) + 2
    lengths = [n for _, batch in zip(range(150), loader, strict=False) for n in batch["lengths"]]
    assert sum(n == bare for n in lengths) / len(lengths) == pytest.approx(0.4, abs=0.1)


def trained(run: str, vq: str, out: str, context: int, steps: int = 3) -> None:
    made = recipe(
        vq,
        compute={"context": context},
        data=DATA | {"micro_batches": 2},
        block=16,
        run={"steps": steps, "save_every": steps, "sample_every": 0, "log_every": 1},
    )
    train(made, run, Path(out), device="cpu", monitor=Notes)


@pytest.mark.parametrize(("ranks", "context"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_that_share_documents_or_sequences_train_as_one(run, vq, tmp_path, ranks, context):
    assert in_ranks(1, trained, run, vq, str(tmp_path / "one"), 1) == [0]
    assert in_ranks(ranks, trained, run, vq, str(tmp_path / "more"), context) == [0] * ranks
    one, more = weights(tmp_path / "one", 3), weights(tmp_path / "more", 3)
    assert one.keys() == more.keys()
    for name, x in one.items():
        assert torch.allclose(x.float(), more[name].float(), atol=2e-5), name


def test_the_parts_of_a_shared_sequence_hold_its_goals_between_them(run, vq):
    task, loader = training.build(recipe(vq), start(run))
    batch = next(iter(loader))
    items = [{"key": str(n)} | loader.process(loader.source.nth(n)) for n in range(2)]
    whole = Collate(task.system.layout.codes)(items, 256)
    parts = [Collate(task.system.layout.codes, rank, 2)(items, 256) for rank in range(2)]
    own = [split(torch.arange(256), rank, 2, PLACEMENT) for rank in range(2)]
    for kind in ("text", "vision"):
        mine = [p[f"{kind}_mine"] for p in parts]
        assert sorted(torch.cat(mine).tolist()) == list(range(len(whole[f"{kind}_at"])))
        for places, here, p in zip(own, mine, parts, strict=True):
            assert torch.equal(places[p[f"{kind}_part"]], whole[f"{kind}_at"][here])
    assert batch["tokens"].shape == (256,)


def test_stages_follow_one_another_and_go_on_where_they_were_stopped(run, tmp_path):
    stages = [
        {"context": 128, "steps": 2, "theta": 1e4},
        {"context": 512, "steps": 3, "theta": 1e6, "lr": 1e-4},
    ]
    documents = {"needle": 1, "text": 1, "text_to_video": 0, "video_to_text": 0}
    made = recipe(None, documents=documents, stages=stages, run={"save_every": 2, "sample_every": 0})
    outcome, last = train_all(made, run, tmp_path, device="cpu", monitor=Notes)
    assert (outcome.step, last) == (3, tmp_path / "stage-2")
    first, second = load_world(str(tmp_path / "stage-1"), 0), load_world(str(tmp_path), 0)
    assert (first.model.theta, second.model.theta) == (1e4, 1e6)
    assert (first.recipe.context, second.recipe.context) == (128, 512)
    assert (first.recipe.data.tokens, second.recipe.data.tokens) == (256, 512)
    assert second.recipe.optimizer.lr == 1e-4
    assert second.recipe.start == str(tmp_path / "stage-1")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("model.safetensors")}
    assert (
        train_all(made, run, tmp_path, device="cpu", monitor=Notes)[0].step == 3
    )  # nothing is left to be done
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("model.safetensors")}


def test_a_stage_begins_with_the_average_that_the_one_before_left(run, tmp_path):
    text = {"needle": 0, "text": 1, "text_to_video": 0, "video_to_text": 0}
    train(recipe(None, documents=text), run, tmp_path / "a", device="cpu", monitor=Notes)
    left = load_world(str(tmp_path / "a"))
    begun, _ = training.build(recipe(None, documents=text, start=str(tmp_path / "a")), start(run))
    for a, b in zip(left.model.parameters(), begun.system.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_looked_at_says_how_captions_and_losses_do(run, vq):
    made = recipe(vq, held_out=0.3, measured=3, data=DATA | {"tokens": 256})
    task, _ = training.build(made, start(run))
    found = task.evaluate(task.system.model.eval(), 0)
    assert 0 <= found.scalars["captions/exact"] <= 1
    assert {"held_out/loss/text_to_video", "held_out/loss/video_to_text"} <= found.scalars.keys()
    assert all(x.shape == (2, 16, 16, 3) and x.dtype == torch.uint8 for x in found.videos.values())
    assert [told.wanted for told in found.texts] == list(found.videos)
    assert all(told.frames.shape == (2, 16, 16, 3) for told in found.texts)


def test_held_out_losses_are_those_of_the_tokens_that_come_after_the_prompt(run, vq):
    task, _ = training.build(recipe(vq), start(run))
    layout, model = task.system.layout, task.system.model
    codes = torch.randint(24, (2, 4))
    laid = layout.lay_out(["a cat", codes])
    said = model(laid.tokens[None], laid.vision[None])
    at = laid.vision[1:].nonzero()[:, 0]
    expected = torch.nn.functional.cross_entropy(said.vision[0, at], laid.tokens[at + 1])
    assert task._loss(model, ["a cat", codes], True) == pytest.approx(float(expected), rel=1e-5)
    laid = layout.lay_out([codes, "a cat"])
    said = model(laid.tokens[None], laid.vision[None])
    at = torch.arange(laid.vision.nonzero().max(), laid.length - 1)
    expected = torch.nn.functional.cross_entropy(said.text[0, at], laid.tokens[at + 1])
    assert task._loss(model, [codes, "a cat"], False) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"vq": {"path": None}}, "documents.text_to_video: there are no codes"),
        ({"documents": {"text_to_video": 0, "video_to_text": 0}}, "all shares are 0"),
        (
            {"data": DATA | {"buckets": [{"frames": 2, "height": h, "width": 16} for h in (16, 32)]}},
            "one size",
        ),
    ],
)
def test_recipes_that_fit_nothing_are_refused_in_a_sentence(vq, sections, said):
    with pytest.raises(RecipeError, match=said):
        recipe(vq, **sections)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": DATA | {"tokens": 127}}, "data.tokens 127"),
        ({"data": DATA | {"buckets": [{"frames": 2, "height": 20, "width": 16}]}}, "16×20 pixels"),
    ],
)
def test_data_that_does_not_fit_is_said_in_a_sentence(run, vq, sections, said):
    with pytest.raises(ValueError, match=said):
        training.build(recipe(vq, **sections), start(run))


def test_a_world_model_is_not_used_with_another_vq_autoencoder(run, vq, tmp_path):
    train(recipe(vq), run, tmp_path / "a", device="cpu", monitor=Notes)
    from jobs.training.recipe import load_training

    train(load_training("toy-vq", [*VQ, "seed=5"]), run, tmp_path / "vq", device="cpu", monitor=Notes)
    with pytest.raises(ValueError, match="other weights of its VQ autoencoder"):
        load_world(str(tmp_path / "a"), located={"vq.path": str(tmp_path / "vq")})


def test_goals_of_no_weight_are_left_out():
    goal = Goal.of(torch.arange(4), torch.tensor([0.0, 1, 0, 2]))
    assert goal.at.tolist() == [1, 3]


def test_steps_beside_stages_are_refused_as_each_stage_has_its_own():
    with pytest.raises(RecipeError, match=r"run\.steps and stages: each stage has steps of its own"):
        load_training("toy-world", ["run.steps=7"])
    assert load_training("toy-world", ["run.steps=7", "stages=[]"]).run.steps == 7


@pytest.mark.parametrize(("name", "maker"), [("toy-world", "toy-vq"), ("world", "vq")])
@pytest.mark.parametrize(("asked", "told"), [([], "vq"), (["vq.path=mine/"], "mine")])
def test_a_vq_that_is_not_there_is_named_as_it_was_with_the_command_that_makes_it(
    tmp_path, monkeypatch, capsys, name, maker, asked, told
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    makes = f"clipmill train vq RUN --recipe {maker} --out {told}"
    sets = [x for item in asked for x in ("--set", item)]
    assert (
        jobs.train.main(["world", "run/", "--recipe", name, "--out", "out/", "--device", "cpu", *sets]) == 2
    )
    err = capsys.readouterr().err
    assert f"vq.path {told} holds no trained VQ autoencoder: make it with {makes}" in err
    assert str(TRAINING) not in err
    found = dict(needs.models(load_training(name, asked)))
    with pytest.raises(RecipeError, match=f"^vq.path: {told} is not there; it comes from {makes}$"):
        found[f"vq: {told}"]()
