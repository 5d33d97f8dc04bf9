"""Configurations load, and wrong ones are refused with the field and a suggestion."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sss_jax import config
from sss_jax.errors import ConfigError
from sss_jax.options import Options

METHODS = ("supervised", "fixmatch", "unimatch_v2", "sss")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["acdc", "bhsd", "demo", "hippocampus"])
def test_packaged_configurations_are_valid(name: str, method: str) -> None:
    options = config.load(f"{name}:{method}")
    assert options.method == method
    assert config.from_dict(json.loads(config.to_json(options))) == options


def test_every_packaged_file_is_tested() -> None:
    assert set(config.packaged()) == {"acdc", "bhsd", "demo", "hippocampus"}


def test_methods_differ_by_their_switches() -> None:
    by = {method: config.load(f"demo:{method}") for method in METHODS}
    assert not by["supervised"].semi.enabled
    assert by["fixmatch"].semi.teacher == "student"
    assert by["fixmatch"].semi.views == 1
    assert by["unimatch_v2"].semi.dropout
    assert by["unimatch_v2"].semi.teacher == "ema"
    assert [by[m].dfe.enabled and by[m].pcsw.enabled for m in METHODS] == [False] * 3 + [True]


def test_overrides_keep_the_type() -> None:
    words = [
        "train.steps=7",
        "semi.confidence=1",
        "dfe.enabled=no",
        "data.class_names=a,b",
        "model.preset=tiny",
    ]
    options = config.load("hippocampus:sss", words)
    assert options.train.steps == 7
    assert options.semi.confidence == 1.0
    assert isinstance(options.semi.confidence, float)
    assert options.dfe.enabled is False
    assert options.data.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trian.steps=5", "train.steps"),
        ("train.stpes=3", "train.steps"),
        ("steps=3", "train.steps"),
        ("train.steps=-1", "train.steps"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=a", "train.steps"),
        ("train.steps", "train.steps"),
        ("train=3", "train"),
        ("train.steps.more=3", "train.steps.more"),
        ("semi.confidence=1.5", "semi.confidence"),
        ("semi.confidence=nan", "semi.confidence"),
        ("semi.weight=inf", "semi.weight"),
        ("semi.enabled=maybe", "semi.enabled"),
        ("semi.views=3", "semi.views"),
        ("semi.views=1", "semi.views"),
        ("model.preset=tyny", "tiny"),
        ("model.image_size=65", "model.image_size"),
        ("model.num_classes=5", "data.class_names"),
        ("data.percentile_low=99.9", "data.percentile_low"),
        ("strong.area_low=0.9", "strong.area_low"),
        ("data.fit=leterbox", "letterbox"),
        ("train.all_labels=true", "train.all_labels"),
        ("pcsw.connectivity=18", "pcsw.connectivity"),
    ],
)
def test_a_mistake_names_the_field(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config.load("hippocampus:sss", [override])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hipocampus", "did you mean 'hippocampus'"),
        ("missing.py", "does not exist"),
        ("hippocampus:spp", "unknown method 'spp'"),
    ],
)
def test_a_wrong_name_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(spec)


@pytest.mark.parametrize(
    "text",
    ["raise ValueError('boom')", "def get_config():\n    return {}", "x = (", "y = 1"],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.py"):
        config.load(str(path))


@given(st.data())
def test_numbers_outside_their_range_are_refused(data: st.DataObject) -> None:
    groups = [f for f in dataclasses.fields(Options) if dataclasses.is_dataclass(f.type)]
    group = data.draw(st.sampled_from(groups))
    bounded = [f for f in dataclasses.fields(group.type) if f.metadata["low"] is not None]
    if not bounded:
        return
    field = data.draw(st.sampled_from(bounded))
    bad = type(field.default)(field.metadata["low"] - data.draw(st.integers(1, 100)))
    with pytest.raises(ConfigError, match=field.name):
        config.from_dict({group.name: {field.name: bad}})


def test_every_default_is_inside_its_own_range() -> None:
    assert config.from_dict(dataclasses.asdict(Options())) == Options()


def test_every_option_is_documented() -> None:
    for group in dataclasses.fields(Options):
        if dataclasses.is_dataclass(group.type):
            for field in dataclasses.fields(group.type):
                assert len(field.metadata["doc"]) > 5, f"{group.name}.{field.name}"


def test_the_settings_page_is_up_to_date() -> None:
    from sss_jax.benchmarks.settings_page import PAGE, render

    page = Path(__file__).parents[1] / PAGE
    assert page.read_text() == render(), "run python -m sss_jax.benchmarks.settings_page"
