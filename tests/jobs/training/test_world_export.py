"""A world model goes to transformers' LLaMA by one command, computes the same there, and comes back."""

# ruff: noqa: F811 (fixtures are imported by their names)

import pytest
import torch

from jobs import export
from jobs.training.loop import train
from jobs.training.world.system import build_world, load_world
from tests.fixtures.toy_training import Notes
from tests.jobs.training.test_world import CPU, recipe, run, vq  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_an_exported_world_model_is_llama_with_the_same_logits_and_can_be_trained_on(
    run, vq, tmp_path, capsys
):
    from transformers import AutoTokenizer, LlamaForCausalLM

    made = recipe(vq, text={"tokenizer": "bpe", "size": 300})
    train(made, run, tmp_path / "model", device="cpu", monitor=Notes)
    assert export.main([str(tmp_path / "model"), "--to", str(tmp_path / "llama")]) == 0
    assert "weights: " in capsys.readouterr().out
    ours = load_world(str(tmp_path / "model"))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    tokens = torch.tensor([tokenizer.encode("one of the captions", add_special_tokens=False)])
    assert tokens[0].tolist() == ours.layout.encode("one of the captions")
    with torch.no_grad():
        assert torch.allclose(ours.model(tokens).text, theirs(tokens).logits, atol=1e-4)
    weights = {"kind": "world", "weights": str(tmp_path / "llama")}
    again = build_world(recipe(vq, text={"tokenizer": str(tmp_path / "llama")}, model=weights), CPU)
    for name, x in ours.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], x), name
