"""What is done to modules from outside: whole graphs, few of them, the same numbers; all parameters in every step."""

import logging
import os

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jobs.training.diffusion.build import build_network
from jobs.training.diffusion.network import Network, Question, blocks_of
from jobs.training.diffusion.recipe import DiffusionRecipe
from jobs.training.distributed import World
from jobs.training.parallelize import GRAPHS, checkpoint_activations, compile_blocks, parallelize
from jobs.training.recipe_core import Compute, import_spec
from jobs.training.task import Losses, Phase
from models.diffusion.condition import Condition
from tests.fixtures.toy_training import Toy, build, in_ranks, recipe, run, weights

CHANNELS, TEXT = 4, 8
SIZES = {
    "dit": {"dim": 16, "depth": 2, "heads": 2, "qk_norm": True, "attention": "factorised"},
    "unet3d": {
        "width": 8, "multipliers": [1], "depth": 1, "head_dim": 4, "cross_attention": True, "places": True,
    },
    "video_ldm": {"width": 8, "multipliers": [1], "depth": 1, "head_dim": 4},
    "sora": {"dim": 16, "ffn": 16, "heads": 2, "depth": 2},
}  # fmt: skip
SHAPES = [(2, 4, 8), (3, 2, 4), (2, 3, 16)]  # B, T, h = w


