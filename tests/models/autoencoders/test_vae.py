"""The causal VAE: nothing leaks back in time, chunks equal the whole, an image is a video of one frame."""

import pytest
import torch
from torch import Tensor

from models.autoencoders import vae
from models.measures.quality import psnr

STRIDES = [(2, 4, 4), (4, 4, 4), (4, 4, 2), (1, 4, 4)]


def tiny(stride=(4, 4, 4), channels=4, **options) -> vae.VAE:
    torch.manual_seed(0)
    options = {"width": 8, "multipliers": (1, 2, 2), "depth": 1} | options
    return vae.build(channels, stride=stride, **options)


def clip(frames: int, size: int = 16, seed: int = 0, dtype=torch.float32) -> Tensor:
    return (
        torch.rand(2, 3, frames, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype) * 2 - 1
    )


def image_mode(causal: vae.VAE, **options) -> vae.VAE:
    """The 2D autoencoder that a causal one is on a single frame: the last tap of each kernel."""
    image = tiny((1, *causal.stride[1:]), causal.channels, **options).to(next(causal.parameters()).dtype)
    last = {name: w[:, :, -1:] if w.ndim == 5 else w for name, w in causal.state_dict().items()}
    image.load_state_dict(last)
    return image


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("latents", [1, 2, 4])
def test_latents_and_frames_have_the_shapes_that_the_stride_says(stride, latents):
    model, t = tiny(stride), stride[0]
    video = clip(1 + (latents - 1) * t)
    posterior = model.encode(video)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, latents, 16 // stride[1], 16 // stride[2])
    assert model.decode(posterior.mean).shape == video.shape


