"""Named networks that turn videos into feature vectors, for distances between sets of videos.

A distance means nothing without the network it was measured in, so each carries a name, a hash of its weights
and a sentence on how it looks at a video; they are printed with every number. A call takes videos uint8
[B, T, H, W, 3] and returns float32 [B, D] on the CPU.

    name in `load_features`     network                                                            D
    efficientnet-lite0          every frame for itself, pooled over time; weights are installed    2560
    clip:MODEL[:WEIGHTS]        image tower of an open_clip model, pooled likewise                 2 × its own
    vivit:FOLDER                a ViViT that 'clipmill train vivit' wrote, or a file, see `vivit`  its own
    FILE.pt                     TorchScript; the I3D of published FVDs is recognised by its arguments

Pooled over time: the mean of the frames' features, and the mean of |difference of neighbours|, so that half
of the numbers are about motion. Neither notices a video played backwards.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders import vivit_file

FRAMES_AT_ONCE = 16
FRECHET = "Fréchet distance"
FVD = "FVD"


class VideoFeatures(Protocol):
    """What a distance needs of a network.

    hash: first 12 digits of a SHA-256 of it. about: how it looks at a video. distance: what a Fréchet
    distance over it may be called; 'FVD' for the I3D network alone.
    """

    name: str
    hash: str
    about: str
    distance: str

    def __call__(self, videos: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] → float32 [B, D] on the CPU."""
        ...


class PooledFrames:
    """A network of single pictures, pooled over time.

    Args:
        frames: uint8 [N, H, W, 3] → features [N, width], from which D = 2 × width.
    """

    distance = FRECHET

    def __init__(self, name: str, hash: str, about: str, frames: Callable[[Tensor], Tensor]):
        self.name, self.hash, self.frames = name, hash, frames
        self.about = f"{about}; mean and mean |change| over time"

    def __call__(self, videos: Tensor) -> Tensor:
        check(videos)
        flat = videos.flatten(0, 1)  # B T H W 3 → (B T) H W 3
        features = torch.cat([self.frames(part).float().cpu() for part in flat.split(FRAMES_AT_ONCE)])
        return pool(features.unflatten(0, videos.shape[:2]))  # B T width → B 2·width


