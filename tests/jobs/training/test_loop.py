"""The loop: a step depends on its place alone, and nothing that goes wrong is lost or kept."""

import math
import os
import signal
import time
from typing import ClassVar

import pytest
import torch
from torch import nn

from jobs.training import loop, signals
from jobs.training.checkpoint import checkpoints
from jobs.training.exported import CheckpointError
from jobs.training.loop import TrainError, rate_factor, share_of_step
from jobs.training.recipe_core import Optimizer
from jobs.training.task import Draws, Losses, Summed, parameter_groups, seed_torch
from models.ema import beta
from tests.fixtures.toy_training import Net, Notes, Numbers, Toy, build, recipe, run, weights

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_k_steps_and_the_rest_equal_all_steps_bit_for_bit(tmp_path, accumulate):
    def wanted(steps):
        return recipe(run={"steps": steps, "save_every": 100}, data={"micro_batches": accumulate})

    run(wanted(7), tmp_path / "whole")
    whole = Notes.newest.rows
    run(wanted(3), tmp_path / "parts")
    torch.manual_seed(99)  # what another process would have
    run(wanted(7), tmp_path / "parts")
    assert Notes.newest.resumed == 3
    same(weights(tmp_path / "whole", 7), weights(tmp_path / "parts", 7))
    timing = {"tokens_per_second", "samples_per_second", "step_seconds", "mfu", "data_wait", "peak_memory_gb"}
    for step, row in Notes.newest.rows.items():
        assert {k: v for k, v in row.items() if k not in timing} == {
            k: v for k, v in whole[step].items() if k not in timing
        }


def test_a_finished_run_is_not_trained_again(tmp_path):
    run(recipe(), tmp_path)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert run(recipe(), tmp_path).step == 6
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before


