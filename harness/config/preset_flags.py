"""The flags of presets, which the script hands in. No TensorFlow here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from harness.cli.flags import split_off, wants_help
from harness.cli.output import print_line
from harness.cli.run_options import BY_CONTENT, identity


def preset_notices(config: Any, default: Any) -> list[str]:
    """Return a notice with a preset's source, and where the run differs from it.

    `default` is the configuration without flags. Returns [] without a preset.
    """
    name = config.preset
    if name == "none":
        return []
    there = default.replace(preset=name, seed=config.seed).effective().to_dict()
    here = config.effective().to_dict()
    deciding = {*identity(config), *BY_CONTENT, "rounds", "target_accuracy"}
    fields = [field for field in here if field in deciding]
    changed = [
        f"{field} {here[field]} (preset {'none' if there[field] == '' else there[field]})"
        for field in fields
        if here[field] != there[field]
    ]
    preset = config.tables.presets[name]
    notice = ": ".join(filter(None, [f"preset {name}", preset.help, preset.note]))
    return [f"{notice}. Changed from the preset: {', '.join(changed)}" if changed else notice]


def preset_fields(
    name: Any, presets: dict[str, Any], parse: Callable[[Sequence[str]], Any]
) -> dict[str, Any]:
    """Return the fields that a preset's flags set, as `parse` reads them; without one, nothing."""
    if not isinstance(name, str) or name not in presets or name == "none":
        return {}
    words = presets[name].flags.split()
    fields = [word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")]
    return parse(words).subset(fields)


def explain_preset(words: Sequence[str], presets: dict[str, Any]) -> None:
    """Print the flags of --preset and exit, if help is asked for as well."""
    names = split_off(words, "preset")[0]
    if wants_help(words) and names and names[-1] in presets:
        preset = presets[names[-1]]
        print_line(f"--preset {names[-1]}: {preset.help}\nsets {preset.flags or 'nothing'}")
        if preset.note:
            print_line(f"differences from the publication: {preset.note}")
        sys.exit()


def insert_preset_flags(words: Sequence[str], presets: dict[str, Any]) -> list[str]:
    """Return a command line's words with the flags of its --preset before them: its own win.

    A run that is resumed has its flags in its folder.
    """
    names = split_off(words, "preset")[0]
    is_resumed = bool(split_off(words, "resume")[0])
    if is_resumed or not names or names[-1] not in presets:
        return list(words)
    return [*presets[names[-1]].flags.split(), *words]
