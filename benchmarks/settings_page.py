"""Write the page of all settings: `python -m sss_jax.benchmarks.settings_page`."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from sss_jax.options import Options

PAGE = Path("docs/reference/settings.md")


def render() -> str:
    """Return the page: one table per group."""
    parts = [
        "# Settings\n\nChange any of them with `--config.GROUP.FIELD=VALUE`, or in a configuration "
        "file. This page is made from `sss_jax/options.py`.\n"
    ]
    for group in dataclasses.fields(Options):
        if not dataclasses.is_dataclass(group.type):
            continue
        assert isinstance(group.type, type)
        parts.append(f"\n## {group.name}\n\n{(group.type.__doc__ or '').strip()}\n")
        parts.append("| setting | default | values | meaning |\n| --- | --- | --- | --- |")
        parts += [_row(group.name, field) for field in dataclasses.fields(group.type)]
        parts.append("")
    return "\n".join(parts)


def _row(group: str, field: dataclasses.Field[Any]) -> str:
    return (
        f"| `{group}.{field.name}` | `{field.default}` | {_values(field)} | "
        f"{field.metadata['doc']} |"
    )


def _values(field: dataclasses.Field[Any]) -> str:
    choices, low, high = (field.metadata[key] for key in ("choices", "low", "high"))
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    if isinstance(field.default, bool):
        return "`true`, `false`"
    if low is None and high is None:
        return type(field.default).__name__
    return f"{low if low is not None else '-inf'} to {high if high is not None else 'inf'}"


if __name__ == "__main__":
    PAGE.write_text(render())
    print(PAGE, file=sys.stderr)
