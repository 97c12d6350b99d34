import pytest

from elman.errors import UsageError
from elman.units import format_bytes, format_count, format_duration, parse_count, parse_duration


@pytest.mark.parametrize(
    ("text", "value"), [("50m", 50_000_000), ("1.5K", 1500), ("2b", 2_000_000_000), ("2G", 2 * 10**9), ("512", 512)]
)
def test_parse_count(text: str, value: int) -> None:
    assert parse_count(text, "--params") == value


@pytest.mark.parametrize("text", ["50x", "", "m", "-5m", "0", "1e400", "nan", "5 0m", "99999999b"])
def test_parse_count_names_option_and_value(text: str) -> None:
    with pytest.raises(UsageError, match=r"--params .*such as 50m") as caught:
        parse_count(text, "--params")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("45", 45), ("0.5h", 1800)])
def test_parse_duration(text: str, value: float) -> None:
    assert parse_duration(text, "--time-limit") == value


@pytest.mark.parametrize("text", ["", "0", "0s", "10 minutes", "-1m", "9999h", "m"])
def test_parse_duration_names_option_and_value(text: str) -> None:
    with pytest.raises(UsageError, match=r"--time-limit .*such|--time-limit .*like"):
        parse_duration(text, "--time-limit")


def test_formats() -> None:
    assert [format_count(n) for n in (7, 1500, 49_490_000, 999_900, 1.2e9)] == ["7", "1.5K", "49.5M", "1M", "1.2G"]
    assert [format_bytes(n) for n in (12, 2048, 3 << 30)] == ["12 B", "2.0 KiB", "3.0 GiB"]
    assert [format_duration(s) for s in (5, 61, 5400)] == ["5s", "1m01s", "1h30m"]
