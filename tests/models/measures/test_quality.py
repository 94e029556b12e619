"""PSNR and SSIM against OpenCV and against the definition by SciPy's filters, in float64."""

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from models.measures.quality import psnr, ssim


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth videos [2, 3, 4, 24, 32] in −1…1, the second with noise that grows with the frame."""
    rng = np.random.default_rng(0)
    clean = gaussian_filter(rng.standard_normal((2, 3, 4, 24, 32)), (0, 0, 1, 3, 3))
    clean = clean / np.abs(clean).max()
    noise = rng.standard_normal(clean.shape) * np.array([0.01, 0.05, 0.2, 0.5])[:, None, None]
    return torch.from_numpy(clean).float(), torch.from_numpy(np.clip(clean + noise, -1, 1)).float()


def wang(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of one channel in −1…1, written out from Wang et al. 2004, eq. 13 and 14."""
    blur = lambda z: gaussian_filter(z.astype(np.float64), 1.5, truncate=3.5)  # noqa: E731  11 × 11
    mx, my = blur(x), blur(y)
    sxx, syy, sxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    luminance_contrast = (2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sxx + syy + c2))
    return luminance_contrast[5:-5, 5:-5].mean()


def test_psnr_equals_opencvs():
    x, y = pair()
    found = psnr(x, y)
    for b in range(2):
        for t in range(4):
            a, c = ((v[b, :, t].permute(1, 2, 0).numpy() + 1) * 127.5 for v in (x, y))
            np.testing.assert_allclose(found[b, t], cv2.PSNR(a, c, 255.0), rtol=1e-5)


def test_ssim_equals_the_definition_by_scipys_gaussian():
    x, y = pair()
    found = ssim(x, y)
    for b in range(2):
        for t in range(4):
            a, c = x[b, :, t].double().numpy(), y[b, :, t].double().numpy()
            np.testing.assert_allclose(found[b, t], np.mean([wang(a[i], c[i]) for i in range(3)]), atol=2e-5)


def test_equal_videos_are_infinitely_close_and_wholly_similar():
    x, _ = pair()
    assert torch.isinf(psnr(x, x)).all()
    torch.testing.assert_close(ssim(x, x), torch.ones(2, 4))


def test_more_noise_is_worse_frame_by_frame():
    x, y = pair()
    assert (psnr(x, y).diff(dim=1) < 0).all()
    assert (ssim(x, y).diff(dim=1) < 0).all()


def test_bfloat16_videos_are_measured_in_float32():
    x, y = (v.bfloat16() for v in pair())
    torch.testing.assert_close(ssim(x, y), ssim(x.float(), y.float()))
    assert psnr(x, y).dtype == torch.float32


def test_frames_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="32×10: SSIM needs 11×11"):
        ssim(torch.zeros(1, 3, 1, 10, 32), torch.zeros(1, 3, 1, 10, 32))


def test_under_autocast_similarity_is_as_exact_as_without():
    a, b = (
        torch.rand(1, 3, 2, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1)
    )
    near = a + 0.1 * b
    with torch.autocast("cpu", torch.bfloat16):
        found = ssim(near, a), psnr(near, a)
    assert torch.equal(found[0], ssim(near, a))
    assert torch.equal(found[1], psnr(near, a))