def stirred(module: nn.Module) -> nn.Module:
    """With no parameter at 0, where a block would be the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return module


def denoiser(kind, **more):
    torch.manual_seed(0)
    return stirred(import_spec(kind).build(CHANNELS, TEXT, **SIZES[kind] | more))


def question(b, t, s, images=0):
    generator = torch.Generator().manual_seed(b * 100 + t)
    z, text = (torch.randn(*shape, generator=generator) for shape in ((b, CHANNELS, t, s, s), (b, 5, TEXT)))
    level = torch.rand(b, generator=generator)
    return z, level, Condition(text=text, text_mask=torch.ones(b, 5, dtype=torch.bool), images=images)


def loss_and_gradients(model, shape, images=0):
    model.zero_grad(set_to_none=True)
    loss = model(*question(*shape, images)).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def close(a, b, **near):
    torch.testing.assert_close(a[0], b[0], **near)
    for name, gradient in a[1].items():
        torch.testing.assert_close(
            gradient, b[1][name], **near, msg=lambda said, name=name: f"{name}: {said}"
        )


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# ---------------------------------------------------------------- compilation


@pytest.fixture
def graphs():
    """Graphs made by torch.compile since the test began; a graph break would have raised."""
    logging.getLogger("torch.__trace").propagate = False  # thousands of lines that pytest would keep
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compiler.set_default_backend("eager")
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.set_default_backend(None)
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", SIZES)
def test_blocks_are_whole_graphs_a_few_a_kind_with_the_numbers_of_eager(kind, mode, graphs):
    """Of three shapes the second makes sizes vary, and the third needs nothing new."""
    model, plain = denoiser(kind), denoiser(kind)
    blocks = list(blocks_of(model))
    checkpoint_activations(blocks, mode)
    compile_blocks(blocks, uncompiled := [])
    made = []
    for shape in SHAPES:
        close(loss_and_gradients(model, shape), loss_and_gradients(plain, shape), rtol=1e-4, atol=1e-6)
        made.append(graphs())
    kinds = {(type(b), str([p.shape for p in b.parameters()])) for b in blocks}
    assert 0 < made[0] <= 2 * len(kinds)
    assert made[1] <= 2 * made[0] + len(kinds)
    assert made[2] == made[1]
    assert uncompiled == []


class Broken(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


class Stormy(nn.Module):
    def forward(self, x, name):
        return x if name == "none" else x + 1


def test_a_block_that_cannot_be_one_graph_is_told_and_not_slow_in_silence(graphs):
    compile_blocks([block := Broken()], uncompiled := [])
    for _ in range(2):
        assert torch.equal(block(torch.ones(3)), torch.ones(3))
    (said,) = uncompiled
    assert said.startswith(
        "a block of kind Broken cannot be compiled as one graph (Call to `torch._dynamo.graph_break()`)"
    )
    assert said.endswith("mend that line of the model, or set compute.compile to false")
    torch._dynamo.utils.counters["graph_break"].clear()


def test_more_graphs_than_a_kind_may_have_are_told_once(graphs):
    compile_blocks([block := Stormy()], uncompiled := [])
    for i in range(100):
        assert torch.equal(block(torch.ones(3), str(i)), 2 * torch.ones(3))
    assert graphs() == GRAPHS
    assert [said.partition(",")[0] for said in uncompiled] == [
        f"a block of kind Stormy needs more than {GRAPHS} graphs"
    ]


def test_compiled_by_inductor_a_block_has_the_gradients_of_eager(graphs):
    torch.compiler.set_default_backend(None)
    model, plain = (denoiser("dit", depth=1, attention="full") for _ in range(2))
    alone = World(0, 1, torch.device("cpu"))
    compute = Compute(compile=True, activation_checkpointing="selective")
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    parallelize(model, blocks_of(model), optimizer, compute, alone, [])
    close(loss_and_gradients(model, SHAPES[0]), loss_and_gradients(plain, SHAPES[0]), rtol=1e-4, atol=1e-6)
    assert graphs() == 1


# ---------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("kind", ["dit", "unet3d"])
def test_products_and_convolutions_are_computed_again_by_full_checkpointing_alone(kind):
    kept = {}
    for mode in ("none", "selective", "full"):
        model = denoiser(kind)
        checkpoint_activations(blocks_of(model), mode)
        with FlopCounterMode(display=False) as counter:
            loss = model(*question(2, 4, 8)).square().mean()
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        kept[mode] = counter.get_total_flops() - forward
    assert kept["selective"] == kept["none"] < kept["full"]


# ---------------------------------------------------------------- every parameter, every step


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("images", [0, 1, 3], ids=["clips", "images-beside", "images-alone"])
@pytest.mark.parametrize("texts", [["a red ball", "two"], ["", ""]], ids=["captions", "no-captions"])
def test_every_trained_parameter_takes_part_in_every_step(kind, images, texts):
    options = {"context": True} if kind != "dit" else {}
    made = DiffusionRecipe.model_validate(
        {
            "name": "t",
            "text": {"kind": "words", "length": 5, "width": TEXT, "depth": 1},
            "model": {"kind": kind, **SIZES[kind], **options},
            "objective": {"weighting": "uncertainty"},
        }
    )
    network = build_network(made, CHANNELS, None)
    x = torch.randn(2, CHANNELS, 3, 8, 8)
    dropped = torch.ones(2, dtype=torch.bool)
    asked = Question(x, torch.rand(2), torch.randn_like(x), Condition(images=images), texts, dropped)
    network(Network.losses, [asked])[0].loss.sum().backward()
    assert [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])
@pytest.mark.parametrize("text", ["pooled", "tokens", "both"])
def test_every_parameter_of_each_kind_of_dit_takes_part(conditioning, text):
    model = denoiser("dit", attention="full", conditioning=conditioning, text=text, classes=3, upsample=True)
    z, level, condition = question(2, 1, 4)
    for told in (condition, Condition()):
        told = Condition(text=told.text, text_mask=told.text_mask, low=torch.randn_like(z))
        model.zero_grad(set_to_none=True)
        model(z, level, told).sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ---------------------------------------------------------------- on several processes


class Denoising(Toy):
    """A DiT, without dropout, on the numbers' samples: x [n, 8] is a text of one token."""

    def __init__(self, recipe, device):
        super().__init__(recipe, device)
        model = denoiser("dit")
        self.phases = [
            Phase("toy", model, torch.optim.AdamW(model.parameters(), recipe.optimizer.lr, eps=0.1))
        ]

    def loss(self, phase, model, batch, draws):
        text = batch["x"][:, None]
        n = len(text)
        z, mask = draws.normal(text.new_empty(n, CHANNELS, 2, 4, 4)), torch.ones(n, 1, dtype=torch.bool)
        made = model(z, draws.uniform(n), Condition(text=text, text_mask=mask)).float()
        each = (made - batch["y"].view(-1, 1, 1, 1, 1)).square().flatten(1).mean(1)
        return Losses({"clips": each.sum()}, each=each.detach())


def denoising(recipe, start):
    return build(recipe, start, task=Denoising)


