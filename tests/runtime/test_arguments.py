"""One rule for all doors: an argument error names the argument, what was given and what is accepted."""

import decimal
import fractions

import jax.numpy as jnp
import numpy as np
import pytest

from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime import arguments


@pytest.mark.parametrize("value", [5, np.int64(5), np.uint8(5), np.int32(5), jnp.int32(5), np.array(5)])
def test_arguments_whole_numbers_of_any_library(value):
    assert arguments.whole_number("steps", value, least=1, most=9) == 5
    assert type(arguments.whole_number("steps", value)) is int


@pytest.mark.parametrize("value", [5.0, "5", None, True, np.bool_(True), [5], np.array([5]), 5j, fractions.Fraction(5)])
def test_arguments_that_are_no_whole_numbers(value):
    with pytest.raises(RehyatError, match=r"^steps must be a whole number of 1 or more, not ") as error:
        arguments.whole_number("steps", value, least=1)
    assert repr(value)[:20] in str(error.value)


@pytest.mark.parametrize(
    ("value", "least", "most", "words"),
    [
        (0, 1, None, "of 1 or more, not 0"),
        (np.int64(10), 1, 9, "from 1 to 9, not 10"),
        (10**30, None, 9, "of 9 or less, not 1000000000000000000000000000000"),
    ],
)
def test_arguments_out_of_range_say_the_range(value, least, most, words):
    with pytest.raises(RehyatError, match=f"^frames must be a whole number {words}$"):
        arguments.whole_number("frames", value, least=least, most=most)


@pytest.mark.parametrize(
    "value", [1.5, np.float32(1.5), np.float64(1.5), jnp.float32(1.5), fractions.Fraction(3, 2), decimal.Decimal("1.5")]
)
def test_arguments_numbers_of_any_library(value):
    assert arguments.number("guidance_scale", value) == 1.5


@pytest.mark.parametrize("value", ["a", "1.5", None, True, [1.5], float("nan"), float("inf"), 10**400, 1j])
def test_arguments_that_are_no_finite_numbers(value):
    with pytest.raises(RehyatError, match=r"^guidance_scale must be a finite number, not "):
        arguments.number("guidance_scale", value)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, np.uint32(2**32 - 1), np.int64(7)])
def test_arguments_seeds_have_32_bits(seed):
    assert arguments.seed_number(seed) == int(seed)


@pytest.mark.parametrize(("seed", "count"), [(-1, 1), (2**32, 1), (2**32 - 1, 2), (2**64, 1), ("7", 1), (1.0, 1)])
def test_arguments_seeds_that_are_none(seed, count):
    with pytest.raises(RehyatError, match=f"^seed must be a whole number from 0 to {2**32 - count}, not "):
        arguments.seed_number(seed, count=count)


@pytest.mark.parametrize("value", ["a", ["a", "b"], ("a",), np.array(["a"])])
def test_arguments_texts(value):
    assert arguments.texts("prompt", value) == list(np.atleast_1d(value))


@pytest.mark.parametrize("value", [5, None, [], ["a", 5], b"a", {"a": 1}])
def test_arguments_that_are_no_texts(value):
    with pytest.raises(RehyatError, match=r"^prompt must be a text or a list of texts that is not empty, not "):
        arguments.texts("prompt", value)


@pytest.mark.parametrize("value", ["bfloat16", jnp.bfloat16, np.dtype("float32"), "float32", np.float32])
def test_arguments_number_formats(value):
    assert arguments.float_dtype("dtype", value).name in ("bfloat16", "float32")


@pytest.mark.parametrize("value", ["bf16", "float16", np.float64, int, None, 5, "", object])
def test_arguments_that_are_no_number_formats(value):
    with pytest.raises(RehyatError, match=r"^dtype must be float32 or bfloat16, not "):
        arguments.float_dtype("dtype", value)


@pytest.mark.parametrize("value", [5, None, b"a", ["a"]])
def test_arguments_that_are_no_paths(value):
    with pytest.raises(RehyatError, match=r"^path must be a path, not "):
        arguments.user_path("path", value)


def test_arguments_a_tilde_is_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert arguments.user_path("path", "~/a") == tmp_path / "a"
    assert str(arguments.user_path("path", "~nobody-of-this-name/a")) == "~nobody-of-this-name/a"


def test_arguments_that_are_long_are_shown_in_part():
    with pytest.raises(RehyatError) as error:
        arguments.text("prompt", list(range(10_000)))
    assert len(str(error.value)) < 150
