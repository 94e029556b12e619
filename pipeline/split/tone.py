"""Pictures of high dynamic range (PQ, HLG) as BT.709: one curve, for the models' pictures and for the clips.

    signal → light (ITU-R BT.2100: PQ's EOTF, HLG's inverse OETF and OOTF for a display of 1000 cd/m²)
    → BT.709's primaries (what lies outside is clipped) → the largest of R, G, B through BT.2390's EETF, which
    leaves dark and middle tones as they are and rolls off above; all three by the same factor, so hues stay
    → signal of a BT.1886 display (gamma 2.4) whose white is HDR's reference white, 203 cd/m² (BT.2408)

Light above 1000 cd/m² becomes white. Dolby Vision's and HDR10+'s scene-wise instructions are not used.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

PEAK, WHITE = 1000.0, 203.0  # cd/m²
LUT_SIZE = 33  # a side of the cube given to ffmpeg
# Chromaticities x, y of red, green, blue and white (ITU-T H.273, table 2); other primaries are taken for BT.2020.
XY = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), (0.3127, 0.3290)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290)),
}


def pq_to_light(signal: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084's EOTF: [0, 1] → cd/m²."""
    m1, m2, c1, c2, c3 = _PQ
    p = np.maximum(signal, 0) ** (1 / m2)
    return 10_000 * (np.maximum(p - c1, 0) / (c2 - c3 * p)) ** (1 / m1)


def light_to_pq(light: np.ndarray | float) -> np.ndarray:
    """Its inverse: cd/m² → [0, 1]."""
    m1, m2, c1, c2, c3 = _PQ
    y = (np.maximum(light, 0) / 10_000) ** m1
    return np.asarray(((c1 + c2 * y) / (1 + c3 * y)) ** m2)


_PQ = (2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32)


def hlg_to_light(signal: np.ndarray) -> np.ndarray:
    """BT.2100's HLG on a display of 1000 cd/m²: [0, 1] [..., 3] RGB → cd/m²."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593])
    return PEAK * np.maximum(luminance, 1e-6)[..., None] ** 0.2 * scene


def rolled_off(light: np.ndarray) -> np.ndarray:
    """BT.2390's EETF: light of up to PEAK → light of up to WHITE, cd/m²; below a knee unchanged."""
    top = light_to_pq(PEAK)
    most = light_to_pq(WHITE) / top
    knee = 1.5 * most - 0.5
    e = np.minimum(light_to_pq(light) / top, 1.0)
    t = np.maximum(e - knee, 0) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    )
    return pq_to_light(np.where(e < knee, e, spline) * top)


def to_709(signal: np.ndarray, hdr: str, primaries: int) -> np.ndarray:
    """R'G'B' of an HDR picture, [..., 3] in [0, 1] → R'G'B' of BT.709, [..., 3] in [0, 1].

    Args:
        hdr: 'pq' or 'hlg'.
        primaries: number of ITU-T H.273.
    """
    light = pq_to_light(signal) if hdr == "pq" else hlg_to_light(signal)
    light = np.maximum(light @ _primaries(primaries).T, 0)
    most = light.max(-1, keepdims=True)
    light = light * (rolled_off(most) / np.maximum(most, 1e-6))
    return np.minimum(light / WHITE, 1) ** (1 / 2.4)


def _primaries(number: int) -> np.ndarray:
    """[3, 3]: linear RGB of those primaries → linear RGB of BT.709."""

    def to_xyz(xy: tuple[tuple[float, float], ...]) -> np.ndarray:
        columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in xy]).T
        return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])

    return np.linalg.solve(to_xyz(XY[1]), to_xyz(XY.get(number, XY[9])))


@functools.cache
def cube(hdr: str, primaries: int) -> np.ndarray:
    """float32 [n, n, n, 3]: `to_709` on a grid of n = LUT_SIZE; indices are R, G, B."""
    steps = np.linspace(0, 1, LUT_SIZE)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1)
    return to_709(grid, hdr, primaries).astype(np.float32)


def write_cube(path: Path, hdr: str, primaries: int) -> None:
    """As a .cube file, for ffmpeg's lut3d (red changes fastest)."""
    rows = cube(hdr, primaries).transpose(2, 1, 0, 3).reshape(-1, 3)
    lines = [f"LUT_3D_SIZE {LUT_SIZE}", *(f"{r:.6f} {g:.6f} {b:.6f}" for r, g, b in rows.tolist())]
    path.write_text("\n".join(lines) + "\n")
