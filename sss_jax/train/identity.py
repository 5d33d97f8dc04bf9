"""Whether a run may go on from what another call saved."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sss_jax.errors import CheckpointError

_ABSENT = object()


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_identity(
    saved: Mapping[str, Any], current: Mapping[str, Any], fields: Iterable[str] | None = None
) -> None:
    """Refuse to go on from a run with other settings.

    Args:
        saved: settings of the saved run, nested or with dotted names.
        current: settings of this run, in the same form.
        fields: dotted names that must agree; a group name stands for all of its members. Without
            it every name of either side must agree.

    Raises:
        CheckpointError: listing every differing field with both values.
    """
    before, now = flatten_settings(saved), flatten_settings(current)
    chosen = None if fields is None else tuple(fields)
    lines = [
        f"{name}: saved {_show(before, name)}, now {_show(now, name)}"
        for name in dict.fromkeys([*before, *now])
        if _is_chosen(name, chosen) and _plain(before, name) != _plain(now, name)
    ]
    if lines:
        raise CheckpointError(
            "the saved run had other settings:\n  "
            + "\n  ".join(lines)
            + "\nUse its settings to go on, or another --workdir or --fresh to start anew."
        )


def _is_chosen(name: str, chosen: tuple[str, ...] | None) -> bool:
    return chosen is None or any(name == field or name.startswith(f"{field}.") for field in chosen)


def _plain(flat: Mapping[str, Any], name: str) -> Any:
    """Value in the form it has after a round trip through JSON, where tuples are lists."""
    value = flat.get(name, _ABSENT)
    return value if value is _ABSENT else json.dumps(value, sort_keys=True, default=str)


def _show(flat: Mapping[str, Any], name: str) -> str:
    value = flat.get(name, _ABSENT)
    return "nothing" if value is _ABSENT else json.dumps(value, default=str)
