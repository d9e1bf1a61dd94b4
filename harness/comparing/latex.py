"""A comparison's table in LaTeX, as a paper prints it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.cli.own_files import short_name
from harness.storage.files import one_line

SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "%": r"\%",
    "_": r"\_",
    "&": r"\&",
    "#": r"\#",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "ε": r"$\varepsilon$",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    "°": r"$^\circ$",
    "×": r"$\times$",
}
# The papers' symbols of fields, in McMahan et al. 2017, Hsu et al. 2019, Li et al. 2020.
SYMBOLS = {
    "alpha": r"\alpha",
    "prox_mu": r"\mu",
    "client_lr": r"\eta",
    "server_lr": r"\eta_s",
    "num_clients": "K",
    "clients_per_round": "m",
    "local_epochs": "E",
    "batch_size": "B",
}


def escape(text: str) -> str:
    """Return a text as LaTeX prints it: none of its characters is a command."""
    return "".join(SPECIAL.get(char, char) for char in one_line(text))


def name_settings(settings: dict[str, Any], names: dict[str, str], label: str) -> str:
    r"""Return how a paper names a row: "FedProx, $\mu = 0.1$".

    `settings` are its field -> value, `names` the proper names of choices. A row without settings
    has its `label`.
    """
    found = []
    for field, value in settings.items():
        if value == "":
            found.append(escape(f"no {field.replace('_', ' ')}"))
        elif isinstance(value, str):
            found.append(names.get(value) or escape(short_name(value)))
        elif field in SYMBOLS and value is not None and not isinstance(value, bool):
            found.append(f"${SYMBOLS[field]} = {value:g}$")
        else:
            found.append(escape(f"{field.replace('_', ' ')} {value}"))
    return ", ".join(found) or escape(label)


def spread(mean: float, sd: float | None, digits: int, is_best: bool = False) -> str:
    r"""Return "$92.6 \pm 0.3$", in bold for the best."""
    text = f"{mean:.{digits}f}" + ("" if sd is None else rf" \pm {sd:.{digits}f}")
    return rf"$\mathbf{{{text}}}$" if is_best else f"${text}$"


def digits_of(rows: Sequence[dict[str, Any]]) -> int:
    """Return how many decimals mean and sd have in a table: 1, or 2 where a spread is small."""
    spreads = [row["sd"] for row in rows if row["sd"] is not None]
    return 1 if spreads and min(spreads) >= 0.1 else 2


def outcome_cells(rows: Sequence[dict[str, Any]], target: float) -> list[str]:
    """Return each row's outcome: its accuracy in percent, or its rounds to the target.

    The best is in bold, unless rows have other numbers of rounds. If a seed did not reach the
    target, the cell says after how many rounds, and how many seeds did.
    """
    if target:
        means = [row["rounds_to_target"] for row in rows]
        best = min((mean for mean in means if mean is not None), default=None)
        return [
            spread(mean, row["rounds_to_target_sd"], 1, mean == best)
            if mean is not None
            else f"$> {row['censored_at']}$ ({row['reached']}/{row['seeds']})"
            for row, mean in zip(rows, means, strict=True)
        ]
    digits = digits_of(rows)
    are_comparable = len({row["rounds"] for row in rows}) == 1
    best = max(row["mean"] for row in rows) if are_comparable else None
    return [spread(row["mean"], row["sd"], digits, row["mean"] == best) for row in rows]


def describe_outcome(rows: Sequence[dict[str, Any]], target: float) -> str:
    """Return what the outcomes are, for the table's caption."""
    seeds = sorted({row["seeds"] for row in rows})
    number = " to ".join(map(str, dict.fromkeys([seeds[0], seeds[-1]])))
    over = rf", mean $\pm$ sd over {number} seeds" if seeds[-1] > 1 else ", one seed"
    if target:
        return rf"Rounds to a test accuracy of {100 * target:g}\,\%{over}"
    rounds = sorted({row["rounds"] for row in rows})
    ends = " to ".join(f"{end:g}" for end in dict.fromkeys([rounds[0], rounds[-1]]))
    are_means = any(end != round(end) for end in rounds)
    after = f" after {ends} round{'s' * (ends != '1')}{' (means over seeds)' * are_means}"
    return rf"Test accuracy (\%){after}{over}"


def to_table(head: Sequence[str], body: Sequence[Sequence[str]], caption: str, label: str) -> str:
    r"""Return a table environment of cells in LaTeX; it needs \usepackage{booktabs}."""
    lines = [f"{' & '.join(cells)} \\\\\n" for cells in (head, *body)]
    return (
        "\\begin{table}\n\\centering\n"
        f"\\caption{{{caption}}}\n\\label{{tab:{label}}}\n"
        f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n{lines[0]}\\midrule\n"
        f"{''.join(lines[1:])}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


def grid_table(
    rows: Sequence[dict[str, Any]],
    places: Sequence[tuple[str, ...]],
    target: float,
) -> tuple[list[str], list[list[str]]]:
    """Return (head, body) of a table with a row and a column for each value of a grid's two fields.

    `places` are the names of the row and the column of each of `rows`. The best of a column is in
    bold.
    """
    row_names = list(dict.fromkeys(place[0] for place in places))
    column_names = list(dict.fromkeys(place[1] for place in places))
    cells: dict[tuple[str, ...], str] = {}
    for column in column_names:
        there = [number for number, place in enumerate(places) if place[1] == column]
        outcomes = outcome_cells([rows[number] for number in there], target)
        cells |= {places[number]: text for number, text in zip(there, outcomes, strict=True)}
    body = [
        [name, *(cells.get((name, column), "") for column in column_names)] for name in row_names
    ]
    return ["", *column_names], body
