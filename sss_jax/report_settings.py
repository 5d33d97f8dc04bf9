"""The settings of a run, group by group, with those that differ from the default marked."""

import dataclasses
from typing import Any

from sss_jax.options import Options
from sss_jax.report_svg import escape


def settings_tables(config: dict[str, Any]) -> str:
    """Return a closed block for each group of settings, with the number that were changed."""
    defaults = dataclasses.asdict(Options())
    groups = {name: values for name, values in config.items() if isinstance(values, dict)}
    single = {name: value for name, value in config.items() if name not in groups}
    if single:
        groups = {"general": single, **groups}
    usual = {"general": defaults, **defaults}
    return "".join(_group(name, values, usual.get(name, {})) for name, values in groups.items())


def _group(group: str, values: dict[str, Any], usual: dict[str, Any]) -> str:
    rows, changed = [], 0
    for name, value in values.items():
        differs = name not in usual or usual[name] != value
        changed += differs
        before = escape(usual[name]) if differs and name in usual else ""
        rows.append(
            f"<tr{' class=changed' if differs else ''}><td>{escape(name)}</td>"
            f'<td class="text">{escape(value)}</td><td class="text">{before}</td></tr>'
        )
    count = f"{changed} changed" if changed else "defaults"
    return (
        f"<details><summary>{escape(group)}<small>{count}</small></summary>"
        '<div class="scroll"><table><thead><tr><th>Setting</th><th class="text">Value</th>'
        f'<th class="text">Default</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div></details>"
    )
