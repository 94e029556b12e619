"""Counted FLOPs and saved bytes against sums done by hand."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.flops import PEAKS, cost, peak

CPU = torch.device("cpu")


def test_a_linear_layer_costs_three_products_or_two_at_the_input():
    b, n, m = 8, 32, 64
    net = nn.Sequential(nn.Linear(n, m), nn.Linear(m, n))
    found = cost(lambda: net(torch.randn(b, n)).sum(), net, [], CPU)
    product = 2 * b * n * m  # a multiply–add is two
    assert found.flops == product * (2 + 3)  # nobody asks for the gradient of the data


def test_attention_is_counted_on_a_cpu():
    b, h, n, d = 2, 4, 16, 8
    qkv = nn.Parameter(torch.randn(3, b, h, n, d))
    net = nn.ParameterList([qkv])
    found = cost(lambda: F.scaled_dot_product_attention(*qkv).sum(), net, [], CPU)
    assert found.flops == 3 * 2 * (2 * b * h * n * n * d)  # two products forward, four backward


def test_saved_bytes_are_those_of_the_activations_and_not_of_the_weights():
    b, n = 8, 32
    net = nn.Sequential(*[nn.Sequential(nn.Linear(n, n), nn.Sigmoid()) for _ in range(4)])
    x = torch.randn(b, n)
    found = cost(lambda: net(x).sum(), net, list(net), CPU)
    row = b * n * 4
    assert found.saved == 5 * row  # the data, and each block's output, which is the next one's input
    assert found.recomputed == 4 * row + 2 * row  # four inputs, and the first block, the largest, live again


def test_counting_leaves_no_trace():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    cost(lambda: net(torch.randn(8, 4)).sum(), net, list(net), CPU)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_peak_of_a_cpu_is_measured_and_says_so():
    found = peak(CPU)
    assert found.source.startswith("measured")
    assert 1e9 < found.flops < 1e14
    a, b = torch.randn(2, 512, 512)
    start = time.perf_counter()
    a @ b
    assert 2 * 512**3 / (time.perf_counter() - start) < 3 * found.flops


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
