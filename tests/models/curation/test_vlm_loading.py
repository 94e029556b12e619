"""Models that cannot be had or used as asked: one sentence with the fix, before any work."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

from models import hub
from models.curation.vlm import loading
from models.curation.vlm.loading import Wanted, check
from models.curation.vlm.model import VLM
from models.hub import MissingModel


def test_a_model_without_video_is_refused_with_the_fix(folder):
    for load in (check, lambda wanted, input: VLM(wanted, input=input)):
        with pytest.raises(MissingModel, match=r"takes no video.*: set input: image for"):
            load(Wanted(str(folder("blip2"))), "video")
        with pytest.raises(MissingModel, match=r"takes no video.*: set input: images"):
            load(Wanted(str(folder("gemma3"))), "video")


def test_check_finds_a_folder_without_reading_weights(folder, tmp_path):
    copy = shutil.copytree(folder("qwen2_5_vl"), tmp_path / "m")
    (copy / "model.safetensors").write_bytes(b"never read")
    assert check(Wanted(str(copy))) == "a folder"
    (copy / "model.safetensors").unlink()
    with pytest.raises(MissingModel, match=r"has no model\.safetensors"):
        check(Wanted(str(copy)))


def test_check_names_the_missing_part_of_a_checkpoint_in_parts(folder, tmp_path):
    copy = shutil.copytree(folder("qwen2_5_vl"), tmp_path / "m")
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingModel, match=r"has no model-2\.safetensors"):
        check(Wanted(str(copy)))
    (copy / "model-2.safetensors").touch()
    assert check(Wanted(str(copy))) == "a folder"


def test_check_refuses_a_model_that_writes_no_text(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(MissingModel, match="no image-text-to-text class for its type 'vit'"):
        check(Wanted(str(tmp_path)))


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such", "plainname", "a/b/c"])
def test_check_refuses_what_is_neither_folder_nor_hub_id(name):
    with pytest.raises(MissingModel, match="no such folder, nor a hub id"):
        check(Wanted(name))


def test_check_finds_a_model_in_the_cache_and_asks_no_hub(folder, tmp_path, monkeypatch):
    def no_hub(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(hub, "model_info", no_hub)
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda repo, file, revision: str(folder("qwen2_5_vl") / file)
    )
    assert hub.transformers_weights("some/model") == "in the local cache"


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("off"), ConnectionError("no route"), TimeoutError()])
def test_a_hub_out_of_reach_is_an_error_that_names_the_fix(monkeypatch, error):
    def unreachable(*args, timeout, **kwargs):
        assert timeout <= 10  # seconds: fails fast
        raise error

    monkeypatch.setattr(hub, "model_info", unreachable)
    with pytest.raises(MissingModel, match=r"cannot be reached.*hf download nobody/nothing"):
        check(Wanted("nobody/nothing"))


def test_a_gated_model_says_how_to_get_it(monkeypatch):
    def gated(*args, **kwargs):
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(hub, "model_info", gated)
    with pytest.raises(MissingModel, match=r"accept its licence.*hf auth login"):
        check(Wanted("nobody/gated"))


def test_a_missing_package_is_one_sentence_with_the_cure_before_any_work(folder, monkeypatch):
    smol = str(folder("smolvlm"))
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(MissingModel, match=r"its processor needs num2words.*: pip install num2words"):
        check(Wanted(smol))
    with pytest.raises(MissingModel, match=r"device_map needs accelerate.*: pip install accelerate"):
        check(Wanted(str(folder("qwen2_5_vl")), device_map="auto"))


def test_a_package_that_only_the_processor_knows_of_is_named_too(folder, monkeypatch):
    """Whatever family: the processor's own ImportError, which says how to get it."""
    from transformers.models.smolvlm import processing_smolvlm

    smol = str(folder("smolvlm"))
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(MissingModel, match=r"its processor cannot be loaded.*pip install num2words"):
        check(Wanted(smol))


def test_florence_is_told_apart_from_models_that_read_words(folder):
    florence = Wanted(str(folder("florence2")))
    assert check(florence, None, "<CAPTION>") == "a folder"
    assert check(florence) == "a folder"
    with pytest.raises(
        MissingModel, match=r"knows no words as a prompt.*set prompt: <MORE_DETAILED_CAPTION>"
    ):
        check(florence, None, "Describe the video.")


@pytest.mark.parametrize("name", ["blip2", "florence2"])
def test_a_model_of_one_picture_refuses_several(folder, name):
    with pytest.raises(MissingModel, match=r"takes one picture at a time.*input: image"):
        check(Wanted(str(folder(name))), "images")
