"""Recurrent matrices: each structure is its dense matrix, each constraint holds, each start is as documented."""

import copy
import math
import typing
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elman.errors import UsageError
from elman.mixers import mixer_config
from elman.mixers.recurrent_weight import RecurrentWeight, SpectralNorm, Structure, Weight
from elman.ops import recurrence

D = 12
RHO = 0.99
STRUCTURES: tuple[str, ...] = typing.get_args(Structure)
#: Sizes at which no two of a structure's dimensions are equal by chance.
SIZES: dict[str, dict[str, Any]] = {
    "block_diagonal": {"heads": 4},
    "low_rank": {"rank": 5},
    "monarch": {"heads": 3},
    "sparse_low_rank": {"rank": 5, "density": 0.3},
    "random_projection": {"rank": 5},
}

each_structure = pytest.mark.parametrize("structure", STRUCTURES)
each_products = pytest.mark.parametrize("products", [1, 2])


def build(structure: str, products: int = 1, dim: int = D, std: float | None = None, **options: Any) -> RecurrentWeight:
    """A weight in float64; with ``std``, its parameters are drawn anew, so that nothing is orthogonal by design."""
    torch.manual_seed(0)
    config = mixer_config("e1")(structure=structure, **{**SIZES.get(structure, {}), **options})
    weight = config.recurrent_weight(dim, products).build().double()
    if std is not None:
        for parameter in weight.parameters():
            nn.init.normal_(parameter, std=std)
    return weight


def converge(weight: RecurrentWeight, steps: int = 250) -> None:
    assert isinstance(weight, SpectralNorm)
    for _ in range(steps):
        weight.after_step()


def as_matrix(weight: Weight, products: int = 1) -> Tensor:
    """The op's weight as (d, d), or (2, d, d)."""
    if isinstance(weight, tuple):
        return weight[0] @ weight[1]
    if products == 2:
        return torch.stack([as_matrix(of_product) for of_product in weight])
    return {1: torch.diag, 2: lambda w: w, 3: lambda w: torch.block_diag(*w)}[weight.ndim](weight)


def twin(structure: str, tensors: dict[str, Tensor]) -> Tensor:
    """W_h of one product, written out from its parameters and buffers."""
    t = tensors
    match structure:
        case "dense":
            return t["weight"]
        case "block_diagonal":
            return torch.block_diag(*t["weight"])
        case "diagonal":
            return torch.diag(t["weight"])
        case "low_rank":
            return t["u"] @ t["v"]
        case "monarch":
            a, b = len(t["right"]), len(t["left"])
            transpose = torch.eye(a * b, dtype=torch.float64)[torch.arange(a * b).view(a, b).t().flatten()]
            return transpose.T @ torch.block_diag(*t["left"]) @ transpose @ torch.block_diag(*t["right"])
        case "sparse_low_rank":
            rows, k = t["entries"].shape
            product = t["u"] @ t["v"]
            sparse = [
                sum((t["entries"][i, n] * (torch.arange(rows) == t["places"][i, n]) for n in range(k)), product[i])
                for i in range(rows)
            ]
            return torch.stack(sparse)
        case "random_projection":
            return t["basis"] @ t["middle"] @ t["basis"].T
    raise AssertionError(structure)


@each_structure
@each_products
def test_equals_its_dense_matrix_in_value_and_gradient(structure: str, products: int) -> None:
    weight = build(structure, products, std=0.4)
    tensors = dict(weight.named_parameters()) | dict(weight.named_buffers())
    one = [{name: x if products == 1 else x[p] for name, x in tensors.items()} for p in range(products)]
    dense = twin(structure, one[0]) if products == 1 else torch.stack([twin(structure, of) for of in one])
    cell, gates = ("tanh", ()) if products == 1 else ("triple_r", (2,))
    pre = torch.randn(7, 3, *gates, D, dtype=torch.float64, requires_grad=True)
    h0, dh = torch.randn(3, D, dtype=torch.float64, requires_grad=True), torch.randn(7, 3, D, dtype=torch.float64)
    inputs = [pre, h0, *weight.parameters()]
    found, expected = (recurrence(pre, w, h0, cell=cell)[0] for w in (weight(), dense))
    torch.testing.assert_close(found, expected)
    gradients = zip(torch.autograd.grad(found, inputs, dh), torch.autograd.grad(expected, inputs, dh), strict=True)
    for found, expected in gradients:
        torch.testing.assert_close(found, expected)


