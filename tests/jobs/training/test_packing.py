"""Packing: micro-batches against exhaustive search, the loader's promises, loss and gradients of each shape alone."""

import itertools
import logging
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from jobs.encode import encode
from jobs.training.data.loader import Loader
from jobs.training.data.packing import _fullest, micro_batches, pack, used
from jobs.training.diffusion.build import build_network, load_trained
from jobs.training.diffusion.recipe import DiffusionRecipe
from jobs.training.diffusion.task import build
from jobs.training.distributed import World
from jobs.training.loop import train
from jobs.training.parallelize import checkpoint_activations, compile_blocks
from jobs.training.plan import make_plan
from jobs.training.task import Draws, parts_of
from models.diffusion.condition import Condition
from models.encoders.text import PretrainedText
from pipeline.shards.reader import ShardReader
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.shrunken import checkpoints
from tests.fixtures.toy_training import Notes, start

CPU = torch.device("cpu")
SHAPES = [(1, 32, 32), (4, 32, 32), (8, 32, 64), (8, 64, 32)]
LENGTHS = [t * (h // 8) * (w // 8) for t, h, w in SHAPES]
TOKENS = 600


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """17 clips of 2.5, 5.5 and 9.5 s in three aspects, and their stills."""
    folder = tmp_path_factory.mktemp("packing") / "run"
    return make_sharded_run(folder, sources=8)


def random_case(seed):
    rng = np.random.default_rng(seed)
    lengths = (rng.integers(1, 20, 4) * 16).tolist()
    return rng.integers(0, 30, 4).tolist(), lengths, max(lengths) * int(rng.integers(1, 4)) + 16


# ------------------------------------------------------------ the plan


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_is_in_one_micro_batch_and_none_is_above_the_budget(seed):
    counts, lengths, budget = random_case(seed)
    runs = pack(counts, lengths, budget)
    assert np.sum([np.multiply(r.samples, r.repeats) for r in runs], axis=0).tolist() == counts
    assert max(used(runs, lengths)) <= budget
    assert all(any(r.samples) for r in runs)


@pytest.mark.parametrize("seed", range(20))
def test_what_joins_a_micro_batch_fills_it_as_no_other_does(seed):
    """Against all combinations."""
    counts, lengths, budget = random_case(seed)
    found = _fullest(counts, lengths, range(4), budget)
    every = itertools.product(*(range(min(n, budget // x) + 1) for n, x in zip(counts, lengths, strict=True)))
    best = max((sum_, c) for c in every if (sum_ := int(np.dot(c, lengths))) <= budget)
    assert (int(np.dot(found, lengths)), tuple(found)) == best


def first_fit_decreasing(counts, lengths, budget):
    free = []
    for length in sorted(np.repeat(lengths, counts).tolist(), reverse=True):
        place = next((i for i, room in enumerate(free) if room >= length), None)
        if place is None:
            free.append(budget - length)
        else:
            free[place] -= length
    return len(free)


def test_it_needs_no_more_micro_batches_than_first_fit_decreasing():
    ours, theirs = [], []
    for seed in range(200):
        counts, lengths, budget = random_case(seed)
        ours.append(micro_batches(pack(counts, lengths, budget)))
        theirs.append(first_fit_decreasing(counts, lengths, budget))
    assert all(a <= b for a, b in zip(ours, theirs, strict=True))
    assert sum(ours) < sum(theirs)
    lengths, budget = [4096, 5120, 9072, 9072, 17136], 34272  # latent positions of recipe sora
    counts = [700, 150, 200, 100, 250]
    assert np.dot(counts, lengths) / (micro_batches(pack(counts, lengths, budget)) * budget) > 0.96


def test_millions_are_planned_by_the_composition():
    runs = pack([40_000_000, 20_000_001, 11_000_003], [4096, 9072, 17136], 34272)
    assert len(runs) < 20
    assert sum(r.repeats * r.samples[1] for r in runs) == 20_000_001


# ------------------------------------------------------------ the loader


def loader(run, *, seed=0, **options):
    reader = ShardReader(f"{run}/shards", fps=2.0, shapes=SHAPES, seed=seed, layout="CTHW", decode=False)
    areas = [(h // 8) * (w // 8) for _, h, w in SHAPES]
    return Loader(reader, LENGTHS, **({"tokens": TOKENS, "packed": True, "areas": areas} | options))


def take(loader, n):
    return [tuple(batch["key"]) for batch in itertools.islice(loader, n)]


def test_an_epoch_holds_each_clip_and_each_still_once(run):
    one = loader(run)
    rows = [one.rows(n)[1] for n in range(2 * one.epoch_length)]
    for epoch in (rows[: one.epoch_length], rows[one.epoch_length :]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(len(one.readers[0].keys)))
    assert [r.tolist() for r in rows[: one.epoch_length]] != [r.tolist() for r in rows[one.epoch_length :]]
    sizes = [sum(LENGTHS[b] for b in one.readers[0].bucket[r]) for r in rows]
    assert max(sizes) <= TOKENS
    assert one.weights == (min(sizes), max(sizes))
    mixed = [len(set(one.readers[0].bucket[r].tolist())) for r in rows]
    assert max(mixed) > 1
    share = sum(sizes) / (len(sizes) * TOKENS)
    assert f"{one.epoch_length} micro-batches" in one.table()
    assert f"{share:.1%}" in one.table()


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 2)])
def test_ranks_share_one_list_whatever_their_number_and_workers(run, world, workers):
    alone = take(loader(run), 12)
    ranks = [take(loader(run, rank=r, world=world, workers=workers), 12 // world) for r in range(world)]
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == alone


def test_it_resumes_between_any_two_micro_batches_on_another_number_of_ranks(run):
    whole = take(loader(run), 11)
    before = loader(run)
    assert take(before, 3) == whole[:3]
    state = pickle.loads(pickle.dumps(before.state_dict()))
    ranks = [loader(run, rank=r, world=2) for r in range(2)]
    for one in ranks:
        one.load_state_dict(state)
    assert [b for step in zip(*(take(r, 4) for r in ranks), strict=True) for b in step] == whole[3:]
    with pytest.raises(ValueError, match="packed 600, this loader 601"):
        loader(run, tokens=601).load_state_dict(state)


def test_stills_are_packed_too(run):
    one = loader(run, stills=3)
    stills = [one.rows(n)[1] for n in range(3)]
    areas = [sum((SHAPES[b][1] // 8) * (SHAPES[b][2] // 8) for b in one.readers[0].bucket[r]) for r in stills]
    assert max(areas) <= TOKENS
    assert take(one, 5)[3:] == take(loader(run), 2)


# ------------------------------------------------------------ the task


def recipe(**sections):
    buckets = [dict(zip(("frames", "height", "width"), s, strict=True)) for s in SHAPES]
    data = {"fps": 2, "buckets": buckets, "tokens": TOKENS, "pack": True, "workers": 0}
    return DiffusionRecipe.model_validate(
        {
            "name": "t",
            "data": data | sections.pop("data", {}),
            "autoencoder": {"kind": "dct", "patch": 8, "keep": 2},
            "text": {"kind": "words", "length": 12, "width": 16, "depth": 1, "dropout": 0.3},
            "model": {"kind": "sora", "dim": 32, "ffn": 48, "heads": 2, "depth": 2},
            "tasks": {"first_frame": 0.4, "prediction": 0.3},
            "objective": {"schedule": "flow", "prediction": "flow", "times": "logit_normal"},
        }
        | sections
    )


def stirred(network):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return network.double()


def mixed_batch(loader):
    return max((loader.batch(n) for n in range(loader.epoch_length)), key=lambda b: len(parts_of(b)))


@pytest.mark.parametrize("weighting", ["uniform", "uncertainty"])
def test_packed_loss_and_gradients_are_those_of_each_shape_alone(run, weighting):
    objective = {"schedule": "flow", "prediction": "flow", "times": "logit_normal", "weighting": weighting}
    task, loader = build(recipe(objective=objective), start(run))
    task.system.normalizer.double()
    network, batch, draws = stirred(task.system.network), mixed_batch(loader), Draws(0, 5, CPU)
    assert len(parts_of(batch)) > 2
    encode = task.system.encode
    task.system.encode = lambda video: replace(p := encode(video), mean=p.mean.double())

    packed = task.loss("diffusion", network, batch, draws)
    packed.sums["clips"].backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad()
    alone = [
        task.loss("diffusion", network, part, replace(draws, part=i))
        for i, part in enumerate(parts_of(batch))
    ]
    sum(x.sums["clips"] for x in alone).backward()

    assert packed.each.dtype == torch.float64
    assert torch.allclose(packed.each, torch.cat([x.each for x in alone]), rtol=0, atol=1e-10)
    assert torch.equal(packed.levels, torch.cat([x.levels for x in alone]))
    assert len(packed.each) == len(batch["key"]) == task.counts(batch)["clips"]
    for name, p in network.named_parameters():
        assert (p.grad is None) == (gradients[name] is None), name
        if p.grad is not None:
            assert torch.allclose(p.grad, gradients[name], rtol=0, atol=1e-10), name


def test_packed_from_a_cache_is_packed_from_pixels(run, tmp_path):
    """To what float16 keeps of latents."""
    encode(run, recipe(), str(tmp_path))
    from_pixels, pixels = build(recipe(), start(run))
    from_cache, cached = build(recipe(data={"cache": str(tmp_path)}), start(run))
    from_pixels.system.normalizer = from_cache.system.normalizer
    networks = [stirred(task.system.network).float() for task in (from_pixels, from_cache)]
    assert pixels.epoch_length == cached.epoch_length
    for number in range(3):
        a, b, draws = pixels.batch(number), cached.batch(number), Draws(0, number, CPU)
        assert len(parts_of(a)) == len(parts_of(b))
        assert [(len(x["key"]), "mean" in x) for x in parts_of(b)] == [
            (len(x["key"]), True) for x in parts_of(a)
        ]
        tasks = (from_pixels, networks[0], a), (from_cache, networks[1], b)
        found = [task.loss("diffusion", network, batch, draws) for task, network, batch in tasks]
        assert from_pixels.tokens(a) == from_cache.tokens(b)
        assert a["key"] == b["key"]
        torch.testing.assert_close(found[0].each, found[1].each, rtol=5e-3, atol=5e-3)


def test_every_micro_batch_has_its_tokens_and_operations_counted(run):
    task, loader = build(recipe(), start(run))
    plan = make_plan(recipe(), task, loader.examples(), World(0, 1, CPU))
    patterns = Counter()
    for number in range(loader.epoch_length):
        batch, rows = loader.batch(number), loader.rows(number)[1]
        tokens = task.tokens(batch)
        assert tokens == sum(LENGTHS[b] for b in loader.readers[0].bucket[rows])
        again = make_plan(recipe(), task, [batch], World(0, 1, CPU)) if number < 2 else plan
        assert plan.flops(batch, tokens) == again.flops(batch, tokens) != plan.a_token * tokens * 1.0001
        patterns[tuple(sorted(loader.readers[0].bucket[rows].tolist()))] += 1
    assert len(plan.counted) == len(patterns) == len(list(loader.examples()))


def test_what_cannot_be_packed_is_refused(run):
    with pytest.raises(ValueError, match="batch: packed micro-batches hold what `tokens` do"):
        recipe(data={"batch": 2})
    with pytest.raises(ValueError, match="images: packed micro-batches"):
        recipe(data={"images": 2})
    with pytest.raises(ValueError, match=r"data\.pack: model\.kind dit takes one shape at a time"):
        build(recipe(model={"kind": "dit", "dim": 32, "depth": 1, "heads": 2}), start(run))
    with pytest.raises(ValueError, match=r"more than data\.tokens 200"):
        build(recipe(data={"tokens": 200}), start(run))


@pytest.mark.filterwarnings("ignore")
def test_a_recipe_begins_with_published_weights_which_a_checkpoint_then_does_without(run, tmp_path):
    """Beside their own autoencoder and text encoder the system is the published one, without text too."""
    from diffusers import WanTransformer3DModel

    at = checkpoints(tmp_path)
    torch.manual_seed(0)
    text = PretrainedText(at["t5"], 6)
    tokenizer, width = text.tokenizer, text.width
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A " + tokenizer.eos_token, special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )  # as T5's own
    tokenizer.save_pretrained(at["t5"])
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48, "num_layers": 2}
    theirs = WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=width, **sizes)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.15)
    theirs.eval().save_pretrained(tmp_path / "wan/transformer")
    options = {"kind": "sora", "preset": "Wan-1.3B", "dim": 32, "ffn": 48, "heads": 2, "depth": 2}
    buckets = [{"frames": n, "height": 32, "width": 32} for n in (1, 5)]
    wanted = recipe(
        data={"buckets": buckets, "tokens": 128},
        autoencoder={"kind": "diffusers", "path": at["video"]},
        text={"kind": "transformers", "model": at["t5"], "length": 6},
        model=options | {"weights": str(tmp_path / "wan")},
        run={"steps": 1, "sample_every": 0},
        optimizer={"lr": 1e-12, "warmup": 0},
        ema={"lengths": []},
    )
    train(wanted, run, tmp_path / "out", monitor=Notes, device="cpu")
    (tmp_path / "wan").rename(tmp_path / "gone")
    system = load_trained(str(tmp_path / "out"), 0, "cpu")
    assert torch.equal(system.normalizer.mean, system.autoencoder.normalizer.mean)
    z, time = torch.randn(2, 4, 2, 4, 4), torch.tensor([250.0, 800.0], dtype=torch.float64)
    level = torch.atan2(time, 1000 - time) * 2 / torch.pi
    encoder, tokenizer = system.text.model, system.text.tokenizer
    for texts in (["a red ball", "two"], ["", ""]):
        read = tokenizer(texts, padding="max_length", max_length=6, return_tensors="pt")  # as Wan's pipeline
        there = read.attention_mask
        assert there.any(1).all()
        with torch.no_grad():
            features = encoder(read.input_ids, there).last_hidden_state * there[..., None]
            expected = theirs(z, time.float(), torch.nn.functional.pad(features, (0, 0, 0, 512 - 6))).sample
            found = system.network.predict(z, level, system.condition(texts))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    longer = wanted.run.model_copy(update={"steps": 2})
    train(wanted.model_copy(update={"run": longer}), run, tmp_path / "out", monitor=Notes, device="cpu")


@pytest.fixture
def graphs():
    """How many torch.compile has made since the test began."""
    logging.getLogger("torch.__trace").propagate = False
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.compiler.set_default_backend("eager")
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.set_default_backend(None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_packed_blocks_compile_to_a_few_graphs_whatever_the_composition(graphs):
    """Each is one graph (a break would be an error); compositions that come later need none of their own."""
    network, plain = (stirred(build_network(recipe(), 4, None)).float().denoiser for _ in range(2))
    plain.load_state_dict(network.state_dict())
    checkpoint_activations(network.blocks, "full")
    compile_blocks(network.blocks, uncompiled := [])
    made, generator = [], torch.Generator().manual_seed(0)
    for samples in ((1, 1, 0), (2, 0, 3), (0, 2, 1), (4, 5, 6), (1, 1, 1), (3, 1, 0), (1, 7, 2)):
        shapes = [(n, 4, *s) for n, s in zip(samples, ((1, 4, 4), (2, 4, 6), (3, 6, 4)), strict=True) if n]
        z = [torch.randn(shape, generator=generator) for shape in shapes]
        level = [torch.rand(len(x), generator=generator) for x in z]
        told = [
            Condition(
                torch.randn(len(x), 5, 16, generator=generator), torch.rand(len(x), 5) < 0.7, x, x[:, :1]
            )
            for x in z
        ]
        for a, b in zip(network.packed(z, level, told), plain.packed(z, level, told), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            a.square().sum().backward(retain_graph=True)
        made.append(graphs())
    assert 0 < made[2] <= 6
    assert made[-1] == made[2]
    assert uncompiled == []
