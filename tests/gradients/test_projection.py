from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from raydpp.gradients.projection import Projection, derived_generator, gaussian, rademacher
from tests.gradients.dense_reference import BLOCK, RademacherProjection

Kind = type[Projection] | type[RademacherProjection]
Data = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
SHAPES: dict[Kind, dict[str, tuple[int, int]]] = {
    Projection: {"wide": (40, 300), "narrow": (500, 8), "small": (6, 5)},
    RademacherProjection: {"wide": (10, 70), "narrow": (120, 8), "small": (6, 5)},  # every entry has signs of its own
}
ROWS: dict[Kind, int] = {Projection: 64, RademacherProjection: 0}
kinds = pytest.mark.parametrize("kind", SHAPES)


def draw(kind: Kind, seed: int, n: int = 2, s: int = 7) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(n, s, inputs, generator=generator, dtype=torch.float64),
            torch.randn(n, s, outputs, generator=generator, dtype=torch.float64),
        )
        for name, (outputs, inputs) in SHAPES[kind].items()
    }


def project(
    kind: Kind,
    data: Data,
    dimension: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    scales: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    shapes = {name: (g.shape[2], a.shape[2]) for name, (a, g) in data.items()}
    projection = kind(shapes, dimension, ROWS[kind], seed, dtype=dtype, scales=scales)
    total = torch.zeros(len(next(iter(data.values()))[0]), dimension, dtype=torch.float64)
    for name, (a, g) in data.items():
        projection.add_layer(total, name, projection.reduce_inputs(name, a), g)
    return total


def full(data: Data) -> torch.Tensor:
    return torch.cat([(g.transpose(1, 2) @ a).flatten(1) for a, g in data.values()], dim=1)


def project_densely(gradient: torch.Tensor, dimension: int, seed: int = 0, name: str = "layer") -> torch.Tensor:
    """The (D,) projection of one (outputs, inputs) gradient."""
    outputs, inputs = gradient.shape
    projection = RademacherProjection({name: (outputs, inputs)}, dimension, seed=seed)
    total = torch.zeros(1, dimension, dtype=torch.float64)
    eye = torch.eye(inputs, dtype=torch.float64)[None]
    projection.add_layer(total, name, projection.reduce_inputs(name, eye), gradient.T[None].double())
    return total[0]


@kinds
def test_inner_products_are_preserved_in_expectation_and_the_error_falls_as_one_over_d(kind: Kind) -> None:
    data = draw(kind, 0)
    data = {name: (a[[0, 0]] + 0.5 * a, g[[0, 0]] + 0.5 * g) for name, (a, g) in data.items()}  # correlated examples
    exact = full(data)
    scale = float(exact[0].norm() * exact[1].norm())
    truth = float(exact[0] @ exact[1]) / scale
    assert truth > 0.3
    errors = {}
    for dimension in (64, 256):
        products = np.array([float(p[0] @ p[1]) for p in (project(kind, data, dimension, seed) for seed in range(150))])
        errors[dimension] = products / scale - truth
        assert abs(errors[dimension].mean()) < 4 * errors[dimension].std() / np.sqrt(150)
        assert errors[dimension].var() < 4 / dimension
    assert 2 < errors[64].var() / errors[256].var() < 8  # 4 in theory


@kinds
def test_the_scale_does_not_depend_on_the_layers_shape(kind: Kind) -> None:
    for name, (outputs, inputs) in SHAPES[kind].items():
        a, g = torch.ones(1, 1, inputs) / inputs**0.5, torch.ones(1, 1, outputs) / outputs**0.5  # gradient of norm 1
        squares = [float(project(kind, {name: (a, g)}, 128, seed).square().sum()) for seed in range(200)]
        assert abs(np.mean(squares) - 1) < 4 * np.std(squares) / np.sqrt(200) + 1e-6


@kinds
def test_what_is_projected_is_the_sum_over_positions_and_layers(kind: Kind) -> None:
    data = draw(kind, 2)
    found = project(kind, data, 32, 5)
    in_full = {
        name: (torch.eye(a.shape[2], dtype=torch.float64).expand(2, -1, -1), a.transpose(1, 2) @ g)
        for name, (a, g) in data.items()
    }
    torch.testing.assert_close(project(kind, in_full, 32, 5), found)
    for row in range(2):
        alone = {name: (a[row, None], g[row, None]) for name, (a, g) in data.items()}
        torch.testing.assert_close(project(kind, alone, 32, 5)[0], found[row])
    parts = [project(kind, {name: pair}, 32, 5) for name, pair in data.items()]
    torch.testing.assert_close(torch.stack(parts).sum(0), found)


@kinds
def test_the_same_seed_gives_the_same_numbers_and_another_seed_independent_ones(kind: Kind) -> None:
    data = draw(kind, 1, n=1)
    assert torch.equal(project(kind, data, 32, 5), project(kind, data, 32, 5))
    projected = torch.stack([project(kind, data, 32, seed)[0] for seed in range(301)]).numpy()
    for coordinate in (0, 31):
        correlation = np.corrcoef(projected[:-1, coordinate], projected[1:, coordinate])[0, 1]
        assert abs(correlation) < 4 / np.sqrt(300)


@kinds
def test_layers_of_the_same_shape_are_projected_independently(kind: Kind) -> None:
    pair = draw(kind, 3, n=1)["wide"]
    nothing = (torch.zeros_like(pair[0]), pair[1])
    products = []
    for seed in range(200):
        one = project(kind, {"a": pair, "b": nothing}, 64, seed)[0]
        other = project(kind, {"a": nothing, "b": pair}, 64, seed)[0]
        products.append(float(one @ other / (one.norm() * other.norm())))
    assert abs(np.mean(products)) < 4 * np.std(products) / np.sqrt(200)
    assert np.std(products) < 0.3


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_models_precision_changes_no_more_than_its_rounding(kind: Kind, dtype: torch.dtype) -> None:
    data = draw(kind, 4)
    exact = project(kind, data, 64, 0)
    rounded = project(kind, {name: (a.to(dtype), g.to(dtype)) for name, (a, g) in data.items()}, 64, 0, dtype)
    # How a matrix product is summed up, and so how much its rounding adds, depends on the processor.
    assert (rounded - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()


def test_the_projection_estimates_what_the_dense_reference_does_and_errs_hardly_more() -> None:
    data = draw(RademacherProjection, 5)
    data = {name: (a[[0, 0]] + 0.5 * a, g[[0, 0]] + 0.5 * g) for name, (a, g) in data.items()}  # correlated examples
    ours, dense = (
        np.array([float(p[0] @ p[1]) for p in (project(kind, data, 128, seed) for seed in range(300))])
        for kind in (Projection, RademacherProjection)
    )
    assert abs(ours.mean() - dense.mean()) < 4 * np.sqrt((ours.var() + dense.var()) / 300)
    assert ours.var() < 2 * dense.var()


def test_a_projection_of_nothing_or_to_nothing_is_refused() -> None:
    for dimension, rows in ((0, 4), (7, 4), (8, 0), (8, 3)):
        with pytest.raises(ValueError, match=f"to {dimension} dimensions with {rows} rows: both must be even"):
            Projection({"a": (2, 2)}, dimension, rows)
    with pytest.raises(ValueError, match="no layer"):
        Projection({}, 8, 4)


def test_the_halves_are_projections_of_their_own_and_differ_as_much_as_their_sum_is_off() -> None:
    data = draw(Projection, 6)
    data = {name: (a[[0, 0]] + 0.5 * a, g[[0, 0]] + 0.5 * g) for name, (a, g) in data.items()}  # correlated examples
    exact = full(data)
    scale = float(exact[0].norm() * exact[1].norm())
    truth = float(exact[0] @ exact[1]) / scale
    halves = np.array(
        [
            (p[0] * p[1]).view(2, -1).sum(1).numpy() / scale
            for p in (project(Projection, data, 64, s) for s in range(400))
        ]
    )  # (400, 2)
    spread = halves.std(axis=0) / np.sqrt(400)
    assert (np.abs(halves.mean(axis=0) - truth / 2) < 4 * spread).all()
    assert abs(np.corrcoef(halves.T)[0, 1]) < 4 / np.sqrt(400)
    error = halves.sum(1).std()
    assert np.sqrt(np.mean((halves[:, 0] - halves[:, 1]) ** 2)) == pytest.approx(error, rel=0.15)


def test_what_inputs_have_in_common_costs_nothing() -> None:
    """As the outputs are not mapped: a map of theirs would err where inputs are alike, one of the inputs does not."""
    torch.manual_seed(1)
    a = 5 * torch.ones(2, 1, 400, dtype=torch.float64) + torch.randn(2, 1, 400, dtype=torch.float64)
    g = torch.randn(2, 1, 300, dtype=torch.float64)
    g[1] -= g[0] * (g[0, 0] @ g[1, 0]) / (g[0, 0] @ g[0, 0])  # orthogonal gradients of nearly the same inputs
    errors = {}
    for name, (inputs, outputs) in {"as it is": (a, g), "turned round": (g, a)}.items():
        data = {"layer": (inputs, outputs)}
        scale = float(full(data).norm(dim=1).prod())
        errors[name] = np.std(
            [float(p[0] @ p[1]) / scale for p in (project(Projection, data, 4096, s) for s in range(60))]
        )
    assert errors["as it is"] < 1.5 / math.sqrt(4096)
    assert errors["turned round"] > 5 * errors["as it is"]


@pytest.mark.parametrize("dimension", [2, 30, 64, 5000])
def test_examples_taken_a_few_at_a_time_give_the_same_numbers(dimension: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw(Projection, 7, n=5)
    together = project(Projection, data, dimension, 0)
    monkeypatch.setattr("raydpp.gradients.projection._ENTRIES", 6000)
    torch.testing.assert_close(project(Projection, data, dimension, 0), together)
    assert together.abs().min() > 0 or dimension == 5000


def test_the_numbers_depend_on_seed_name_and_side_alone_and_are_those_of_every_machine() -> None:
    first = derived_generator(0, "layer", "left").integers(0, 2**32, 4).tolist()
    assert first == [1785005450, 3876106349, 75445007, 1988022364]
    for other in ((1, "layer", "left"), (0, "layer2", "left"), (0, "layer", "right")):
        assert first != derived_generator(*other).integers(0, 2**32, 4).tolist()
    assert (2 * rademacher(4, 6, derived_generator(0, "layer", "left"))).tolist() == [
        [1, -1, -1, -1, -1, 1],
        [-1, 1, -1, -1, -1, -1],
        [-1, 1, -1, -1, 1, 1],
        [-1, 1, -1, 1, -1, -1],
    ]
    assert derived_generator(0, "layer", "spread").permutation(8).tolist() == [0, 2, 4, 5, 6, 3, 7, 1]


def test_a_projections_numbers_are_those_of_every_machine() -> None:
    data = {"layer": (torch.arange(40.0).reshape(1, 1, 40), torch.ones(1, 1, 30))}
    numbers = project(Projection, data, 4, 0)[0].tolist()
    assert numbers == pytest.approx([261.5, 263, 928.25, -271.25], rel=1e-6)


def test_every_entry_meets_signs_of_its_own() -> None:
    outputs, inputs, dimension = 5, 4, 512
    rows = []
    for entry in range(outputs * inputs):
        one = torch.zeros(outputs * inputs)
        one[entry] = 1
        rows.append(project_densely(one.reshape(outputs, inputs), dimension))
    signs = torch.stack(rows) * math.sqrt(dimension)  # (entries, D)
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs))
    gram = signs @ signs.T / dimension - torch.eye(len(signs), dtype=torch.float64)
    assert gram.abs().max() < 5 / math.sqrt(dimension)
    assert abs(signs.mean()) < 4 / math.sqrt(signs.numel())
    whole = torch.randn(outputs, inputs, dtype=torch.float64)
    torch.testing.assert_close(project_densely(whole, dimension), whole.flatten() @ signs / math.sqrt(dimension))


def test_the_variance_of_an_inner_product_is_that_of_theory() -> None:
    torch.manual_seed(0)
    g, h = torch.randn(2, 12, 8, dtype=torch.float64)
    products = np.array([float(project_densely(g, 32, seed) @ project_densely(h, 32, seed)) for seed in range(2000)])
    squares, product = float((g * g * h * h).sum()), float((g * h).sum())
    theory = (float(g.square().sum() * h.square().sum()) + product**2 - 2 * squares) / 32
    assert products.mean() == pytest.approx(product, abs=4 * math.sqrt(theory / 2000))
    assert products.var() == pytest.approx(theory, rel=0.2)


@pytest.mark.parametrize("entries", [BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_layers_larger_than_a_block_are_projected_whole(entries: int) -> None:
    gradient = torch.ones(entries, 1)
    one, two = gradient.clone(), gradient.clone()
    one[entries // 2 :] = 0
    two[: entries // 2] = 0
    whole = project_densely(gradient, 64)
    torch.testing.assert_close(project_densely(one, 64) + project_densely(two, 64), whole)
    assert float(whole.square().sum()) == pytest.approx(entries, rel=4 * math.sqrt(2 / 64))
    last = torch.zeros(entries, 1)
    last[-1] = 1
    assert float(project_densely(last, 64).norm()) == pytest.approx(1)


def test_blocks_have_different_signs() -> None:
    first, second = torch.zeros(2, 2 * BLOCK, 1)
    first[0], second[BLOCK] = 1, 1
    assert abs(float(project_densely(first, 1024) @ project_densely(second, 1024))) < 4 / math.sqrt(1024)


def test_a_gaussian_map_preserves_inner_products_and_is_none_of_signs() -> None:
    draws = np.stack([gaussian(6, 9, derived_generator(seed, "layer", "right")) for seed in range(3000)])  # (k, 6, 9)
    products = (draws.transpose(0, 2, 1) @ draws).mean(0)  # (9, 9)
    np.testing.assert_allclose(products, np.eye(9), atol=4 * np.sqrt(2 / 6 / 3000))
    assert np.mean((draws * np.sqrt(6)) ** 4) == pytest.approx(3, rel=0.05)  # of signs: 1
    shapes = {"layer": (4, 9)}
    one, two = (Projection(shapes, 16, 6, init=init).maps["layer"] for init in ("gaussian", "signs"))
    assert one is not None
    assert two is not None
    np.testing.assert_array_equal(one.numpy(), gaussian(6, 9, derived_generator(0, "layer", "right")))
    np.testing.assert_allclose(two.abs().numpy(), 6**-0.5)


@pytest.mark.parametrize("entries", [None, 6000, 1])
def test_scaled_gradients_are_projected_as_if_they_had_come_so(
    entries: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if entries is not None:
        monkeypatch.setattr("raydpp.gradients.projection._ENTRIES", entries)
    data, shapes = draw(Projection, 8, n=5), SHAPES[Projection]
    generator = torch.Generator().manual_seed(9)
    scales = {  # from 1e-3 to 1e3; one layer has none
        name: 10 ** (6 * torch.rand(shape, generator=generator, dtype=torch.float64) - 3)
        for name, shape in shapes.items()
        if name != "narrow"
    }
    dense = {
        name: (g.transpose(1, 2) @ a * scales.get(name, torch.ones(1, dtype=torch.float64)))  # (n, outputs, inputs)
        for name, (a, g) in data.items()
    }
    given = {  # sum_s (column s of G) e_s^T = G
        name: (torch.eye(whole.shape[2], dtype=torch.float64).expand(5, -1, -1), whole.transpose(1, 2))
        for name, whole in dense.items()
    }
    expected = project(Projection, given, 64, 0)
    torch.testing.assert_close(project(Projection, data, 64, 0, scales=scales), expected)
    for row in range(5):  # whatever its neighbours
        alone = {name: (a[row, None], g[row, None]) for name, (a, g) in data.items()}
        torch.testing.assert_close(project(Projection, alone, 64, 0, scales=scales)[0], expected[row])
    assert (project(Projection, data, 64, 0) - expected).norm() > expected.norm() / 2


def test_scaled_gradients_of_a_model_in_bfloat16_are_summed_in_float32() -> None:
    data = {name: (a.bfloat16(), g.bfloat16()) for name, (a, g) in draw(Projection, 4, s=200).items()}
    scales = {name: torch.ones(shape) for name, shape in SHAPES[Projection].items()}
    exact = project(Projection, {name: (a.double(), g.double()) for name, (a, g) in data.items()}, 64, 0)
    found = project(Projection, data, 64, 0, torch.bfloat16, scales)
    assert (found - exact).norm() < 1e-5 * exact.norm()