def test_training_is_that_of_a_loop_written_out(tmp_path):
    """Against ten lines of plain torch: mean over all samples of the step, clipped, AdamW, averaged."""
    wanted = recipe(
        run={"steps": 5},
        data={"micro_batches": 3},
        optimizer={"lr": 0.02, "warmup": 2, "clip": 13.0, "decay": "linear"},
        ema={"lengths": (0.1,)},
    )
    run(wanted, tmp_path)
    task, numbers = Toy(wanted, CPU), Numbers(0, 1)
    net, optimizer = task.phases[0].module, task.phases[0].optimizer
    average, norms = {}, []
    for step in range(1, 6):
        rate = 0.02 * min(step / 2, 1) * (1 - max(step - 1 - 2, 0) / 3)
        optimizer.zero_grad()
        errors = []
        for a in range(3):
            micro = (step - 1) * 3 + a
            seed_torch(wanted.seed, micro)
            batch = numbers.batch(micro)
            errors.append(task.loss("toy", net, batch, Draws(0, micro, CPU)).sums["clips"])
        sizes = [1 + ((step - 1) * 3 + a) % 3 for a in range(3)]
        (sum(errors) / sum(sizes)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 13.0)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        for name, p in net.named_parameters():
            old = average.get(name, p.detach())
            average[name] = old + (1 - beta(step, 0.1)) * (p.detach() - old)
    got = weights(tmp_path, 5)
    for name, p in net.named_parameters():
        assert (f"model/toy/{name}" in got) == p.requires_grad
        if p.requires_grad:
            torch.testing.assert_close(got[f"model/toy/{name}"], p.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(got[f"ema/toy/0.1/{name}"], average[name], rtol=1e-5, atol=1e-6)
    assert min(norms) < 13 < max(norms)  # clipped, and not
    assert [Notes.newest.rows[s]["grad_norm"] for s in range(1, 6)] == pytest.approx(norms, rel=1e-4)


def test_figures_are_means_over_parts_and_levels_are_binned(tmp_path):
    class Known(Toy):
        def loss(self, phase, model, batch, draws):
            found = super().loss(phase, model, batch, draws)
            n = len(batch["x"])
            levels = torch.linspace(0, 1, n) if n > 1 else torch.tensor([0.35])
            return Losses(found.sums, {"ones": Summed(torch.tensor(float(n)), n)}, None, levels, levels * 10)

    def known(recipe, start):
        return build(recipe, start, task=Known)

    run(recipe(run={"steps": 4, "log_every": 2}, data={"micro_batches": 2}), tmp_path, build=known)
    assert sorted(Notes.newest.rows) == [2, 4]
    row = Notes.newest.rows[2]  # micro-batches 0…3, of 1, 2, 3, 1 samples
    assert row["ones"] == 1
    assert row["loss/level_0"] == 0
    assert row["loss/level_3"] == pytest.approx(3.5)
    assert row["loss/level_5"] == pytest.approx(5)
    assert row["loss/level_9"] == pytest.approx(10)
    assert "loss/level_1" not in row
    assert row["skipped"] == 1
    assert row["samples_per_second"] * row["step_seconds"] * 2 == pytest.approx(7)
    assert 0 <= row["data_wait"] <= 1
    assert row["mfu"] > 0


@pytest.mark.parametrize(
    ("decay", "values"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5**1.5]),
    ],
)
def test_the_rate_warms_up_and_decays(decay, values):
    optimizer = Optimizer(warmup=4, decay=decay)
    assert [rate_factor(optimizer, s, 8) for s in range(1, 9)] == pytest.approx(values)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_with_the_clips_and_is_not_kept(tmp_path, what):
    class Bad(Toy):
        def loss(self, phase, model, batch, draws):
            found = super().loss(phase, model, batch, draws)
            if draws.micro == 3 and what == "loss":
                found.sums["clips"] = found.sums["clips"] * float("nan")
            if draws.micro == 3 and what == "gradient":
                zero = model.blocks[0].layer.bias - model.blocks[0].layer.bias
                found.sums["clips"] = found.sums["clips"] + 0 * zero.pow(0.5).sum()
            return found

    made = []

    def bad(recipe, start):
        found = build(recipe, start, Bad)
        made.append(found[0])
        return found

    with pytest.raises(
        TrainError, match=rf"step 4: the {what} is not finite, on the clips clip-3-0; step 2 is kept"
    ):
        run(recipe(), tmp_path, build=bad)
    assert list(checkpoints(tmp_path)) == [2]
    run(recipe(run={"steps": 3, "save_every": 3}), tmp_path / "good")
    good = weights(tmp_path / "good", 3)
    left = made[0].phases[0].module.state_dict()  # the bad step was not applied
    assert all(torch.equal(x, good[f"model/toy/{name}"]) for name, x in left.items() if name != "frozen")


def test_running_out_of_memory_names_the_batch_and_what_would_fit(tmp_path):
    class Large(Toy):
        def loss(self, phase, model, batch, draws):
            if draws.micro == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return super().loss(phase, model, batch, draws)

    def large(recipe, start):
        return build(recipe, start, task=Large)

    with pytest.raises(TrainError) as e:
        run(recipe(), tmp_path, build=large)
    said = str(e.value)
    assert "x 3×8" in said
    assert "set data.tokens 1 or compute.activation_checkpointing full" in said
    assert list(checkpoints(tmp_path)) == [2]


def test_a_plan_is_told_before_the_first_step(tmp_path, capsys):
    run(recipe(run={"steps": 1}, data={"micro_batches": 2}), tmp_path)
    (text,) = Notes.newest.texts
    trained = sum(p.numel() for p in Net().parameters()) - 1
    assert f"parameters   {trained} trained, 1 frozen" in text
    assert f"averages     {2 * 4 * trained / 1000:.3g} kB" in text
    # a sample: 8×8 products, forward, by weight and by input; the data needs no gradient. The largest has three
    flops = 2 * 3 * (2 * 64 * (2 + 3) + 2 * 8 * 3)
    assert f"{flops / 1e12:.3g} TFLOP" in text
    assert "measured" in text
    assert text in capsys.readouterr().err


