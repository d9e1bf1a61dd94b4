"""From the words of a command line to values of fields; an error names flag, value and remedy."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from typing import Any

from harness.cli.fields import (
    Range,
    UserError,
    check_value,
    choices_mark,
    choices_of,
    describe_range,
)

# Flags of the field's best-known programs, and the papers' letters: the field here, and how it
# differs.
ELSEWHERE = {
    "K": ("num_clients", ""),
    "nc": ("num_clients", ""),
    "num_users": ("num_clients", ""),
    "n_parties": ("num_clients", ""),
    "clients": ("num_clients", ""),
    "C": ("clients_per_round", " (a number, not a share)"),
    "frac": ("clients_per_round", " (a number, not a share)"),
    "fraction": ("clients_per_round", " (a number, not a share)"),
    "sample": ("clients_per_round", " (a number, not a share)"),
    "sample_ratio": ("clients_per_round", " (a number, not a share)"),
    "join_ratio": ("clients_per_round", " (a number, not a share)"),
    "T": ("rounds", ""),
    "num_rounds": ("rounds", ""),
    "comm_round": ("rounds", ""),
    "com_round": ("rounds", ""),
    "global_rounds": ("rounds", ""),
    "epochs": ("local_epochs", " (per client and round) or --rounds"),
    "E": ("local_epochs", ""),
    "local_ep": ("local_epochs", ""),
    "num_epochs": ("local_epochs", ""),
    "B": ("batch_size", " (0: the whole shard)"),
    "bs": ("batch_size", ""),
    "local_bs": ("batch_size", ""),
    "lr": ("client_lr", ""),
    "eta": ("client_lr", ""),
    "local_lr": ("client_lr", ""),
    "learning_rate": ("client_lr", ""),
    "local_learning_rate": ("client_lr", ""),
    "optimizer": ("client_optimizer", ""),
    "momentum": ("client_momentum", " with --client-optimizer momentum"),
    "alg": ("algorithm", ""),
    "algo": ("algorithm", ""),
    "strategy": ("algorithm", ""),
    "mu": ("prox_mu", ""),
    "beta": ("alpha", " (of the Dirichlet splits)"),
    "iid": ("partition", " iid"),
    "noniid": ("partition", " (the default, dirichlet, is non-IID)"),
    "unequal": ("partition", " quantity"),
    "drop_percent": ("stragglers", " (a probability)"),
    "init_seed": ("seed", ""),
    "num_classes": ("labels_per_client", ""),
    "output": ("runs", " and --name"),
    "out": ("runs", " and --name"),
}


def to_flag(field: str) -> str:
    """Return the field as a flag: "client_lr" is "--client-lr"."""
    return f"--{field.replace('_', '-')}"


def wants_help(words: Sequence[str]) -> bool:
    """Return whether tyro prints its help, or a shell's completion, for these words."""
    return any(
        asks_for_help(word) or word == "--help-all" or word.startswith("--tyro-") for word in words
    )


def asks_for_help(word: str) -> bool:
    """Return whether a word is --help, with or without a theme behind it."""
    return word in ("-h", "--help") or word.startswith("--help=")


def split_off(words: Sequence[str], field: str) -> tuple[list[str], list[str]]:
    """Return (the values that a command line gives to the flag of a field, all other words).

    A flag that lacks its value stays with the others, for `read_values` to tell.
    """
    values = []
    others = []
    position = 0
    while position < len(words):
        if not isinstance(words[position], str):
            raise UserError(
                f"{words[position]!r:.60} is not a text; give flags and values as texts, such as "
                "['--rounds', '3']"
            )
        flag, equals, text = words[position].partition("=")
        position += 1
        if not flag.startswith("--") or flag[2:].replace("-", "_") != field:
            others.append(words[position - 1])
        elif equals:
            values.append(text)
        elif position < len(words) and not words[position].startswith("--"):
            values.append(words[position])
            position += 1
        else:
            others.append(flag)
    return values, others


def read_values(words: Sequence[str], types: dict[str, Any]) -> dict[str, Any]:
    """Return field -> value of the flags in a command line; of a flag given twice the last one.

    `types` is field -> type. Raises UserError for an unknown flag, or a value that does not fit.
    """
    values: dict[str, Any] = {}
    position = 0
    while position < len(words):
        flag, equals, text = words[position].partition("=")
        position += 1
        field = find_field(flag, types)
        if types[field] is bool:
            if equals:
                other = f"--no-{to_flag(field)[2:]}"
                raise UserError(f"{flag} takes no value; write {to_flag(field)} or {other}")
            values[field] = flag[2:].replace("-", "_") == field
            continue
        if not equals:
            if position == len(words) or words[position].startswith("--"):
                raise UserError(f"{flag} needs a value; {describe(types[field])}")
            text = words[position]
            position += 1
        if text == "":
            raise UserError(
                f"{flag} '' is empty (an unset shell variable?); give a value, or drop the flag"
            )
        values[field] = to_value(text, types[field])
        check_value(field, values[field], types[field])
    return values


def find_field(flag: str, types: dict[str, Any]) -> str:
    """Return the field that a word such as --client-lr names. Raises UserError if there is none."""
    if not flag.startswith("-"):
        near = difflib.get_close_matches(flag.replace("-", "_"), types, n=1, cutoff=0.8)
        cure = f"did you mean {to_flag(near[0])}?" if near else "see --help"
        raise UserError(f"unexpected argument {flag!r:.60}; flags start with --; {cure}")
    name = flag.lstrip("-").replace("-", "_")
    if flag.startswith("--"):
        negated = name.removeprefix("no_")
        if name in types:
            return name
        if negated != name and types.get(negated) is bool:
            return negated
    if name in ELSEWHERE:
        field, difference = ELSEWHERE[name]
        raise UserError(f"unknown flag {flag}; use {to_flag(field)}{difference}")
    near = difflib.get_close_matches(name, types, n=3, cutoff=0.6)
    parts = [field for field in types if name and name in field.split("_")]
    flags = [to_flag(field) for field in dict.fromkeys([*near, *parts])]
    cure = f"did you mean {' or '.join(flags[:4])}?" if flags else "see --help"
    raise UserError(f"unknown flag {flag!s:.60}; {cure}")


def to_value(text: str, hint: Any) -> Any:
    """Convert a flag's text to the type `hint`; returns the text itself if that is impossible."""
    kind = typing.get_args(hint)[0] if typing.get_args(hint) else str
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int | None, float | None) and text == "None":
        return None
    try:
        if kind in (int, int | None):
            return int(text)
        if kind in (float, float | None):
            return float(text)
    except ValueError:
        pass
    return text


def describe(hint: Any) -> str:
    """Describe the values of a flag of this type."""
    choices = choices_of(hint)
    if choices:
        mark = choices_mark(hint)
        others = [mark.others] if mark and mark.others else []
        return f"choose {', '.join(filter(None, [*choices, *others]))}"
    spans = [mark for mark in typing.get_args(hint) if isinstance(mark, Range)]
    return f"give a number from {describe_range(spans[0])}" if spans else "give a text"
