"""Vision–language models over ranks: one has pictures, the other has none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from models.language import qwen_files, qwen_vl
from models.language.llava import Llava, Placeholders, build
from models.language.loss import Goal
from models.language.qwen_vl import QwenVL

TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
LANGUAGE = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "tie_word_embeddings": True,
}


def model() -> Llava:
    torch.manual_seed(0)
    return build(Placeholders(48, 49), tower=TOWER, language=LANGUAGE, projector={"newline": "clip"}).train()


def sequence(rank: int) -> tuple[torch.Tensor, list[torch.Tensor], Goal]:
    """Rank 0: an image and a video; rank 1: words alone."""
    g = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, 48, (24,), generator=g)
    visuals = []
    if rank == 0:
        visuals = [torch.randn(3, 16, 16, generator=g), torch.randn(2, 3, 16, 16, generator=g)]
        tokens[2:7], tokens[9:18] = 48, 49
    at = torch.tensor([19, 20, 21])
    return tokens, visuals, Goal(at, tokens[at + 1], torch.ones(3))


def qwen() -> QwenVL:
    """A Qwen3-VL, whose deeper features are to take part, too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sees = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "depth": 2, "num_heads": 2}
    sees |= {"patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    reads = sizes | {"num_key_value_heads": 1, "head_dim": 16}
    config = {"model_type": "qwen3_vl", "text_config": reads, "vision_config": sees}
    return qwen_vl.build(qwen_files.begun(["words"], 300, config), config=config).train()


def qwen_sequence(rank: int) -> tuple[torch.Tensor, list[torch.Tensor], Goal]:
    """The same, of pictures of several sizes."""
    g = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, 250, (24,), generator=g)
    visuals = []
    if rank == 0:
        visuals = [torch.randn(3, 16, 32, generator=g), torch.randn(3, 3, 32, 32, generator=g)]
        tokens[2:4], tokens[9:17] = qwen().config.image_token_id, qwen().config.video_token_id
    at = torch.tensor([19, 20, 21])
    return tokens, visuals, Goal(at, tokens[at + 1], torch.ones(3))


MADE = {"llava": (model, sequence), "qwen_vl": (qwen, qwen_sequence)}


def _rank(rank: int, folder: str, kind: str) -> None:
    model, sequence = MADE[kind]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        tokens, visuals, goal = sequence(rank)
        replicated = DistributedDataParallel(model())
        sharded = model()
        for block in sharded.blocks():
            fully_shard(block)
        fully_shard(sharded)
        for name, wrapped in (("ddp", replicated), ("fsdp", sharded)):
            wrapped(tokens, visuals, goal=goal).backward()
            grads = {}
            for key, p in wrapped.named_parameters():
                if p.grad is not None:
                    whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                    grads[key.removeprefix("module.")] = whole.clone()
            if rank == 0:
                torch.save(grads, f"{folder}/{name}.pt")
        del wrapped, replicated, sharded  # before the group that their threads use
        dist.barrier()  # none leaves while the other still asks
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", MADE)
def test_ddp_and_fsdp_have_the_gradients_of_one_process_though_one_rank_has_no_pictures(
    kind: str, tmp_path: Path
):
    model, sequence = MADE[kind]
    mp.spawn(_rank, (str(tmp_path), kind), nprocs=2)
    alone = model()
    for rank in range(2):
        tokens, visuals, goal = sequence(rank)
        (alone(tokens, visuals, goal=goal) / 2).backward()
    expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    for name in ("ddp", "fsdp"):
        got = torch.load(tmp_path / f"{name}.pt")
        assert got.keys() == expected.keys()
        for key, grad in expected.items():
            torch.testing.assert_close(got[key], grad, atol=1e-6, rtol=1e-5)