class Network:
    """Any function of float videos [B, 3, T, H, W] in −1…1 that returns features [B, D], e.g. a ViViT.

    Args:
        hash: taken from the weights where the network is an nn.Module and none is given.
        about: how it looks at a video.
    """

    def __init__(
        self,
        name: str,
        network: Callable[[Tensor], Tensor],
        device: str | torch.device = "cpu",
        hash: str = "",
        about: str = "videos as they are",
        distance: str = FRECHET,
    ):
        if isinstance(network, nn.Module):
            network.eval().to(device)
            hash = hash or weights_hash(network)
        if not hash:
            raise ValueError(f"feature network {name}: give the hash of what is no nn.Module")
        self.name, self.hash, self.about, self.distance = name, hash, about, distance
        self.network, self.device = network, device

    @torch.inference_mode()
    def __call__(self, videos: Tensor) -> Tensor:
        check(videos)
        x = videos.to(self.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1  # B T H W 3 → B 3 T H W
        features = self.network(x)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(x):
            raise ValueError(f"feature network {self.name} does not return [B, D] for videos [B, 3, T, H, W]")
        return features.float().cpu()


def efficientnet_lite0(device: str = "cpu") -> PooledFrames:
    """EfficientNet-Lite0 with ImageNet-1k weights: mean of the last feature map of each frame, 1280 numbers."""
    from models.curation.embed import EfficientNetLite0

    network = EfficientNetLite0(device)

    @torch.inference_mode()
    def frames(pictures: Tensor) -> Tensor:
        x = pictures.to(network.device).permute(0, 3, 1, 2).float()  # N 3 H W
        if x.shape[2:] != (224, 224):  # with the low-pass that shrinking needs
            x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        x = (x - 127) / 128  # as it was trained
        x = x.contiguous(memory_format=torch.channels_last)
        return network.net.extract_features(x).mean((2, 3))  # N 1280 7 7 → N 1280

    return PooledFrames(
        "efficientnet-lite0", weights_hash(network.net), "frames resized to 224×224, bicubic", frames
    )


def clip_frames(model: str, weights: str = "", device: str = "cpu") -> PooledFrames:
    """Unit image features of an open_clip model. Raises MissingModel where the weights cannot be had."""
    from models.curation.embed import OpenClip

    clip = OpenClip(model, weights, device)

    def frames(pictures: Tensor) -> Tensor:
        return torch.from_numpy(clip.embed(list(pictures.cpu().numpy())))

    return PooledFrames(
        clip.name, weights_hash(clip.net.visual), "frames as the model's own preprocessing has them", frames
    )


I3D_ARGUMENTS = {"rescale": False, "resize": False, "return_features": True}
I3D_SIDE, I3D_SIZE = 224, 400  # pixels; logits of Kinetics-400


def torchscript(file: str | Path, device: str = "cpu") -> Network:
    """A TorchScript file that maps float videos [B, 3, T, H, W] in −1…1 to features [B, D].

    The I3D file of published FVDs (Unterthiner et al. 2018; as TorchScript by Skorokhodov et al. 2022) is
    recognised by the arguments `rescale`, `resize`, `return_features` of its forward. It gets frames whose
    shorter side is scaled to 224 (bilinear), cropped to the middle square, as those numbers were made; and
    only a distance over it is called FVD.

    Raises ValueError where the file is no TorchScript.
    """
    try:
        script = torch.jit.load(str(file), map_location=device).eval()
        hash = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
    except (RuntimeError, OSError, ValueError) as e:
        raise ValueError(f"{file} is no TorchScript file: write it with torch.jit.save") from e
    if not set(I3D_ARGUMENTS) <= {a.name for a in script.forward.schema.arguments}:
        return Network(Path(file).stem, script, device, hash)

    def i3d(videos: Tensor) -> Tensor:
        features = script(middle_square(videos, I3D_SIDE), **I3D_ARGUMENTS)
        if features.shape[1:] != (I3D_SIZE,):
            raise ValueError(
                f"{file} takes I3D's arguments, but returns {list(features.shape)}, not [B, {I3D_SIZE}]"
            )
        return features

    about = f"shorter side scaled to {I3D_SIDE}, bilinear, middle square"
    return Network(Path(file).stem, i3d, device, hash, about, FVD)


def middle_square(videos: Tensor, side: int) -> Tensor:
    """[B, 3, T, H, W] → [B, 3, T, side, side]."""
    height, width = videos.shape[3:]
    scale = side / min(height, width)
    size = max(side, math.ceil(height * scale)), max(side, math.ceil(width * scale))
    x = F.interpolate(videos.transpose(1, 2).flatten(0, 1), size, mode="bilinear")  # (B T) 3 h w
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    x = x[:, :, top : top + side, left : left + side]
    return x.unflatten(0, (len(videos), -1)).transpose(1, 2)


def vivit(path: str | Path, device: str = "cpu") -> Network:
    """The clip features of a `ViViT`: what its head sees.

    Frames are resized to the size of its options.

    Args:
        path: of a folder of 'clipmill train vivit' (of its averages the longest, where there are any), or a file
            of torch.save({"options": …, "weights": state dict}, file).

    Raises ValueError where it holds something else.
    """
    return vivit_features(vivit_file.read(path), Path(path).stem, device)


def vivit_features(saved: Mapping[str, Any], name: str, device: str = "cpu") -> Network:
    """The clip features of a ViViT that was `vivit_file.read`. Raises ValueError where options and weights differ."""
    network = vivit_file.made(saved, name).eval().to(device)
    side = saved["options"].get("size", 224)

    def features(videos: Tensor) -> Tensor:
        frames = videos.transpose(1, 2).flatten(0, 1)  # (B T) 3 H W
        if frames.shape[2:] != (side, side):
            frames = F.interpolate(frames, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        return network(frames.unflatten(0, (len(videos), -1)).transpose(1, 2)).features

    about = f"frames resized to {side}×{side}, bicubic"
    return Network(f"vivit-{name}", features, device, weights_hash(network), about)


def load_features(name: str, device: str = "cpu") -> VideoFeatures:
    """The network of a name in this file's table.

    Raises ValueError for another name or a bad file, MissingModel where CLIP's weights cannot be had.
    """
    check_name(name)
    if name == "efficientnet-lite0":
        return efficientnet_lite0(device)
    if name.startswith("clip:"):
        return clip_frames(*clip_parts(name.removeprefix("clip:")), device)
    if name.startswith("vivit:"):
        return vivit(name.removeprefix("vivit:"), device)
    return torchscript(name, device)


def check_name(name: str) -> None:
    """Raises ValueError for a name that is none in this file's table, or a file that is not there."""
    kind, _, file = name.partition(":")
    if name == "efficientnet-lite0" or (kind == "clip" and file):
        return
    if kind == "vivit" and (Path(file) / "model.safetensors").is_file():
        return
    if not Path(file if kind == "vivit" else name).is_file():
        raise ValueError(
            f"feature network {name!r} is none of efficientnet-lite0, clip:MODEL:WEIGHTS, vivit:FOLDER (of 'clipmill "
            "train vivit'), vivit:FILE and a TorchScript file (what is named must be there)"
        )


def clip_parts(name: str) -> tuple[str, str]:
    """'ViT-B-32:weights.pt' → its two parts; 'hf-hub:owner/name' and 'local-dir:folder' are one part."""
    if name.startswith(("hf-hub:", "local-dir:")):
        return name, ""
    model, _, weights = name.partition(":")
    return model, weights


def pool(frames: Tensor) -> Tensor:
    """[B, T, D] → [B, 2 D]: mean over time, and mean |difference of neighbours| (0 for a single frame)."""
    change = frames.diff(dim=1).abs().sum(1) / max(1, frames.shape[1] - 1)
    return torch.cat([frames.mean(1), change], dim=1)


def check(videos: Tensor) -> None:
    if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[-1] != 3:
        raise ValueError(f"videos are {videos.dtype} {list(videos.shape)}: give uint8 [B, T, H, W, 3]")


def weights_hash(network: nn.Module, as_type: torch.dtype | None = None) -> str:
    """First 12 digits of the SHA-256 of the names, types, shapes and bytes of all weights and buffers.

    Args:
        as_type: numbers are rounded to it first, so that copies of several types are the same.
    """
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if as_type is not None and value.is_floating_point():
            value = value.to(as_type)
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]
