"""Quantisers and the VQ autoencoder."""

import math

import pytest
import torch

from models.autoencoders.vq import FSQ, Codebook, build, health, straight_through, strays

LEVELS = (4, 5, 2, 3)


def drawn(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- gradients


def test_gradients_go_straight_through():
    x, value = drawn(5).requires_grad_(), drawn(5, seed=1)
    y = straight_through(x, value)
    torch.testing.assert_close(y, value)
    (y**3).sum().backward()
    torch.testing.assert_close(x.grad, 3 * value**2)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_the_codebooks_gradients_are_those_of_the_formula(update):
    """dL/dz = dL/de + β·2(z − e)/C; dL/dE = Σ 2(e − z)/C where gradients move it, none else."""
    book, z = Codebook(6, 4, update, beta=0.5), drawn(7, 4).requires_grad_()
    found, weight = book(z), drawn(7, 4, seed=2)
    ((found.vectors * weight).sum() + found.loss.sum()).backward()
    e = book.entries[found.codes]
    torch.testing.assert_close(z.grad, weight + 0.5 * 2 * (z - e) / 4)
    if update == "gradient":
        expected = torch.zeros(6, 4).index_add_(0, found.codes, (2 * (e - z) / 4).detach())
        torch.testing.assert_close(book.entries.grad, expected)
    else:
        assert not list(book.parameters())


def test_each_input_gets_the_nearest_vector():
    book, z = Codebook(50, 3), drawn(2, 9, 3)
    brute = torch.cdist(z, book.entries.expand(2, -1, -1)).argmin(-1)
    assert torch.equal(book(z).codes, brute)
    assert torch.equal(book.nearest(z, chunk=4), brute)


# ---------------------------------------------------------------- codebook


def test_with_a_rate_the_code_is_that_of_the_least_distance_and_surprise():
    book, z = Codebook(40, 3, rate=0.7), drawn(200, 3)
    uses = torch.rand(40, generator=torch.Generator().manual_seed(1)) ** 4 * 50
    book.mass.copy_(uses)
    surprise = -(uses / uses.sum()).log()
    cost = torch.cdist(z, book.entries).square() + 0.7 * surprise  # brute force
    assert torch.equal(book.nearest(z), cost.argmin(1))
    assert not torch.equal(book.nearest(z), torch.cdist(z, book.entries).argmin(1))
    book.mass.zero_()  # nothing was seen: no code is likelier
    assert torch.equal(book.nearest(z), torch.cdist(z, book.entries).argmin(1))


def test_a_plain_ground_with_noise_takes_few_codes_at_a_rate_and_many_without():
    generator = torch.Generator().manual_seed(2)
    things = 4 * torch.randn(24, 4, generator=generator)

    def inputs() -> torch.Tensor:
        of = torch.randint(24, (300,), generator=generator)
        of[:250] = 0  # the ground
        return things[of] + 0.05 * torch.randn(300, 4, generator=generator)

    taken, missed = {}, {}
    for rate in (0.0, 0.1):
        book = Codebook(64, 4, decay=0.9, rate=rate)
        for _ in range(150):
            z = inputs()
            quantised = book(z)
            some = torch.multinomial(strays(quantised) + 1e-12, 64, generator=generator)
            book.update(book.seen(quantised), z[some])
        seen = book(inputs())
        taken[rate] = len(seen.codes[:250].unique())
        missed[rate] = float((seen.inputs - seen.vectors).square().sum(1).max().sqrt())
    assert taken[0.0] > 10
    assert taken[0.1] == 1
    assert missed[0.1] < 1  # no thing is lost for it: they are 4 and more apart


def test_strays_are_drawn_as_new_vectors_in_proportion_to_their_squared_distances():
    book, z = Codebook(3, 2), drawn(5, 2)
    quantised = book(z)
    nearest = torch.cdist(z, book.entries).min(1).values.square()
    torch.testing.assert_close(strays(quantised), nearest)


def trained(book: Codebook, batches, spares: int = 64) -> int:
    began = 0
    for i, z in enumerate(batches):
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(i))
        began += book.update(book.seen(book(z)), z[order[:spares]])
    return began


