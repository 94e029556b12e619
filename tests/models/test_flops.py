"""Counted FLOPs and saved bytes against sums done by hand."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import flops
from models.flops import PEAKS, cost, peak

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["on shapes", "computed"], autouse=True)
def both_ways(request, monkeypatch):
    """Every number is the same, however it is found."""
    monkeypatch.setitem(globals(), "cost", partial(flops.cost, small=request.param))


def test_a_linear_layer_costs_three_products_or_two_at_the_input():
    b, n, m = 8, 32, 64
    net = nn.Sequential(nn.Linear(n, m), nn.Linear(m, n))
    found = cost(lambda: net(torch.randn(b, n)).sum(), [net], [], CPU)
    product = 2 * b * n * m  # a multiply–add is two
    assert found.flops == product * (2 + 3)  # nobody asks for the gradient of the data


def test_attention_is_counted_on_a_cpu():
    b, h, n, d = 2, 4, 16, 8

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Parameter(torch.randn(3, b, h, n, d))

        def forward(self):
            return F.scaled_dot_product_attention(*self.qkv)

    net = Attention()
    found = cost(lambda: net().sum(), [net], [], CPU)
    assert found.flops == 3 * 2 * (2 * b * h * n * n * d)  # two products forward, four backward


def test_saved_bytes_are_those_of_the_activations_and_not_of_the_weights():
    b, n = 8, 32
    net = nn.Sequential(*[nn.Sequential(nn.Linear(n, n), nn.Sigmoid()) for _ in range(4)])
    x = torch.randn(b, n)
    found = cost(lambda: net(x).sum(), [net], list(net), CPU)
    row = b * n * 4
    assert found.saved == 5 * row  # the data, and each block's output, which is the next one's input
    assert found.full == 4 * row + 2 * row  # four inputs, and the first block, the largest, live again


def test_counting_leaves_no_trace():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    cost(lambda: net(torch.randn(8, 4)).sum(), [net], list(net), CPU)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_module_on_the_meta_device_is_counted_like_one_that_is_there():
    b, n = 8, 32
    net = nn.Sequential(*[nn.Sequential(nn.Linear(n, n), nn.Sigmoid()) for _ in range(4)])
    x = torch.randn(b, n)
    there = cost(lambda: net(x).sum(), [net], list(net), CPU)
    net.to("meta")
    assert cost(lambda: net(x).sum(), [net], list(net), CPU) == there
    assert all(p.is_meta for p in net.parameters())


def test_what_is_not_trained_is_counted_beside():
    """An encoder before, and a perceptual network behind, through which gradients go back to the trained one."""
    b, n = 8, 32
    net, encoder, judge = (nn.Linear(n, n, bias=False) for _ in range(3))
    encoder.requires_grad_(False)
    judge.requires_grad_(False)
    found = cost(lambda: judge(net(encoder(torch.randn(b, n)))).sum(), [net], [], CPU)
    product = 2 * b * n * n
    assert found.flops == 2 * product  # forward, and by its weight
    assert found.beside == (1 + 2) * product


def test_the_discriminator_inside_the_generators_step_is_trained_too():
    b, n = 8, 32
    net, judge = (nn.Linear(n, n, bias=False) for _ in range(2))

    def loss():
        made = net(torch.randn(b, n))
        image = made.detach().requires_grad_()
        (slope,) = torch.autograd.grad(judge(image).sum(), image)
        return (made * slope).sum()

    found = cost(loss, [net, judge], [], CPU)
    assert (found.flops, found.beside) == (4 * 2 * b * n * n, 0)


def test_selective_checkpointing_keeps_inputs_and_products():
    b, n = 8, 32
    net = nn.Sequential(*[nn.Sequential(nn.Linear(n, n), *[nn.GELU() for _ in range(3)]) for _ in range(4)])
    found = cost(
        lambda: net(torch.randn(b, n)).sum(),
        [net],
        list(net),
        CPU,
        [torch.ops.aten.addmm.default].__contains__,
    )
    row = b * n * 4
    assert found.saved == 4 * 4 * row  # of a block: its input, the product, two GELUs
    assert found.selective == (4 + 4 + 3) * row  # inputs, products, and the rest of a block live again
    assert found.full == (4 + 4) * row


def test_parameters_that_take_no_part_are_named():
    net = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    net.forward = lambda x: net["used"](x)
    assert cost(lambda: net(torch.randn(2, 4)).sum(), [net], [], CPU).unused == ("idle.weight", "idle.bias")


def test_where_sizes_depend_on_values_it_is_computed_and_put_back():
    class Packed(nn.Linear):
        def forward(self, x):
            return super().forward(x[x.sum(1) > 0])

    x = torch.cat([torch.ones(3, 4), -torch.ones(2, 4)])
    for device in ("cpu", "meta"):
        net = Packed(4, 4).to(device)
        found = cost(lambda net=net: net(x).sum(), [net], [], CPU)
        assert found.flops == 2 * 2 * 3 * 4 * 4
        assert found.unused == ()
        assert net.weight.grad is None


def test_the_peak_of_a_cpu_is_that_of_the_fastest_of_several_products(monkeypatch):
    """By a clock whose products take 0.4, 0.25 and 0.5 s."""
    start, over = 0.0, 9.0
    looks = iter([start, 0.1, 1.0, 1.4, 0.1, 2.0, 2.25, 0.1, 3.0, 3.5, over])
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(looks))
    monkeypatch.setattr(flops, "measure_matmul", flops.measure_matmul.__wrapped__)
    found = peak(CPU)
    assert found.source.startswith("measured")
    assert found.flops == 2 * 1024**3 / 0.25


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_data_sheet(monkeypatch, name, bf16):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak(torch.device("cuda"), torch.bfloat16)
    assert found.flops == bf16 * 1e12
    assert name in found.source
    assert min(PEAKS.values())[0] > 0