def test_each_shape_counts_what_it_costs():
    """Micro-batches of 1, 2 and 3 samples; of another shape, in proportion to its tokens."""
    every = Numbers(0, 1).examples()
    plan = loop.make_plan(recipe(), Toy(recipe(), CPU), every, loop.World(0, 1, CPU))
    sample = 2 * 64 * (2 + 3) + 2 * 8 * 3
    assert [plan.flops(batch, 99) for batch in every] == [sample, 2 * sample, 3 * sample]
    assert plan.flops({"x": torch.zeros(7, 8)}, 7) == 7 * sample


def test_progress_is_a_plain_line_where_there_is_no_terminal(tmp_path, capsys):
    run(recipe(), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    loss = Notes.newest.rows[6]["loss"]
    assert any(" s a step at first: about 0:0" in line for line in lines)
    assert lines[-1].startswith(f"step 6/6  loss {loss:.4g}  ")
    assert "steps/s  0:00 left" in lines[-1]
    assert sum(line.startswith("step ") for line in lines) == 1  # six quick steps are no six lines


def test_making_the_plan_changes_nothing(tmp_path, monkeypatch):
    run(recipe(), tmp_path / "with")
    real = loop.make_plan
    empty = real(recipe(), Toy(recipe(), CPU), Numbers(0, 1).examples(), loop.World(0, 1, CPU))
    monkeypatch.setattr(loop, "make_plan", lambda *_: empty)
    run(recipe(), tmp_path / "without")
    same(weights(tmp_path / "with", 6), weights(tmp_path / "without", 6))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_activations_gives_the_same_bits(tmp_path, mode):
    run(recipe(run={"steps": 3}), tmp_path / "kept")
    run(recipe(run={"steps": 3}, compute={"activation_checkpointing": mode}), tmp_path / "again")
    same(weights(tmp_path / "kept", 3), weights(tmp_path / "again", 3))
    assert "less what is recomputed" in Notes.newest.texts[0]


def test_bf16_runs_products_in_bf16_and_keeps_parameters_in_float32(tmp_path):
    seen = set()

    class Watched(Toy):
        def loss(self, phase, model, batch, draws):
            model.out.register_forward_hook(lambda m, args, out: seen.add((m.weight.dtype, out.dtype)))
            return super().loss(phase, model, batch, draws)

    def watched(recipe, start):
        return build(recipe, start, task=Watched)

    run(recipe(run={"steps": 2}, compute={"precision": "bf16"}), tmp_path, build=watched)
    assert seen == {(torch.float32, torch.bfloat16)}
    assert all(x.dtype == torch.float32 for x in weights(tmp_path, 2).values())


def test_kinds_of_parts_have_their_weights_and_counts_of_the_whole_step(tmp_path):
    """½ the mean over words and ¼ the mean over pictures, of which some micro-batches have none."""
    pictures = {0: 2, 1: 0, 2: 5, 3: 0, 4: 0, 5: 0}

    class Mixed(Toy):
        weights: ClassVar = {"words": 0.5, "pictures": 0.25}

        def counts(self, batch):
            number = int(batch["key"][0].split("-")[1])
            return {"words": len(batch["x"]), "pictures": pictures[number]}

        def loss(self, phase, model, batch, draws):
            shown = self.counts(batch)["pictures"]
            y = model.out(batch["x"])[:, 0]
            return Losses({"words": y.sum(), "pictures": shown * model.rare.sum()})

    made = []

    def mixed(recipe, start):
        made.append(build(recipe, start, Mixed))
        return made[-1]

    wanted = recipe(run={"steps": 2}, data={"micro_batches": 3}, optimizer={"lr": 1.0, "clip": 1e9})
    run(wanted, tmp_path, build=mixed)
    task, numbers = Mixed(wanted, CPU), Numbers(0, 1)
    x = torch.cat([numbers.batch(m)["x"] for m in range(3)])
    net = task.phases[0].module
    loss = 0.5 * net.out(x).mean() + 0.25 * net.rare.sum()
    assert Notes.newest.rows[1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert Notes.newest.rows[1]["loss/pictures"] == pytest.approx(0)
    gradient = torch.cat([0.5 * x.mean(0), torch.tensor([0.5, 0.25])])  # of out.weight, out.bias and rare
    assert Notes.newest.rows[1]["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert Notes.newest.rows[2]["grad_norm"] < 3  # no picture in the second step: no division by 0


def test_a_task_may_go_over_its_micro_batches_twice(tmp_path):
    """A loss of all samples of a step: Σ over pairs, here as (Σ y)²; the first pass keeps no graph."""

    class Pairs(Toy):
        def backward(self, step):
            with torch.no_grad():
                total = sum(self.said(step, batch) for batch, _ in step.micro_batches())
            for batch, _ in step.micro_batches():
                losses = Losses({"clips": 2 * total * self.said(step, batch)})
                step.total(batch, losses).backward()

        def said(self, step, batch):
            return step.model(batch["x"], False).sum()

    run(
        recipe(run={"steps": 1}, data={"micro_batches": 3}, optimizer={"clip": 1e9}),
        tmp_path,
        build=lambda recipe, start: build(recipe, start, Pairs),
    )
    task, numbers = Toy(recipe(), CPU), Numbers(0, 1)
    net = task.phases[0].module
    every = []
    for m in range(3):
        seed_torch(0, m)
        every.append(net(numbers.batch(m)["x"], False).sum())
    (torch.stack(every).sum().square() / 6).backward()
    norm = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    assert Notes.newest.rows[1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_matrices_decay_and_parts_have_rates_of_their_own():
    net = nn.ModuleDict(
        {"table": nn.Embedding(3, 4), "a": nn.Linear(4, 4), "ab": nn.Linear(4, 4), "n": nn.LayerNorm(4)}
    )
    net["n"].bias.requires_grad_(False)
    groups = parameter_groups(net, Optimizer(lr=1.0, weight_decay=0.1, rates={"a": 2.0, "a.bias": 3.0}))
    names = {id(p): name for name, p in net.named_parameters()}
    assert {(g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups} == {
        (1.0, 0.0): {"table.weight", "ab.bias", "n.weight"},
        (2.0, 0.1): {"a.weight"},
        (3.0, 0.0): {"a.bias"},
        (1.0, 0.1): {"ab.weight"},
    }
    with pytest.raises(ValueError, match="nothing is called 'b'; the network has a, ab, n, table"):
        parameter_groups(net, Optimizer(rates={"b": 1.0}))
    net["a"].requires_grad_(False)  # a stage that leaves alone a part that the recipe has a rate for
    rates = [g["lr"] for g in parameter_groups(net, Optimizer(lr=1.0, rates={"a": 2.0}))]
    assert set(rates) == {1.0}


def test_a_loss_that_is_not_finite_names_its_clip_alone(tmp_path):
    class Bad(Toy):
        def loss(self, phase, model, batch, draws):
            if draws.micro == 5:
                batch["y"] = batch["y"] + torch.tensor([0, math.inf, 0])
            return super().loss(phase, model, batch, draws)

    with pytest.raises(TrainError, match=r"step 6: the loss is not finite, on the clips clip-5-1;"):
        run(recipe(), tmp_path, build=lambda recipe, start: build(recipe, start, Bad))


def test_a_step_is_shared_by_processes_that_divide_it_and_by_no_others():
    assert [share_of_step(6, loop.World(0, n, CPU)) for n in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(
        TrainError, match=r"6 cannot be shared by 4 processes: start 1 or 2 or 3 or 6, or set it to 8"
    ):
        share_of_step(6, loop.World(0, 4, CPU))


def test_a_decaying_rate_keeps_its_end_unless_another_is_asked_for(tmp_path):
    def wanted(steps, **more):
        return recipe(run={"steps": steps, "save_every": 100}, optimizer={"decay": "linear"} | more)

    run(wanted(6), tmp_path / "whole")
    run(wanted(3), tmp_path / "parts")
    with pytest.raises(CheckpointError, match=r"decays until step 3.* --set optimizer.decay_until=6"):
        run(wanted(6), tmp_path / "parts")
    run(wanted(3, decay_until=6), tmp_path / "asked")
    run(wanted(6, decay_until=6), tmp_path / "asked")
    same(weights(tmp_path / "whole", 6), weights(tmp_path / "asked", 6))
    run(wanted(6, decay_until=9), tmp_path / "parts")  # by name, it may
    assert Notes.newest.rows[6]["lr"] == pytest.approx(1e-2 * (1 - 2 / 6))


def test_phases_take_turns_with_optimizers_of_their_own(tmp_path):
    class Two(Toy):
        def __init__(self, recipe, device):
            super().__init__(recipe, device)
            other = nn.Linear(8, 1)
            self.phases.append(
                loop.Phase("critic", other, torch.optim.SGD(other.parameters(), 0.1), ema=False)
            )

        def loss(self, phase, model, batch, draws):
            if phase == "toy":
                return super().loss(phase, model, batch, draws)
            return Losses({"clips": model(batch["x"]).square().sum()})

        def blocks(self, module):
            yield from getattr(module, "blocks", ())

    def two(recipe, start):
        return build(recipe, start, task=Two)

    run(recipe(), tmp_path / "whole", build=two)
    assert {"toy/loss", "critic/loss", "toy/lr", "critic/grad_norm"} <= Notes.newest.rows[6].keys()
    assert Notes.newest.rows[6]["critic/lr"] == pytest.approx(0.1)
    run(recipe(run={"steps": 2}), tmp_path / "parts", build=two)
    run(recipe(), tmp_path / "parts", build=two)
    same(weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 6))
    run(recipe(), tmp_path / "alone")
    alone = weights(tmp_path / "alone", 6)
    both = weights(tmp_path / "whole", 6)
    assert all(torch.equal(alone[k], both[k]) for k in alone)
    assert not any(k.startswith("ema/critic") for k in both)


def test_samples_are_of_the_average_and_leave_training_as_it_was(tmp_path):
    seen = []

    class Shown(Toy):
        def evaluate(self, model, step):
            seen.append((model.training, model.out.weight.detach().clone()))
            return super().evaluate(model, step)

    def shown(recipe, start):
        return build(recipe, start, task=Shown)

    run(recipe(run={"sample_every": 3}), tmp_path / "a", build=shown)
    assert sorted(Notes.newest.shown) == [3, 6]
    training, weight = seen[-1]
    assert not training
    assert torch.equal(weight, weights(tmp_path / "a", 6)["ema/toy/0.1/out.weight"])
    run(recipe(), tmp_path / "b")
    same(weights(tmp_path / "a", 6), weights(tmp_path / "b", 6))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(tmp_path, number):
    class Interrupted(Toy):
        def loss(self, phase, model, batch, draws):
            if draws.micro == 2:
                os.kill(os.getpid(), number)
            return super().loss(phase, model, batch, draws)

    def interrupted(recipe, start):
        return build(recipe, start, task=Interrupted)

    before = signal.getsignal(number)
    wanted = recipe(run={"steps": 6, "save_every": 100})
    outcome = run(wanted, tmp_path / "parts", build=interrupted)
    assert (outcome.step, outcome.signal) == (3, number)
    assert list(checkpoints(tmp_path / "parts")) == [3]
    assert signal.getsignal(number) == before
    run(wanted, tmp_path / "parts")
    run(wanted, tmp_path / "whole")
    same(weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 6))


def test_a_second_signal_stops_at_once():
    child = os.fork()
    if not child:
        with signals.Signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
    end = time.monotonic() + 10
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(done[1]) == 143
