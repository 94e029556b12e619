"""Training a VQ autoencoder: its codebook moves by a whole step's inputs, on all ranks alike, and the page shows it."""

import pytest
import torch

from jobs.training.task import Draws, Step
from jobs.training.vq import task as training
from jobs.training.vq.recipe import VQRecipe
from jobs.training.vq.task import VQTask
from models.autoencoders import vq
from pipeline.recipe_file import parse_as
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.toy_training import in_ranks, start, weights

MODEL = {"kind": "vq", "stride": [1, 4, 4], "width": 8, "multipliers": [1, 1, 1], "depth": 1, "codes": 24}
CPU = torch.device("cpu")
DATA = {"fps": 8, "buckets": [{"frames": 2, "height": 16, "width": 16}], "batch": 2, "workers": 0}
LOSS = {"channels": 4, "perceptual": "none", "adversarial": 0}


def recipe(**sections) -> VQRecipe:
    plain = {"name": "test", "trains": "vq", "model": MODEL, "vq": LOSS, "data": DATA}
    return parse_as(VQRecipe, plain | {"optimizer": {"lr": 1e-3}} | sections, [], "test")


def batch(seed: int = 0) -> dict:
    pixels = torch.randint(0, 256, (2, 3, 2, 16, 16), generator=torch.Generator().manual_seed(seed))
    return {"key": ["a", "b"], "video": pixels.to(torch.uint8)}


def step(made: VQTask, batches: list[dict]) -> None:
    """A whole one but for the optimizer."""
    numbers = list(range(len(batches)))
    made.backward(Step(made.phases[0], made.vq, batches, numbers, {"clips": 1.0}, seed=0, world=made.world))
    made.after_step()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_sharded_run(tmp_path_factory.mktemp("vq") / "run", sources=4)


def test_the_codebook_moves_by_the_inputs_of_all_micro_batches_of_a_step():
    made, other = VQTask(recipe(), CPU), VQTask(recipe(), CPU)
    batches = [batch(0), batch(1)]
    step(made, batches)
    found = [other.vq(b["video"].float() / 127.5 - 1)[1] for b in batches]
    seen = other.vq.quantiser.seen(found[0]).plus(other.vq.quantiser.seen(found[1]))
    used = seen.counts > 0.03 * seen.counts.mean()  # the others are dead
    assert torch.allclose(made.vq.quantiser.mass[used], 0.01 * seen.counts[used])
    means = seen.sums[used] / seen.counts[used][:, None]
    assert torch.allclose(made.vq.quantiser.entries[used], means, atol=1e-5)


def test_vectors_of_dead_codes_begin_again_at_inputs_of_the_step():
    made = VQTask(recipe(), CPU)
    with torch.no_grad():
        made.vq.quantiser.entries[5] = 1000.0  # which nothing is nearest to
    inputs = made.vq(batch()["video"].float() / 127.5 - 1)[1].inputs.flatten(0, -2)
    step(made, [batch()])
    assert (made.vq.quantiser.entries[5] - inputs).abs().amax(1).min() < 1e-6


def test_what_was_tried_before_a_step_does_not_move_the_codebook():
    made, other = VQTask(recipe(), CPU), VQTask(recipe(), CPU)
    other.loss("vq", other.vq, batch(7), Draws(0, 0, CPU))  # as the plan of a run does
    for task in (made, other):
        step(task, [batch()])
    assert torch.equal(made.vq.quantiser.entries, other.vq.quantiser.entries)


def test_the_page_shows_the_codebooks_health():
    made = VQTask(recipe(), CPU)
    step(made, [batch()])
    report = made.loss("vq", made.vq, batch(), Draws(0, 1, CPU)).report
    assert {"codes/usage", "codes/perplexity", "codes/again"} <= report.keys()
    assert 0 < report["codes/usage"].sum <= 1
    assert 1 <= report["codes/perplexity"].sum <= 24


def trained(run: str, out: str, micro_batches: int) -> None:
    from pathlib import Path

    from jobs.training.loop import train

    data = DATA | {"micro_batches": micro_batches}
    wanted = recipe(data=data, run={"steps": 3, "save_every": 3, "sample_every": 0, "log_every": 1})
    train(wanted, run, Path(out), device="cpu", monitor=None)


def test_two_ranks_move_it_as_one_that_accumulates_twice_as_much(run, tmp_path):
    assert in_ranks(1, trained, str(run), str(tmp_path / "one"), 2) == [0]
    assert in_ranks(2, trained, str(run), str(tmp_path / "two"), 2) == [0, 0]
    one, two = weights(tmp_path / "one", 3), weights(tmp_path / "two", 3)
    assert one.keys() == two.keys()
    for name, x in one.items():
        assert torch.allclose(x.float(), two[name].float(), atol=1e-4), name


def test_fsq_has_no_codebook_to_move_and_is_trained_alike():
    levels = {"kind": "vq", "stride": [1, 4, 4], "width": 8, "multipliers": [1, 1, 1], "depth": 1}
    made = VQTask(recipe(model=levels | {"levels": [4, 3], "codes": 12}, vq=LOSS | {"channels": 2}), CPU)
    step(made, [batch()])
    assert made.vq.codes == 12
    assert all(p.grad is not None for p in made.vq.parameters())


def test_what_is_saved_makes_the_same_codes(run):
    made, loader = training.build(recipe(held_out=0.3), start(str(run)))
    clips = next(iter(loader))["video"].float() / 127.5 - 1
    again = vq.build(**made.state()["vq"])
    again.load_state_dict(made.vq.state_dict())
    assert torch.equal(again.encode(clips), made.vq.encode(clips))
    assert "held_out/psnr" in made.evaluate(made.vq.eval(), 0).scalars


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"ema": {"lengths": [0.1]}}, "ema.lengths"),
        ({"model": MODEL | {"update": "gradient"}, "compute": {"parallel": "fsdp"}}, "model.update gradient"),
        ({"data": DATA | {"buckets": [{"frames": 2, "height": 18, "width": 16}]}}, "18"),
    ],
)
def test_what_cannot_be_trained_is_said_in_a_sentence(run, sections, said):
    with pytest.raises(ValueError, match=said):
        training.build(recipe(**sections), start(str(run)))


def test_an_order_by_weights_puts_each_first_as_often_as_its_share():
    weights = torch.tensor([1.0, 3.0, 0.0, 6.0])
    orders = torch.stack([Draws(0, n, torch.device("cpu")).order(4, weights) for n in range(2000)])
    first = torch.bincount(orders[:, 0], minlength=4) / 2000
    # 4 standard deviations of a share of .6 of 2000 are .044
    torch.testing.assert_close(first, weights / 10, atol=0.044, rtol=0)
    assert (orders[:, -1] == 2).all()
    assert (orders.sort(1).values == torch.arange(4)).all()
