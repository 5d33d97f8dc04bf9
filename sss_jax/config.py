"""Load a configuration file, apply overrides, check every value; no device is touched.

A configuration is a `configs/*.py` file with `get_config(arg)`; it is code and runs as such.
What it returns is checked here against `sss_jax.options` and becomes a frozen `Options`.
"""

import dataclasses
import difflib
import importlib.util
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from sss_jax.errors import ConfigError
from sss_jax.options import Options

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def default_config() -> ml_collections.ConfigDict:
    """Return every setting at its default, for configuration files to change."""
    return ml_collections.ConfigDict(dataclasses.asdict(Options()), convert_dict=True)


def load(spec: str, overrides: Iterable[str] = ()) -> Options:
    """Read `FILE.py[:arg]` or `NAME[:arg]`, apply `a.b=v` overrides, and check the result.

    Args:
        spec: a path, or the name of a packaged configuration such as `hippocampus`; what follows
            the colon is handed to `get_config`.
        overrides: `group.field=value` strings.

    Raises:
        ConfigError: unknown file, field or method, wrong type, out of range, contradictory.
    """
    target, _, arg = spec.partition(":")
    config = _call_get_config(_locate(target), arg).to_dict()
    for override in overrides:
        _apply(config, override)
    return from_dict(config)


def from_dict(values: Mapping[str, Any]) -> Options:
    """Build checked `Options` from a nested mapping; absent fields take their defaults."""
    options = _build(Options, values, "")
    _check_together(options)
    return options


def to_json(options: Options) -> str:
    """Serialise options; `from_dict(json.loads(text))` gives them back."""
    return json.dumps(dataclasses.asdict(options), indent=2) + "\n"


def _locate(target: str) -> Path:
    path = Path(target)
    if path.suffix == ".py":
        if path.is_file():
            return path
        raise ConfigError(f"configuration file {target} does not exist")
    known = packaged()
    if target in known:
        return known[target]
    raise ConfigError(f"no configuration is called {target!r}{_suggest(target, known)}")


def packaged() -> dict[str, Path]:
    """Return the configurations that come with the package, by name."""
    spec = importlib.util.find_spec("sss_jax.configs")
    if spec is None or spec.origin is None:
        raise ConfigError("the package's configurations are missing; install sss-jax again")
    files = Path(spec.origin).parent.glob("*.py")
    return {path.stem: path for path in sorted(files) if path.stem not in ("__init__", "common")}


def _call_get_config(path: Path, arg: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(f"sss_jax_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(arg) if arg else module.get_config()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"{path}: get_config() must return an ml_collections.ConfigDict")
    return config


def _apply(config: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} has no value; write --config.{name}=VALUE")
    *groups, leaf = name.split(".")
    node: Any = config
    for depth, part in enumerate([*groups, leaf]):
        if not isinstance(node, dict) or part not in node:
            raise ConfigError(f"unknown setting {name!r}{_suggest(name, _all_names())}")
        if depth < len(groups):
            node = node[part]
    if isinstance(node[leaf], dict):
        raise ConfigError(f"{name!r} is a group of settings; name one of {', '.join(node[leaf])}")
    node[leaf] = _parse(name, text, node[leaf])


def _all_names() -> list[str]:
    names = []
    for group, value in dataclasses.asdict(Options()).items():
        names += [f"{group}.{field}" for field in value] if isinstance(value, dict) else [group]
    return names


def _suggest(name: str, known: Iterable[str]) -> str:
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        by_leaf = {entry.rsplit(".", 1)[-1]: entry for entry in known}
        leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.6)
        close = [by_leaf[leaf[0]]] if leaf else []
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known)[:20])}"