def mixture(batches: int, size: int = 256, spread: float = 0.05):
    """Inputs around 8 centres, and the centres."""
    centres = drawn(8, 5, seed=9) * 3
    which = torch.randint(8, (batches, size), generator=torch.Generator().manual_seed(1))
    return centres[which] + spread * drawn(batches, size, 5, seed=2), centres


@pytest.mark.parametrize("seed", [0, 1])
def test_the_codebook_of_a_known_mixture_is_found(seed: int):
    """As many codes as centres: where two share a centre they have half an even share each, and begin again."""
    torch.manual_seed(seed)
    inputs, centres = mixture(300)
    book = Codebook(8, 5, decay=0.8, dead=0.7)
    trained(book, inputs)
    apart = torch.cdist(centres, book.entries).min(dim=1).values
    assert apart.max() < 0.03  # of a mean of ~32 inputs a step: .05 √(5/32) < .02
    assert health(book.seen(book(inputs[0])).counts).usage == 1


def test_vectors_are_the_means_of_what_they_stood_for():
    """After one update from nothing, exactly."""
    book, z = Codebook(4, 3, dead=0.0), drawn(100, 3)
    codes = book(z).codes
    book.update(book.seen(book(z)), z[:0])
    for k in codes.unique().tolist():
        torch.testing.assert_close(book.entries[k], z[codes == k].mean(0))


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_codes_revive(update):
    """Vectors where no input is ever near: with restarts all get used, without one stands for all."""
    inputs = drawn(40, 256, 4, seed=3)
    for dead, alive in ((0.03, True), (0.0, False)):
        torch.manual_seed(0)
        book = Codebook(32, 4, update, decay=0.9, dead=dead)
        with torch.no_grad():
            book.entries += 100
            book.entries[0] = 0
        began = trained(book, inputs)
        used = health(book.seen(book(inputs[-1])).counts).usage
        assert (used > 0.9) == alive
        assert (used == 1 / 32) == (not alive)
        assert (began >= 31) == alive


def test_what_ranks_and_micro_batches_saw_adds_up():
    one, two = Codebook(8, 4), Codebook(8, 4)
    two.load_state_dict(one.state_dict())
    z = drawn(60, 4)
    one.update(one.seen(one(z)), z[:8])
    parts = [two.seen(two(part)) for part in z.split([11, 49])]
    two.update(parts[0].plus(parts[1]), z[:8])
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_health_of_even_and_of_lone_codes():
    assert health(torch.full((16,), 3.0)) == pytest.approx((1.0, 16.0))
    assert health(torch.tensor([0.0, 5, 0, 0])) == pytest.approx((0.25, 1.0))
    counts = torch.tensor([1.0, 2, 3, 0])
    entropy = -sum(p * math.log(p) for p in (1 / 6, 2 / 6, 3 / 6))
    assert health(counts) == pytest.approx((0.75, math.exp(entropy)))


# ---------------------------------------------------------------- FSQ


def test_every_fsq_code_comes_back():
    quantiser = FSQ(LEVELS)
    codes = torch.arange(math.prod(LEVELS))
    vectors = quantiser.vectors(codes)
    assert len(vectors.unique(dim=0)) == len(codes)
    assert vectors.abs().max() <= 1
    inputs = inverse_of_bound(vectors)
    found = quantiser(inputs)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.vectors, vectors)


