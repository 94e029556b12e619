"""Low-rank adapters: at first the network is what it was, only they are trained, kept and averaged, and merged they
give the same; for every denoiser."""

import copy
import json

import pytest
import torch
from torch import nn

from jobs.training.diffusion.network import blocks_of
from jobs.training.lora import adapt, merge, targets
from jobs.training.parallelize import compile_blocks
from jobs.training.recipe_core import LoRA, import_spec
from models.diffusion.condition import Condition
from pipeline.recipe import RecipeError
from tests.fixtures.shrunken import STABLE_DIFFUSION

CHANNELS, TEXT = 4, 32
SMALL = {
    "dit": {"kind": "dit", "dim": 32, "depth": 2, "heads": 2},
    "latte": {"kind": "dit", "dim": 32, "depth": 2, "heads": 2, "attention": "alternating"},
    "sora": {"kind": "sora", "dim": 32, "ffn": 64, "depth": 2, "heads": 2},
    "unet3d": {
        "kind": "unet3d", "width": 16, "multipliers": (1, 2), "depth": 1, "head_dim": 8, "cross_attention": True
    },
    "video_ldm": {"kind": "video_ldm", "width": 16, "multipliers": (1, 2), "depth": 1, "head_dim": 8},
    "video_ldm of an image model": {"kind": "video_ldm", "spatial": True},
}  # fmt: skip


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """All trained parameters away from where they begin; of Video LDM's β, from where time has no part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator) + 0.3 * name.endswith("beta"))
    return module


@pytest.fixture(params=SMALL)
def denoiser(request, tmp_path):
    options = dict(SMALL[request.param])
    if options.get("spatial"):
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(1)
        diffusers.UNet2DConditionModel(**STABLE_DIFFUSION).save_pretrained(tmp_path)
        options["spatial"] = str(tmp_path)
    torch.manual_seed(0)
    return stirred(import_spec(options.pop("kind")).build(CHANNELS, TEXT, **options))


def asked():
    generator = torch.Generator().manual_seed(2)
    z, text = (torch.randn(s, generator=generator) for s in ((2, CHANNELS, 3, 8, 8), (2, 5, TEXT)))
    mask = torch.ones(2, 5, dtype=torch.bool)
    return z, torch.tensor([0.2, 0.7]), Condition(text=text, text_mask=mask)


def said(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(*asked())


def adapted(model: nn.Module, **options) -> nn.Module:
    adapt(model, list(blocks_of(model)), LoRA(rank=4, **options), seed=0)
    return model


def test_at_first_it_says_what_it_said_then_adapters_alone_learn_and_merged_they_say_the_same(denoiser):
    names = [name for name, _ in denoiser.named_parameters()]
    before = said(denoiser)
    adapted(denoiser, alpha=8)
    assert torch.equal(said(denoiser), before)

    frozen = {name: p.clone() for name, p in denoiser.named_parameters() if not p.requires_grad}
    trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}
    assert len(frozen) == len(names)
    optimizer = torch.optim.AdamW(trained.values(), 1e-2)
    for _ in range(2):
        denoiser(*asked()).square().mean().backward()
        optimizer.step()
    assert all(p.grad is None for name, p in denoiser.named_parameters() if name in frozen)
    assert all(torch.equal(p, frozen[name]) for name, p in denoiser.named_parameters() if name in frozen)
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []

    after = said(denoiser)
    assert (after - before).abs().max() > 1e-2
    merge(denoiser)
    assert [name for name, _ in denoiser.named_parameters()] == names
    torch.testing.assert_close(said(denoiser), after, atol=1e-5, rtol=1e-5)


def test_by_itself_it_finds_attention_and_feed_forward_and_nothing_else(denoiser):
    linear = {name for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
    blocks = [name for name, m in denoiser.named_modules() if any(m is b for b in blocks_of(denoiser))]
    found = set(targets(denoiser, blocks_of(denoiser), LoRA()))
    others = ("ada", "modulation", "known", "time_emb_proj")  # of what is known of the sample as a whole
    within = {n for n in linear if any(n.startswith(f"{b}.") for b in blocks)}
    assert found == {n for n in within if n.rsplit(".", 1)[-1] not in others}
    assert found


def test_named_layers_are_those_whose_names_end_so_and_a_name_of_none_is_refused_with_the_nearest():
    model = import_spec("dit").build(CHANNELS, TEXT, dim=32, depth=2, heads=2)
    chosen = targets(model, blocks_of(model), LoRA(targets=("attentions.0.qkv", "proj")))
    assert chosen == [f"blocks.{i}.{n}" for i in range(2) for n in
                      ("attentions.0.qkv", "attentions.0.proj", "cross.proj")]  # fmt: skip
    with pytest.raises(ValueError, match=r"no linear layer's name ends in 'qkw' \(did you mean 'qkv'"):
        targets(model, blocks_of(model), LoRA(targets=("qkw",)))
    with pytest.raises(ValueError, match="ends in 'xyz'; there are ada, embed, kv"):
        targets(model, blocks_of(model), LoRA(targets=("xyz",)))
    with pytest.raises(ValueError, match="no attention and no feed-forward"):
        targets(model, [], LoRA())


def test_what_is_added_is_b_times_a_by_alpha_over_rank():
    """Hu et al. 2021, sec. 4.1."""
    model = nn.ModuleDict({"mlp": nn.Linear(6, 5)})
    weight, x = model["mlp"].weight.clone(), torch.randn(3, 6)
    adapt(model, [model], LoRA(rank=2, alpha=3, targets=("mlp",)), seed=0)
    stirred(model)
    values = dict(model.named_parameters())
    a, b = values["mlp.lora_A.default.weight"], values["mlp.lora_B.default.weight"]
    assert (a.shape, b.shape) == ((2, 6), (5, 2))
    expected = x @ (weight + 3 / 2 * b @ a).T + values["mlp.base_layer.bias"]
    torch.testing.assert_close(model["mlp"](x), expected)


def test_adapters_are_the_same_for_the_same_seed_and_disturb_no_other_draw():
    def made(seed):
        torch.manual_seed(5)
        model = nn.ModuleDict({"mlp": nn.Linear(6, 5)})
        adapt(model, [model], LoRA(targets=("mlp",)), seed)
        return model["mlp"].lora_A["default"].weight, torch.rand(())

    (a, after), (b, again), (c, _) = made(0), made(0), made(1)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(after, again)
    torch.manual_seed(5)
    nn.Linear(6, 5)
    assert torch.equal(after, torch.rand(()))


@pytest.mark.parametrize("targets", [[], [""], "all"])
def test_targets_that_are_none_are_refused(targets):
    with pytest.raises(ValueError, match="targets"):
        LoRA.model_validate({"targets": targets})


def test_blocks_with_adapters_are_one_graph_each_with_the_same_gradients():
    kind = import_spec("sora")
    torch.manual_seed(0)
    plain = stirred(adapted(stirred(kind.build(CHANNELS, TEXT, dim=32, ffn=64, depth=2, heads=2))))
    compiled = copy.deepcopy(plain)
    compile_blocks(blocks_of(compiled), uncompiled := [])
    for model in (plain, compiled):
        model(*asked()).square().mean().backward()
    assert uncompiled == []
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, atol=1e-6, rtol=1e-4)


def test_a_recipe_says_so_in_one_line():
    from jobs.training.recipe import load_training

    found = load_training("small", ["lora={rank: 8}", "start=somewhere"])
    assert found.lora == LoRA(rank=8)
    assert load_training("small").lora is None
    plain = json.loads(found.model_dump_json())
    assert plain["lora"]["targets"] == "auto"
    assert type(found).model_validate(plain) == found


@pytest.mark.parametrize("name", ["vae", "vlm", "vivit", "toy-vivit"])
def test_where_all_is_trained_a_recipe_knows_no_adapters(name):
    from jobs.training.recipe import load_training

    with pytest.raises(RecipeError, match="lora"):
        load_training(name, ["lora={rank: 8}"])
