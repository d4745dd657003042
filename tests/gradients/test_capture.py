from __future__ import annotations

import torch
from torch import nn

from raydpp.gradients.capture import GradientCapture
from raydpp.gradients.projection import Projection


def test_captured_gradients_are_autograds_own_for_each_example_alone() -> None:
    torch.manual_seed(0)
    layers = {"first": nn.Linear(5, 6, bias=False), "second": nn.Linear(6, 4, bias=False)}
    model = nn.Sequential(layers["first"], nn.Tanh(), layers["second"]).double()
    inputs = torch.randn(3, 7, 5, dtype=torch.float64)  # (n, s, inputs)
    projection = Projection({"first": (6, 5), "second": (4, 6)}, 50)

    expected = torch.zeros(3, 50, dtype=torch.float64)
    for example in range(3):  # the gradient as autograd gives it, as one rank-one sum after the other
        grads = torch.autograd.grad(
            model(inputs[example : example + 1]).square().sum(), [layer.weight for layer in layers.values()]
        )
        for (name, layer), grad in zip(layers.items(), grads, strict=True):
            eye = torch.eye(layer.in_features, dtype=torch.float64)[None]  # sum_s (column s of G) e_s^T = G
            projection.add_layer(expected[example : example + 1], name, eye, grad.T[None])

    model.requires_grad_(False)
    with GradientCapture(layers, projection, torch.float64) as capture:
        model(inputs).square().sum().backward()
        captured = capture.projected()
    torch.testing.assert_close(captured, expected, rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())
    model(inputs)
    assert not layers["first"]._forward_hooks  # the hooks are gone with the context
