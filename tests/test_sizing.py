import pytest

from elman.errors import UsageError
from elman.mixers import mixer_config, mixer_names, parse_pattern, pattern_mixers
from elman.sizing import TOLERANCE, num_params, size_model

E1 = (mixer_config("e1")(),)


@pytest.mark.parametrize("name", mixer_names())
@pytest.mark.parametrize("params", [10**6, 10**7, 5 * 10**7, 10**8, 4 * 10**8])
def test_every_variant_meets_its_target(name: str, params: int) -> None:
    config = size_model((mixer_config(name)(),), params=params)
    assert abs(num_params(config) / params - 1) <= TOLERANCE
    assert config.depth == 6


@pytest.mark.parametrize("pattern", ["elman", "e1,e1,mamba2", "e0,transformer", "lstm,minlstm,mamba2"])
@pytest.mark.parametrize("params", [3 * 10**6, 5 * 10**7, 4 * 10**8])
def test_every_pattern_meets_its_target(pattern: str, params: int) -> None:
    mixers = pattern_mixers(pattern)
    for depth in (6, 12):
        assert abs(num_params(size_model(mixers, params=params, depth=depth)) / params - 1) <= TOLERANCE


def test_the_published_size_of_e1() -> None:
    config = size_model(E1, params=50_000_000)
    assert (config.dim, config.depth) == (1280, 6)
    assert 49.4e6 < num_params(config) < 49.6e6


def test_depth_is_solved_for_a_width() -> None:
    config = size_model(E1, params=50_000_000, dim=768)
    assert config.dim == 768
    assert abs(num_params(config) / 50e6 - 1) <= TOLERANCE
    assert config.depth == 17


def test_sizes_without_a_target_are_taken_as_they_are() -> None:
    config = size_model(E1, dim=100, depth=3)
    assert (config.dim, config.depth) == (100, 3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "give --params"),
        ({"params": 100}, r"--params 100 cannot be met within 2%: the nearest is .*--dim 1 --depth 6"),
        ({"params": 50_000_000, "dim": 4096}, r"the nearest is .*--dim 4096 --depth 1"),
        ({"params": 50_000_000, "dim": 64, "depth": 2}, "drop one of --params, --dim and --depth"),
        ({"dim": 0}, "--dim 0"),
        ({"dim": 10**9}, "--dim 1000000000 is out of range"),
        ({"dim": 64, "depth": 10**6}, "--depth 1000000 is out of range"),
    ],
)
def test_bad_sizes_are_named(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        size_model(E1, **sizes)


def test_names() -> None:
    assert parse_pattern("1") == parse_pattern("E1") == ("e1",)
    assert parse_pattern("e1, e1,0") == ("e1", "e1", "e0")
    assert parse_pattern("elman, 0") == ("matrix", "e1", "e0")
    with pytest.raises(UsageError, match=r"'e11' is unknown: did you mean e1"):
        parse_pattern("e11")
    with pytest.raises(UsageError, match=r"'e3' is unknown: did you mean ladder_3\?"):
        parse_pattern("3")
    with pytest.raises(UsageError, match="`elman models`"):
        parse_pattern("")


def test_what_a_width_rounds_is_pinned_where_no_width_would_do() -> None:
    """A head of 32 values more or less is a tenth of a small model."""
    (matrix,) = (mixer_config("matrix")(),)
    for params in range(900_000, 1_400_000, 20_000):
        config = size_model((matrix,), params=params)
        assert abs(num_params(config) / params - 1) <= TOLERANCE
    assert size_model((matrix,), params=50_000_000).mixers == (matrix,)


def test_a_named_pattern_has_options() -> None:
    matrix, e1 = pattern_mixers("Elman")
    assert matrix == mixer_config("matrix")(conv=4, bound=4.0)
    assert e1 == mixer_config("e1")(bound=4.0, recurrent_lr=0.1)
    assert pattern_mixers("e0, elman") == (mixer_config("e0")(), matrix, e1)
    assert pattern_mixers("matrix,e1") == (mixer_config("matrix")(), mixer_config("e1")())