@pytest.mark.parametrize(("frames", "height", "width"), [(4, 16, 16), (6, 16, 16), (5, 18, 16), (5, 16, 2)])
def test_sizes_that_do_not_divide_are_refused_with_the_fix(frames, height, width):
    with pytest.raises(
        ValueError, match="give 1 \\+ a multiple of 4 frames, a height that is a multiple of 4"
    ):
        tiny().encode(torch.zeros(1, 3, frames, height, width))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stride": (3, 4, 4)}, "powers of two"),
        ({"multipliers": (1, 2)}, "give as many multipliers"),
        ({"temporal_decoder": True}, "time stride of 1"),
        ({"text_width": 8}, "no text"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        tiny(**options)


@pytest.mark.parametrize("preset", vae.PRESETS)
def test_presets_build_and_repeated_holds_most_of_their_weights(preset):
    with torch.device("meta"):
        model = vae.build(16, **vae.PRESETS[preset])
    held = sum(p.numel() for block in model.repeated() for p in block.parameters())
    assert 0.7 < held / sum(p.numel() for p in model.parameters()) < 1


# ---------------------------------------------------------------- causality


@pytest.mark.parametrize("stride", STRIDES)
def test_a_changed_frame_leaves_all_before_it_bit_for_bit(stride):
    model, t = tiny(stride), stride[0]
    video, other = clip(1 + 4 * t), clip(1 + 4 * t, seed=1)
    with torch.no_grad():
        whole = model.encode(video).mean
        made = model.decode(whole)
        for j in range(video.shape[2]):
            changed = video.clone()
            changed[:, :, j] = other[:, :, j]
            latents = model.encode(changed).mean
            k = -(-j // t)  # the latent that frame j belongs to
            assert torch.equal(latents[:, :, :k], whole[:, :, :k])
            assert not torch.equal(latents[:, :, k], whole[:, :, k])
            first = 0 if k == 0 else 1 + (k - 1) * t
            remade = model.decode(latents)
            assert torch.equal(remade[:, :, :first], made[:, :, :first])
            assert not torch.equal(remade[:, :, first], made[:, :, first])


@pytest.mark.parametrize("stride", STRIDES)
def test_the_gradient_of_a_latent_by_later_frames_is_exactly_zero(stride):
    model, t = tiny(stride), stride[0]
    for k in range(3):
        video = clip(1 + 3 * t).requires_grad_()
        model.encode(video).mean[:, :, k].square().sum().backward()
        assert video.grad[:, :, 1 + k * t :].abs().max() == 0
        assert (video.grad[:, :, k * t].abs().amax((1, 2, 3)) > 0).all()
        latents = torch.randn(2, 4, 4, 4, 4).requires_grad_()
        frame = k * t  # the last of latent k
        model.decode(latents)[:, :, frame].square().sum().backward()
        assert latents.grad[:, :, k + 1 :].abs().max() == 0
        assert (latents.grad[:, :, k].abs().amax((1, 2, 3)) > 0).all()


def test_an_image_autoencoder_codes_each_frame_on_its_own():
    model, video, order = tiny((1, 4, 4)).double(), clip(5, dtype=torch.float64), [3, 0, 4, 1, 2]
    latents = model.encode(video).mean
    torch.testing.assert_close(
        model.encode(video[:, :, order]).mean, latents[:, :, order], atol=1e-13, rtol=0
    )
    frames = model.decode(latents)[:, :, order]
    torch.testing.assert_close(model.decode(latents[:, :, order]), frames, atol=1e-13, rtol=0)


# ---------------------------------------------------------------- one frame, and chunks


@pytest.mark.parametrize("stride", STRIDES[:3])
def test_one_frame_equals_a_pass_of_the_image_autoencoder(stride):
    causal = tiny(stride).double()
    image, frame = image_mode(causal), clip(1, dtype=torch.float64)
    latents = causal.encode(frame)
    torch.testing.assert_close(latents.mean, image.encode(frame).mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(latents.logvar, image.encode(frame).logvar, atol=1e-12, rtol=0)
    torch.testing.assert_close(causal.decode(latents.mean), image.decode(latents.mean), atol=1e-12, rtol=0)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
def test_coding_in_chunks_equals_the_whole(stride, chunk):
    model, video = tiny(stride), clip(1 + 6 * stride[0])
    with torch.no_grad():
        for limit in (5e-6, 1e-13):  # float32, float64: the order of sums alone differs
            whole, parts = model.encode(video), model.encode(video, chunk)
            torch.testing.assert_close(parts.mean, whole.mean, atol=limit, rtol=0)
            torch.testing.assert_close(parts.logvar, whole.logvar, atol=limit, rtol=0)
            made = model.decode(whole.mean)
            torch.testing.assert_close(model.decode(whole.mean, chunk), made, atol=limit, rtol=0)
            model, video = model.double(), video.double()


def test_one_frame_and_then_the_rest_equals_the_whole():
    model, video = tiny().double(), clip(9, dtype=torch.float64)
    first, rest = (p.mean for p in model.encode_chunks([video[:, :, :1], video[:, :, 1:]]))
    whole = model.encode(video).mean
    torch.testing.assert_close(torch.cat([first, rest], 2), whole, atol=1e-13, rtol=0)
    torch.testing.assert_close(first, image_mode(model).encode(video[:, :, :1]).mean, atol=1e-12, rtol=0)


def test_a_later_chunk_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="later chunk of 3 frames: give a multiple of 4"):
        list(tiny().encode_chunks([torch.zeros(1, 3, 5, 16, 16), torch.zeros(1, 3, 3, 16, 16)]))


def carried(model: vae.VAE, length: int, chunks: int) -> int:
    """Bytes kept between chunks of so many latent frames, encoder and decoder, after so many chunks."""
    memory: vae.Memory = {}
    with torch.no_grad():
        for frames in [1 + (length - 1) * 4] + [length * 4] * (chunks - 1):
            latents = model.encoder(clip(frames), memory)[:, :4]
            model.decoder(latents, memory)
    return sum(x.untyped_storage().nbytes() for x in memory.values())


def test_what_is_carried_grows_neither_with_the_video_nor_with_the_chunks():
    model = tiny()
    assert carried(model, 1, 2) == carried(model, 1, 6) == carried(model, 3, 3) > 0


def test_chunks_are_asked_for_one_at_a_time():
    model, asked = tiny(), []

    def endless():
        while True:
            asked.append(clip(4 if asked else 1))
            yield asked[-1]

    made = model.decode_chunks(p.mean for p in model.encode_chunks(endless()))
    with torch.no_grad():
        for n, frames in enumerate([1, 4, 4], start=1):
            assert next(made).shape[2] == frames
            assert len(asked) == n


# ---------------------------------------------------------------- posterior, precision


def test_kl_equals_torchs_closed_form():
    posterior = tiny().double().encode(clip(5, dtype=torch.float64))
    normal = torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), kl.flatten(1).sum(1), rtol=1e-10, atol=1e-10)


def test_bfloat16_gives_no_nan_whatever_the_range():
    video = clip(5)
    for scale in (0.0, 1.0, 1e4):
        model = tiny().bfloat16()
        posterior = model.encode((scale * video).bfloat16())
        latents = posterior.sample(torch.randn_like(posterior.mean))
        assert torch.isfinite(model.decode(latents)).all()
        assert torch.isfinite(posterior.kl()).all()
        with torch.autocast("cpu", torch.bfloat16):
            made, mean, logvar = tiny()(scale * video, torch.randn(2, 4, 2, 4, 4))
        assert all(torch.isfinite(x).all() for x in (made, mean, logvar))