@each_products
@pytest.mark.parametrize(
    ("structure", "constraint"),
    [
        *((structure, constraint) for structure in STRUCTURES for constraint in ("free", "spectral_norm")),
        ("dense", "scaled_orthogonal"),
        ("block_diagonal", "scaled_orthogonal"),
    ],
)
def test_counts_and_forms(structure: str, constraint: str, products: int) -> None:
    config = mixer_config("e1")(structure=structure, constraint=constraint, **SIZES.get(structure, {}))
    config = config.recurrent_weight(D, products)
    weight = config.build()
    assert sum(parameter.numel() for parameter in weight.parameters()) == config.num_params()
    # Otherwise every call of a kernel would copy them.
    assert all(tensor.is_contiguous() for tensor in weight.state_dict().values())
    tensors = weight() if isinstance(weight(), tuple) else (weight(),)
    front = () if products == 1 else (products,)
    forms = {"block_diagonal": [(4, 3, 3)], "diagonal": [(D,)]}
    pair = [(D, 5), (5, D)]
    forms |= {"low_rank": pair, "random_projection": pair}
    assert [tuple(x.shape) for x in tensors] == [(*front, *form) for form in forms.get(structure, [(D, D)])]
    multiplied = 0 if structure == "diagonal" else sum(x.numel() for x in tensors)
    assert config.flops_per_token() == 2 * multiplied


def test_sparse_places_are_distinct_spread_and_drawn_anew() -> None:
    weights = [mixer_config("e1")(structure="sparse_low_rank").recurrent_weight(200).build() for _ in range(2)]
    for weight in weights:
        assert weight.places.shape == (200, 20)
        assert all(len(set(row.tolist())) == 20 for row in weight.places)
        assert torch.bincount(weight.places.flatten(), minlength=200).max() < 45  # 20 on average, σ = 4.2
    assert not torch.equal(weights[0].places, weights[1].places)


@each_structure
@each_products
@pytest.mark.parametrize("mode", ["cap", "rescale"])
def test_spectral_norm_bounds_the_true_largest_singular_value(structure: str, products: int, mode: str) -> None:
    for std in (0.05, 1.5):
        weight = build(structure, products, std=std, constraint="spectral_norm", spectral_mode=mode)
        converge(weight)
        free = torch.linalg.matrix_norm(as_matrix(weight.unscaled(), products), 2)
        assert ((free < RHO) == (std < 1)).all()
        bounded = torch.linalg.matrix_norm(as_matrix(weight(), products), 2)
        expected = torch.full_like(free, RHO) if mode == "rescale" or std > 1 else free
        torch.testing.assert_close(bounded, expected, rtol=1e-6, atol=0)


@each_structure
@pytest.mark.parametrize("mode", ["cap", "rescale"])
def test_the_gradient_through_the_bound_is_that_of_finite_differences(structure: str, mode: str) -> None:
    weight = build(structure, std=1.0, constraint="spectral_norm", spectral_mode=mode)
    converge(weight)
    direction = torch.randn(D, D, dtype=torch.float64)
    (as_matrix(weight()) * direction).sum().backward()

    def value() -> float:
        free = as_matrix(weight.unscaled()).detach()
        return float((free * RHO / torch.linalg.matrix_norm(free, 2) * direction).sum())

    step = 1e-5
    for name, parameter in weight.named_parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad
        assert gradient is not None
        for i in range(0, len(flat), 7):
            before = flat[i].item()
            flat[i] = before + step
            above = value()
            flat[i] = before - step
            below = value()
            flat[i] = before
            assert gradient.view(-1)[i].item() == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-7), name


def test_below_the_bound_nothing_is_changed() -> None:
    weight = build("dense", std=0.05, constraint="spectral_norm")
    direction = torch.randn(D, D, dtype=torch.float64)
    assert torch.equal(weight(), weight.unscaled())
    (weight() * direction).sum().backward()
    (parameter,) = weight.parameters()
    assert torch.equal(parameter.grad, direction)