def inverse_of_bound(vectors):
    """An input that is bounded to each vector."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    half, reach = levels.div(2, rounding_mode="floor"), (levels - 1) * 1.001 / 2
    offset = (levels % 2 == 0) / 2
    return ((vectors.double() * half + offset) / reach).atanh() - (offset / reach).atanh()


def test_fsq_takes_any_input_to_one_of_its_levels():
    quantiser = FSQ(LEVELS)
    found = quantiser(torch.cat([drawn(500, 4) * 3, torch.tensor([[1e6] * 4, [-1e6] * 4])]))
    for i, n in enumerate(LEVELS):
        assert len(found.vectors[:, i].unique()) == n
    assert found.codes.min() >= 0
    assert found.codes.max() < quantiser.size
    assert torch.equal(quantiser.vectors(found.codes), found.vectors)


def test_fsqs_gradient_is_that_of_its_bound():
    z = drawn(20, 1).double().requires_grad_()
    FSQ([5])(z).vectors.sum().backward()
    expected = 2.002 / 2 * (1 - z.detach().tanh() ** 2)  # reach / ⌊L/2⌋ · tanh′
    torch.testing.assert_close(z.grad, expected, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- autoencoder


def tiny(stride=(1, 4, 4), **options):
    torch.manual_seed(0)
    sizes = {"stride": stride, "width": 8, "multipliers": (1, 1, 2), "depth": 1, "codes": 16}
    return build(4, **sizes | options)


@pytest.mark.parametrize("stride", [(1, 4, 4), (4, 4, 4)])
@pytest.mark.parametrize("levels", [None, (3, 3, 3, 3)])
@torch.no_grad()
def test_videos_become_codes_and_back_in_one_pass_or_in_chunks(stride, levels):
    model, video = tiny(stride, levels=levels).eval(), drawn(2, 3, 9, 8, 12)
    codes = model.encode(video)
    assert codes.shape == (2, 1 + 8 // stride[0], 2, 3)
    assert codes.max() < model.codes
    shown = model.decode(codes)
    assert shown.shape == video.shape
    for chunk in (1, 2):
        assert torch.equal(model.encode(video, chunk), codes)
        torch.testing.assert_close(model.decode(codes, chunk), shown, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(video)[0], shown, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_picture_has_the_codes_it_has_as_a_frame():
    model, video = tiny().eval(), drawn(1, 3, 3, 8, 8)
    assert torch.equal(model.encode(video)[:, 1:2], model.encode(video[:, :, 1:2]))


@pytest.mark.parametrize("options", [{}, {"levels": (5, 5, 5, 5)}, {"update": "gradient"}])
def test_it_learns_squares_of_eight_colours(options):
    """Which eight codes could tell without a loss: what is left is under a tenth of the variance."""
    model = tiny((1, 2, 2), multipliers=(1, 2), **options)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    which = torch.randint(8, (32, 1, 2, 2), generator=torch.Generator().manual_seed(5))
    colours = torch.cartesian_prod(*[torch.tensor([-0.8, 0.8])] * 3)[which].movedim(-1, 1)
    video = colours.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    for step in range(160):
        shown, quantised = model(video)
        loss = (shown - video).square().mean() + quantised.loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(model.quantiser, Codebook):
            z = quantised.inputs.flatten(0, -2)
            order = torch.randperm(len(z), generator=torch.Generator().manual_seed(step))
            model.quantiser.update(model.quantiser.seen(quantised), z[order])
    with torch.no_grad():
        codes = model.encode(video)
        error = (model.decode(codes) - video).square().mean() / video.var()
    told = health(torch.bincount(codes.flatten(), minlength=model.codes).float())
    assert error < 0.1
    assert told.perplexity > 7


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"levels": (3, 3)}, "2 levels for 4 channels"),
        ({"levels": (3, 3, 3, 1)}, "two or more"),
        ({"multipliers": (1, 2)}, "as many multipliers"),
        ({"text_width": 8}, "takes no text"),
        ({"decay": 2.0}, "decay 2: give a share"),
        ({"dead": 1.0}, "dead 1: give a share"),
        ({"levels": (3, 3, 3, 3), "rate": 0.1}, "rate 0.1 with levels"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        tiny(**options)


def test_sides_that_are_no_multiples_are_refused():
    with pytest.raises(ValueError, match="do not divide into codes"):
        tiny((4, 4, 4)).encode(drawn(1, 3, 4, 8, 8))
