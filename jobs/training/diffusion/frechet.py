"""Fréchet and kernel distance of sampled to real videos while a model trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jobs.training.distributed import World

if TYPE_CHECKING:
    from models.measures.features import VideoFeatures


class FrechetInLoop:
    """Distances of sampled to real videos, measured whenever a trainer samples.

    The features of the real videos are computed once, by rank 0, and kept in OUT/reference, so that a resumed run
    compares with the same. Where there are twice as many real videos as are asked for, the other half is
    compared with the first, too: what a perfect model would score.

    Args:
        features: a network of `models.measures.features`.
        real: batches of real videos, uint8 [B, T, H, W, 3]; read only where nothing is kept.
        n: real videos to compare with; sample as many, since the distance depends on it.
        protocol: what else decides the numbers (data, frames, fps, size, seed); another one measures anew.

    Every rank makes one. Raises ValueError, on all of them, where there are too few real videos.
    """

    def __init__(
        self,
        out: Path,
        features: VideoFeatures,
        real: Callable[[], Iterable[Tensor]],
        n: int,
        world: World,
        protocol: dict[str, Any] | None = None,
    ):
        from models.measures.frechet import frechet_distance, kernel_distance, moments

        self.features, self.world = features, world
        known = self._known(Path(out), real, n, protocol or {})
        self.real, others = known.split([min(n, len(known)), max(0, len(known) - n)])
        self.moments = moments(self.real)
        self.floor: dict[str, float] = {}
        if len(others) == n:
            self.floor = {
                f"frechet/{features.name}/real": frechet_distance(self.moments, moments(others)),
                f"kernel/{features.name}/real": kernel_distance(self.real, others),
            }

    def __call__(self, videos: Iterable[tuple[int, Tensor]]) -> dict[str, float]:
        """Scalars to log.

        Args:
            videos: this rank's share of the sampled ones, their numbers and uint8 [1, T, H, W, 3]; one that several
                ranks have made counts once.
        """
        from models.measures.frechet import frechet_distance, kernel_distance, moments

        mine = {number: self.features(video) for number, video in videos}
        every = {number: row for share in self.world.gather(mine) for number, row in share.items()}
        made = torch.cat([every[number] for number in sorted(every)])
        name = self.features.name
        return {
            f"frechet/{name}": frechet_distance(self.moments, moments(made)),
            f"kernel/{name}": kernel_distance(self.real, made),
            **self.floor,
        }

    def _known(
        self, out: Path, real: Callable[[], Iterable[Tensor]], n: int, protocol: dict[str, Any]
    ) -> Tensor:
        """`_measured` by rank 0, on all."""
        found: Tensor | Exception | None = None
        if self.world.rank == 0:
            try:
                found = self._measured(out, real, n, protocol)
            except Exception as e:  # the others wait for an answer, whatever it is
                found = e
        found = self.world.gather(found)[0]
        if isinstance(found, Exception):
            raise found
        assert found is not None
        return found

    def _measured(
        self, out: Path, real: Callable[[], Iterable[Tensor]], n: int, protocol: dict[str, Any]
    ) -> Tensor:
        """[n or 2 n, D], from OUT/reference where they were measured before."""
        asked = {"name": self.features.name, "hash": self.features.hash, "n": n} | protocol
        file = out / "reference" / f"{self.features.name}-{self.features.hash}.pt"
        if file.exists():
            kept = torch.load(file, weights_only=True)
            if kept["protocol"] == asked:
                features: Tensor = kept["features"]
                return features
        found: list[Tensor] = []
        for videos in real():
            found.append(self.features(videos))
            if sum(map(len, found)) >= 2 * n:
                break
        count = sum(map(len, found))
        if count < 2:
            raise ValueError(f"run.frechet: {count} real videos are too few for a distance: give 2 or more")
        features = torch.cat(found)
        features = features[: 2 * n] if count >= 2 * n else features[:n]
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.{os.getpid()}.partial")
        torch.save({"protocol": asked, "features": features}, aside)
        aside.replace(file)
        return features