def _parse(name: str, text: str, like: Any) -> Any:
    try:
        if isinstance(like, bool):
            if text.lower() not in _TRUE + _FALSE:
                raise ValueError
            return text.lower() in _TRUE
        if isinstance(like, (tuple, list)):
            return tuple(part for part in text.split(",") if part)
        if isinstance(like, int):
            return int(text)
        return type(like)(text)
    except ValueError:
        kind = type(like).__name__
        raise ConfigError(f"{name}={text!r} is not a {kind}; it is now {like!r}") from None


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [key for key in values if key not in fields]
    if unknown:
        name = prefix + unknown[0]
        raise ConfigError(
            f"unknown setting {name!r}{_suggest(name, [prefix + key for key in fields])}"
        )
    built = {}
    for key, value in values.items():
        field = fields[key]
        if dataclasses.is_dataclass(field.type):
            assert isinstance(field.type, type)
            built[key] = _build(field.type, value, f"{prefix}{key}.")
        else:
            built[key] = _checked(prefix + key, value, field)
    return cls(**built)


def _checked(name: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    value = _cast(name, value, field.default)
    choices, low, high = (field.metadata[key] for key in ("choices", "low", "high"))
    if choices and value not in choices:
        close = _suggest(str(value), map(str, choices)) if isinstance(value, str) else ""
        allowed = ", ".join(map(str, choices))
        raise ConfigError(f"{name}={value!r} is not one of {allowed}{close}")
    if isinstance(value, (int, float)) and not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} is not a finite number")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ConfigError(
            f"{name}={value!r} is outside {_range(low, high)}; {field.metadata['doc']}"
        )
    return value


def _cast(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        wanted = type(default).__name__
        raise ConfigError(f"{name}={value!r} must be of type {wanted}, not {type(value).__name__}")
    return value


def _range(low: float | None, high: float | None) -> str:
    return f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"


def _check_together(options: Options) -> None:
    problems = [message for broken, message in _contradictions(options) if broken]
    if problems:
        raise ConfigError("; ".join(problems))


def _contradictions(options: Options) -> list[tuple[bool, str]]:
    data, strong, weak = options.data, options.strong, options.weak
    multiple = 16 if options.model.preset == "nano" else 32
    size, names = options.model.image_size, data.class_names
    return [
        (size % multiple != 0, f"model.image_size={size} must be a multiple of {multiple}"),
        (
            bool(names) and len(names) != options.model.num_classes,
            f"data.class_names has {len(names)} names for model.num_classes="
            f"{options.model.num_classes}",
        ),
        (
            data.percentile_low >= data.percentile_high,
            "data.percentile_low must be below data.percentile_high",
        ),
        (
            data.canvas > 0 and options.mesh.context > 1,
            "data.canvas resizes whole slices on the device and mesh.context cuts their rows: set "
            "data.canvas=0",
        ),
        (data.window_low >= data.window_high, "data.window_low must be below data.window_high"),
        (strong.area_low > strong.area_high, "strong.area_low must not exceed strong.area_high"),
        (
            strong.sigma_low > strong.sigma_high,
            "strong.sigma_low must not exceed strong.sigma_high",
        ),
        (
            strong.aspect_low > strong.aspect_high,
            "strong.aspect_low must not exceed strong.aspect_high",
        ),
        (weak.scale_low > weak.scale_high, "weak.scale_low must not exceed weak.scale_high"),
        (
            options.semi.enabled and options.train.all_labels,
            "train.all_labels=true leaves no unlabelled case; use method supervised",
        ),
        (
            options.semi.enabled and options.semi.dropout and options.semi.views == 1,
            "semi.dropout needs semi.views=2: the two masks complement each other",
        ),
        (
            options.dfe.enhance_weak and options.dfe.pair == "strong_strong",
            "dfe.enhance_weak=true needs dfe.pair=weak_strong: else no weak view is compared",
        ),
        (
            options.memory.samples > options.memory.capacity,
            f"memory.samples={options.memory.samples} must not exceed memory.capacity="
            f"{options.memory.capacity}",
        ),
        (
            options.semi.labelled_prompts == "pcsw" and not options.pcsw.enabled,
            "semi.labelled_prompts=pcsw needs pcsw.enabled=true",
        ),
        (
            options.dfe.enabled and options.dfe.pair == "strong_strong" and options.semi.views == 1,
            "dfe.pair=strong_strong needs semi.views=2; with one view set dfe.pair=weak_strong",
        ),
    ]
