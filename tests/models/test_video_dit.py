"""The small DiT: adaLN-Zero starts at zero, conditions reach the output, the loss is the flow's."""

import torch

from models import text
from models.video_dit import VideoDiT, flow_loss

GRID = (3, 4, 6)


def model() -> VideoDiT:
    torch.manual_seed(0)
    return VideoDiT(6, GRID, width=48, depth=2, heads=4)


def awake() -> VideoDiT:
    """The same with its zero-initialised gates opened."""
    m = model()
    for p in m.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.2)
    return m


def test_a_fresh_model_predicts_zero_velocity():
    z = torch.randn(2, 3, 6, 4, 6)
    assert model()(z, torch.rand(2), text.encode(["a", "b"], 8)).abs().max() == 0


def test_its_first_loss_is_the_variance_of_the_target():
    z = torch.randn(64, 3, 6, 4, 6)
    loss = flow_loss(model(), z, text.encode(["a"] * 64, 8), torch.Generator().manual_seed(0))
    assert abs(loss.item() - 2) < 0.05  # Var(ε − z) = 1 + 1


def test_the_flow_loss_is_zero_for_the_true_velocity():
    """With z = 0 the velocity is ε = z_t / t, which a function can know."""
    z = torch.zeros(4, 3, 6, 4, 6)
    loss = flow_loss(
        lambda zt, t, _: zt / t.view(-1, 1, 1, 1, 1), z, text.encode(["a"] * 4, 8), torch.Generator()
    )
    assert loss < 1e-9


def test_caption_noise_level_every_frame_and_every_place_reach_the_output():
    m, z, t, words = awake(), torch.randn(1, 3, 6, 4, 6), torch.tensor([0.3]), text.encode(["red"], 8)
    base = m(z, t, words)
    assert (m(z, t, text.encode(["blue"], 8)) - base).abs().max() > 1e-4
    assert (m(z, t + 0.4, words) - base).abs().max() > 1e-4
    for frame in range(3):
        other = z.clone()
        other[:, frame, :, 0, 0] += 1
        assert ((m(other, t, words) - base).abs().amax((0, 2)) > 1e-6).all()


def test_padding_does_not_matter():
    m, z, t = awake(), torch.randn(1, 3, 6, 4, 6), torch.tensor([0.3])
    torch.testing.assert_close(m(z, t, text.encode(["red"], 8)), m(z, t, text.encode(["red"], 32)))


def test_it_learns_a_single_clip():
    m, z, words = model(), torch.randn(1, 3, 6, 4, 6), text.encode(["red"], 8)
    optimizer, generator, losses = (
        torch.optim.AdamW(m.parameters(), 3e-3),
        torch.Generator().manual_seed(0),
        [],
    )
    for _ in range(120):
        loss = flow_loss(m, z.expand(8, -1, -1, -1, -1), words.expand(8, -1), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
