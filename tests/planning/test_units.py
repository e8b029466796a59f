from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramdelta.errors import RecipeError
from paramdelta.planning.units import format_size, parse_dtype, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        (4096, 4096),
        ("1b", 1),
        ("512MB", 512_000_000),
        ("512mb", 512_000_000),
        ("512M", 512_000_000),
        ("512MiB", 512 << 20),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("5GB", 5_000_000_000),
        ("5GiB", 5 << 30),
        ("2TB", 2 * 10**12),
        ("1PiB", 1 << 50),
        ("1.5GiB", 3 << 29),
        ("0.5kB", 500),
        (" 3 MB ", 3_000_000),
    ],
)
def test_sizes_are_read_in_powers_of_ten_or_with_an_i_in_powers_of_two(text: str | int, size: int) -> None:
    assert parse_size(text, "memory") == size


@pytest.mark.parametrize(
    "text", ["", "MB", "-1MB", "1 MB 2", "1XB", "1e9", "0x10", "1,5GB", "1.GB", ".5GB", "nan", "inf", "five", "1.2.3MB"]
)
def test_what_is_no_size_is_an_error_that_names_the_field_and_shows_the_form(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^shard-size: .* is not a size") as caught:
        parse_size(text, "shard-size")
    assert "512MB" in (caught.value.remedy or "")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["0", 0, "0GB", "0.4B", "0.0001kB", -5])
def test_a_size_of_less_than_a_byte_is_an_error(text: str | int) -> None:
    with pytest.raises(RecipeError, match="memory"):
        parse_size(text, "memory")


@pytest.mark.parametrize("text", ["9" * 400 + ".5MB", "9" * 5000, "9" * 5000 + ".5"])
def test_a_size_of_absurd_length_is_read_or_is_an_error_like_any_other(text: str) -> None:
    try:
        assert parse_size(text, "memory") > 0
    except RecipeError as error:
        assert error.message.startswith("memory")  # noqa: PT017 (either outcome is fine)


@given(st.integers(1, 10**15), st.sampled_from(["", "B", "kB", "MB", "GiB", "tib"]))
def test_whole_sizes_are_exact_however_large(number: int, unit: str) -> None:
    factor = {"": 1, "B": 1, "kB": 1000, "MB": 10**6, "GiB": 2**30, "tib": 2**40}[unit]
    assert parse_size(f"{number}{unit}", "memory") == number * factor


@pytest.mark.parametrize(
    ("name", "spellings"),
    {
        "BF16": ("bf16", "BF16", "bfloat16", "torch.bfloat16"),
        "F16": ("f16", "fp16", "float16", "half", "torch.half"),
        "F32": ("f32", "FP32", "float32", "float", "torch.float32"),
        "F64": ("f64", "float64", "Double"),
    }.items(),
)
def test_dtypes_are_spelled_as_safetensors_torch_or_numpy_do(name: str, spellings: tuple[str, ...]) -> None:
    assert {parse_dtype(spelling, "dtype") for spelling in spellings} == {name}


@pytest.mark.parametrize("text", ["", "int8", "i32", "fp8", "F8_E4M3", "bf-16", "torch."])
def test_what_is_no_float_dtype_is_an_error_that_names_the_field_and_the_choice(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^dtype: ") as caught:
        parse_dtype(text, "dtype")
    assert caught.value.remedy == "Use bf16, f16, f32 or f64."


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_600, "1 MB"),
        (2_471_645_608, "2.47 GB"),
        (141_107_412_992, "141 GB"),
        (1_342_000_000_000, "1.34 TB"),
    ],
)
def test_sizes_are_written_with_three_digits(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 10**15 - 10**12))
def test_a_written_size_is_right_to_half_a_percent_and_short(size: int) -> None:
    text = format_size(size)
    assert len(text) <= 7
    if size:
        assert abs(parse_size(text, "memory") - size) <= 0.005 * size