def train_denoising(out, compute):
    torch.compiler.set_default_backend("aot_eager")
    torch._dynamo.utils.counters.clear()
    wanted = recipe(run={"steps": 3, "save_every": 3}, data={"micro_batches": 2}, compute=compute)
    run(wanted, out, build=denoising)
    counted = torch._dynamo.utils.counters
    assert bool(counted["stats"]["unique_graphs"]) == compute.get("compile", False)
    assert not counted["graph_break"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    train_denoising(out, {})
    return weights(out, 3)


@pytest.mark.parametrize(
    "compute",
    [
        {"parallel": "fsdp", "compile": True, "activation_checkpointing": "selective"},
        {"parallel": "ddp", "compile": True, "activation_checkpointing": "full"},
    ],
    ids=["fsdp", "ddp"],
)
def test_compiled_checkpointed_and_parallel_it_trains_as_one_plain_process(tmp_path, alone, compute):
    assert in_ranks(2, train_denoising, tmp_path, compute) == [0, 0]
    for name, x in weights(tmp_path, 3).items():
        torch.testing.assert_close(
            x, alone[name], rtol=1e-4, atol=1e-5, msg=lambda said, n=name: f"{n}: {said}"
        )


class Stopping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.stops = os.environ.get("RANK") == "1"

    def forward(self, x):
        if self.stops:
            torch._dynamo.graph_break()
        return torch.tanh(self.layer(x))


class Stopped(Toy):
    """On one rank of two it has a block that is no whole graph."""

    def __init__(self, recipe, device):
        super().__init__(recipe, device)
        net = self.phases[0].module
        net.blocks[1] = Stopping()
        trained = [p for p in net.parameters() if p.requires_grad]
        self.phases = [Phase("toy", net, torch.optim.AdamW(trained, recipe.optimizer.lr))]


def stopped(recipe, start):
    return build(recipe, start, task=Stopped)


def train_stopped(out, parallel):
    torch.compiler.set_default_backend("eager")
    compute = {"parallel": parallel, "compile": True}
    try:
        run(recipe(data={"micro_batches": 2}, compute=compute), out, build=stopped)
    except ValueError as e:
        (out / f"said-{os.environ['RANK']}").write_text(str(e))


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_a_block_that_one_rank_cannot_compile_ends_training_on_all_with_one_sentence(tmp_path, parallel):
    assert in_ranks(2, train_stopped, tmp_path, parallel) == [0, 0]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith("a block of kind Stopping cannot be compiled as one graph (")
    assert said[0].endswith("or set compute.compile to false")


class Watched(Denoising):
    """Says in which types a block computes and what its optimizer is given."""

    def loss(self, phase, model, batch, draws):
        inner = getattr(model, "module", model)
        if 2 <= draws.micro < 6 and not getattr(
            self, "hooked", False
        ):  # from the second step on, not the plan
            self.hooked, self.types = True, set()
            layer = inner.blocks[0].mlp[0]
            layer.register_forward_hook(lambda m, args, out: self.types.add(("weight", str(m.weight.dtype))))
            inner.level.register_forward_pre_hook(
                lambda m, args: self.types.add(("level", str(args[0].dtype)))
            )
            self.phases[0].optimizer.register_step_pre_hook(
                lambda o, *_: self.types.update(
                    ("gradient", str(p.grad.dtype)) for g in o.param_groups for p in g["params"]
                )
            )
        return super().loss(phase, model, batch, draws)


def train_watched(out, parallel):
    made = []

    def watched(recipe, start):
        made.append(build(recipe, start, task=Watched))
        return made[-1]

    compute = {"parallel": parallel, "precision": "bf16"}
    run(
        recipe(run={"steps": 3, "save_every": 3}, data={"micro_batches": 2}, compute=compute),
        out,
        build=watched,
    )
    (out / f"types-{os.environ['RANK']}").write_text(str(sorted(made[0][0].types)))


def test_in_bf16_shards_are_gathered_in_bf16_and_summed_and_updated_in_float32(tmp_path):
    for parallel, weight in (("ddp", "torch.float32"), ("fsdp", "torch.bfloat16")):
        out = tmp_path / parallel
        out.mkdir()
        assert in_ranks(2, train_watched, out, parallel) == [0, 0]
        said = f"[('gradient', 'torch.float32'), ('level', 'torch.float32'), ('weight', '{weight}')]"
        assert [(out / f"types-{rank}").read_text() for rank in range(2)] == [said] * 2
    a, b = (weights(tmp_path / parallel, 3) for parallel in ("ddp", "fsdp"))
    for name, x in a.items():
        assert b[name].dtype == torch.float32
        torch.testing.assert_close(b[name], x, rtol=0.02, atol=2e-3, msg=lambda said, n=name: f"{n}: {said}")
