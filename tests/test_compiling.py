"""Compiler options: used where known, dropped where not."""

import jax
import jax.numpy as jnp
import pytest

from sss_jax import compiling


def test_this_version_knows_the_options():
    assert compiling.compiler_options() == compiling.CPU_OPTIONS


def test_an_unknown_option_is_left_out(monkeypatch):
    monkeypatch.setitem(compiling.CPU_OPTIONS, "xla_cpu_of_another_version", "1")
    assert "xla_cpu_of_another_version" not in compiling.compiler_options()
    assert compiling.jit(lambda x: x + 1)(1.0) == 2.0


def test_other_platforms_take_no_options(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiling.compiler_options() == {}


def test_jit_asks_for_no_device_before_the_first_call(monkeypatch):
    def refuse():
        raise AssertionError("a device was asked for")

    monkeypatch.setattr(jax, "default_backend", refuse)
    double = compiling.jit(lambda x: 2 * x)
    with pytest.raises(AssertionError, match="device"):
        double(1.0)


def test_jit_compiles_once_and_keeps_static_arguments():
    def power(x, *, exponent):
        """Raise."""
        return x**exponent

    raised = compiling.jit(power, static_argnames="exponent")
    assert raised.__doc__ == "Raise."
    for value in (2.0, 3.0):
        assert raised(jnp.float32(value), exponent=2) == value**2
    assert raised.compiled()._cache_size() == 1
    options = raised.compiled().lower(jnp.float32(1.0), exponent=2).compile()
    assert "ynn" not in options.as_text()


def test_a_jitted_function_runs_inside_every_transformation():
    double = compiling.jit(lambda x: 2 * x)
    x = jnp.arange(3.0)
    for outer in (jax.jit(double), compiling.jit(double), jax.vmap(double), jax.pmap(double)):
        assert (outer(x[None])[0] == 2 * x).all()
    assert (jax.grad(lambda x: double(x).sum())(x) == 2).all()
    assert (jax.jit(lambda: double(jnp.asarray(x)))() == 2 * x).all()
    assert double.compiled()._cache_size() == 0