def test_a_weight_of_zeros_has_no_bound_to_meet_and_is_found_once_it_grows() -> None:
    for mode in ("cap", "rescale"):
        weight = build("block_diagonal", std=0.0, constraint="spectral_norm", spectral_mode=mode)
        converge(weight, 3)
        weight().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in weight.parameters())
        (parameter,) = weight.parameters()
        nn.init.normal_(parameter)
        converge(weight)
        assert torch.linalg.matrix_norm(as_matrix(weight()), 2).item() == pytest.approx(RHO, rel=1e-6)


def test_the_bound_holds_while_training_pushes_against_it() -> None:
    weight = build("dense", dim=64, constraint="spectral_norm", init="normal")
    ahead, noise = torch.randn(2, 64, dtype=torch.float64), torch.randn(64, 64, dtype=torch.float64)
    target = 4 * torch.outer(*torch.nn.functional.normalize(ahead, dim=1)) + 0.1 * noise / 8
    optimizer = torch.optim.AdamW(weight.parameters(), lr=3e-3)
    largest = []
    for _ in range(200):
        (weight() - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        weight.after_step()
        largest.append(torch.linalg.matrix_norm(weight(), 2).item())
    assert largest[0] < 0.5
    assert max(largest) < RHO * 1.02
    assert largest[-1] == pytest.approx(RHO, rel=1e-6)
    assert torch.linalg.matrix_norm(weight.unscaled(), 2) > 1.1


def test_the_vector_is_saved_and_only_steps_move_it() -> None:
    weight = build("low_rank", std=1.0, constraint="spectral_norm")
    before = copy.deepcopy(weight.state_dict())
    assert torch.equal(as_matrix(weight()), as_matrix(weight()))
    torch.testing.assert_close(weight.state_dict(), before, rtol=0, atol=0)
    weight.after_step()
    assert not torch.equal(weight.vector, before["vector"])
    other = build("low_rank", std=2.0, constraint="spectral_norm")
    other.load_state_dict(weight.state_dict())
    assert torch.equal(as_matrix(other()), as_matrix(weight()))


@pytest.mark.parametrize("structure", ["dense", "block_diagonal"])
@each_products
def test_scaled_orthogonal_stays_orthogonal_up_to_its_scale(structure: str, products: int) -> None:
    weight = build(structure, products, constraint="scaled_orthogonal")
    eye = torch.eye(D, dtype=torch.float64)
    start = as_matrix(weight(), products).detach().clone()
    torch.testing.assert_close(start @ start.mT, (0.999**2 * eye).expand_as(start), atol=1e-6, rtol=0)
    optimizer = torch.optim.AdamW(weight.parameters(), lr=0.1)
    for _ in range(20):
        as_matrix(weight(), products).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (s,) = weight.parameters()
    assert (s < 6).all()
    scale = s.detach().sigmoid().view(*s.shape, 1, 1)
    torch.testing.assert_close(as_matrix(weight(), products), start * scale / 0.999, atol=1e-6, rtol=0)


@each_structure
@each_products
@pytest.mark.parametrize("init", ["orthogonal", "identity"])
def test_isometries_start_just_inside_the_unit_circle(structure: str, products: int, init: str) -> None:
    weight = build(structure, products, dim=60, init=init)
    found = as_matrix(weight(), products).detach()
    rank = 5 if "rank" in SIZES.get(structure, {}) else 60
    expected = torch.tensor([0.999] * rank + [0.0] * (60 - rank), dtype=torch.float64)
    singular = torch.linalg.svdvals(found)
    torch.testing.assert_close(singular, expected.expand_as(singular), atol=1e-5, rtol=0)
    # As many eigenvalues, so that states in that subspace do not fade.
    moduli = torch.linalg.eigvals(found).abs().sort(descending=True).values
    torch.testing.assert_close(moduli, expected.expand_as(moduli), atol=1e-4, rtol=0)
    eye = torch.eye(60, dtype=torch.float64)
    if rank == 60:
        assert torch.allclose(found, (0.999 * eye).expand_as(found), atol=1e-6) == (init == "identity")


@each_structure
@pytest.mark.parametrize(("init", "gain"), [("normal", None), ("xavier", 0.1)])
def test_gaussians_start_with_the_stated_variance(structure: str, init: str, gain: float | None) -> None:
    sizes = {"rank": 64} if "rank" in SIZES.get(structure, {}) else {"heads": 16} if structure == "monarch" else {}
    options = {**SIZES.get(structure, {}), **sizes}
    torch.manual_seed(0)
    config = mixer_config("e1")(structure=structure, init=init, **options).recurrent_weight(256)
    found = as_matrix(config.build()()).detach()
    entries = found[found != 0] if structure in ("block_diagonal", "diagonal") else found.flatten()
    heard = len(entries) / 256
    expected = 0.02 if gain is None else gain / math.sqrt(heard)
    # The entries of a product of random matrices are not independent: their spread is less certain.
    assert entries.std().item() == pytest.approx(expected, rel=0.1 if structure != "dense" else 0.01)
    assert abs(entries.mean().item()) < 0.2 * expected


def test_orthogonal_starts_are_uniform() -> None:
    """QR's own Q favours negative traces; uniform ones have traces of mean 0 and variance 1."""
    config = mixer_config("e1")(structure="block_diagonal", heads=4000).recurrent_weight(16000)
    traces = config.build()().diagonal(dim1=-2, dim2=-1).sum(-1).detach()
    assert abs(traces.mean().item()) < 4 / math.sqrt(4000)
    assert traces.var().item() == pytest.approx(0.999**2, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, "--heads 4 means nothing to --structure dense: .*block_diagonal or monarch"),
        ({"rank": 4}, "--rank 4 means nothing to --structure dense"),
        ({"structure": "low_rank", "density": 0.1}, "--density 0.1 means nothing .*give --structure sparse_low_rank"),
        ({"structure": "block_diagonal", "heads": 0}, "--heads 0 is out of range"),
        ({"structure": "low_rank", "rank": 0}, "--rank 0 is out of range"),
        ({"structure": "sparse_low_rank", "density": 0.0}, "--density 0.0 is out of range"),
        ({"structure": "sparse_low_rank", "density": 1.5}, "--density 1.5 is out of range"),
        ({"structure": "toeplitz"}, "--structure 'toeplitz' is unknown: choose one of dense"),
        ({"constraint": "tight"}, "--constraint 'tight' is unknown"),
        ({"init": "kaiming"}, "--init 'kaiming' is unknown"),
        ({"spectral_mode": "rescale"}, "--spectral-mode rescale means nothing to --constraint free"),
        (
            {"constraint": "scaled_orthogonal", "init": "normal"},
            "--init normal does not go with --constraint scaled_orthogonal.*give --init orthogonal or identity",
        ),
        *(
            (
                {"constraint": "scaled_orthogonal", "structure": structure},
                f"--constraint scaled_orthogonal does not go with --structure {structure}.*give --structure dense or",
            )
            for structure in STRUCTURES
            if structure not in ("dense", "block_diagonal")
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixer_config("e1")(**options)


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(UsageError, match="--rank 20 is more than the 12 units of W_h: give at most 12"):
        build("low_rank", rank=20)


def test_the_inner_width_is_a_multiple_of_the_heads() -> None:
    for heads, dim, expected in ((None, 64, 64), (12, 64, 60), (12, 3, 12)):
        config = mixer_config("e1")(structure="block_diagonal", heads=heads)
        assert config.inner_size(dim) == expected
    assert mixer_config("e1")(structure="monarch").recurrent_weight(1280).heads == 32


def test_automatic_ranks() -> None:
    def rank(name: str, dim: int, **options: Any) -> int:
        return int(mixer_config(name)(**options).recurrent_weight(dim).rank)

    assert [rank("e4", 512, expansion=e) for e in (1.0, 2.0, 4.0)] == [256, 128, 64]
    assert rank("e4", 32) == 16
    assert rank("e1", 8, structure="low_rank") == 8
    assert rank("e5", 1536) == 272
    assert rank("e4", 512, rank=7) == 7