def test_a_posterior_of_any_size_has_a_finite_spread():
    model = tiny()
    model.encoder.layers[-1].conv.bias.data[4:] = torch.tensor([-1e4, -100.0, 100.0, 1e4])
    for kind in (torch.float32, torch.bfloat16):
        posterior = model.to(kind).encode(clip(5).to(kind))
        assert torch.isfinite(posterior.kl()).all()
        assert torch.isfinite(posterior.sample(torch.randn_like(posterior.mean))).all()


def test_bfloat16_stays_close_to_float32():
    model, video = tiny(), clip(5)
    exact = model.encode(video).mean
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.encode(video).mean
    assert (rough - exact).norm() / exact.norm() < 0.03


# ---------------------------------------------------------------- from an image autoencoder


def test_a_temporal_decoder_is_the_image_decoder_bit_for_bit_at_first():
    image, video = tiny((1, 4, 4)), clip(5)
    model = tiny((1, 4, 4), temporal_decoder=True)
    vae.inflate(model, image.state_dict())
    made, mean, _ = model(video)
    expected, latents, _ = image(video)
    assert torch.equal(mean, latents)
    assert torch.equal(made, expected)


def test_fine_tuning_the_decoder_leaves_the_encoder_and_uses_the_past_alone():
    model, video = tiny((1, 4, 4), temporal_decoder=True), clip(5)
    model.freeze_encoder()
    before = model.encode(video).mean
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    (model(video)[0] - video).square().mean().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    new = [p for name, p in model.named_parameters() if ".temporal.conv" in name]
    assert len(new) == 2 * 6  # a weight and a bias in two blocks of each of three resolutions
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in new)
    optimizer.step()
    assert torch.equal(model.encode(video).mean, before)
    latents = before.detach().clone().requires_grad_()
    model.decode(latents)[:, :, 2].sum().backward()
    seen = latents.grad.abs().amax((0, 1, 3, 4)) > 0
    assert seen.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("stride", STRIDES[:3])
def test_an_inflated_image_autoencoder_codes_every_last_frame_as_before(stride):
    image, model = tiny((1, *stride[1:])), tiny(stride)
    vae.inflate(model, image.state_dict())
    video = clip(1 + 2 * stride[0])
    latents = image.encode(video[:, :, :: stride[0]]).mean
    torch.testing.assert_close(model.encode(video).mean, latents, atol=1e-6, rtol=0)
    frames = image.decode(latents)
    held = frames[:, :, [0] + [1] * stride[0] + [2] * stride[0]]  # each latent's frames are its image
    torch.testing.assert_close(model.decode(latents), held, atol=1e-6, rtol=0)


def test_weights_of_something_else_are_refused():
    with pytest.raises(ValueError, match="not the weights of an image VAE"):
        vae.inflate(tiny(), {"encoder.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="not the weights of an image VAE"):
        vae.inflate(tiny(), {})
    with pytest.raises(ValueError, match="has shape"):
        vae.inflate(tiny(), tiny((1, 4, 4), width=4).state_dict())


# ---------------------------------------------------------------- it learns


def moving_shapes() -> Tensor:
    """Four clips [4, 3, 5, 16, 16]: a coloured square or disc that crosses a gradient."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    clips = []
    for i, colour in enumerate([(1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, -1)]):
        frames = []
        for t in range(5):
            dy, dx = y - (4 + 2 * t if i % 2 else 8), x - (4 + 2 * t if i < 2 else 12 - 2 * t)
            inside = (dy.abs().maximum(dx.abs()) < 3) if i % 2 else (dy**2 + dx**2 < 12)
            ground = (x / 15 - 0.5).expand(3, 16, 16)
            frames.append(torch.where(inside, torch.tensor(colour).view(3, 1, 1), ground))
        clips.append(torch.stack(frames, 1))
    return torch.stack(clips)


def test_a_tiny_vae_learns_four_clips_by_heart():
    video, model = moving_shapes(), tiny((2, 4, 4), channels=8)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, 150, pct_start=0.2, cycle_momentum=False)
    for _ in range(150):
        made, *_ = model(video)
        (made - video).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert psnr(model(video)[0], video).mean() > 21  # dB; the four clips' mean has 15
