"""What a result says of the machine."""

import pytest

from sss_jax.benchmarks import result

EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: {model}
model name\t: AMD EPYC
flags\t\t: fpu vme

processor\t: 1
cpu family\t: 99
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\n"


def test_two_generations_of_one_name_are_two_processors():
    one, two = (EPYC.format(family=f, model=m) for f, m in ((25, 1), (26, 2)))
    assert result.processor_name(one) == "AMD EPYC, family 25, model 1"
    assert result.processor_name(two) == "AMD EPYC, family 26, model 2"


@pytest.mark.parametrize(("text", "name"), [(ARM, ""), ("model name : A: B", "A: B"), ("", "")])
def test_what_is_not_told_is_left_out(text, name):
    assert result.processor_name(text) == name


def test_fresh_memory_is_counted():
    before = result.page_faults()
    taken = bytearray(64 << 20)  # zeroed by writing, so that the system finds every page
    taken[::4096] = b"x" * len(taken[::4096])
    assert result.page_faults() > before
