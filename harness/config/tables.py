"""The tables of choices, which the script hands in. No TensorFlow here."""

from __future__ import annotations

from typing import Any, NamedTuple

from harness.cli.own_files import short_name


class Tables(NamedTuple):
    """What there is to choose: the tables of variants/choices.py, and the presets."""

    entries: dict[str, dict[str, Any]]  # field -> name -> entry
    kinds: dict[str, Any]  # field -> type of its entries, where FILE.py:FUNCTION is one too
    presets: dict[str, Any]

    def find(self, field: str, name: str) -> Any:
        """Return the entry of this name; of FILE.py:FUNCTION what is known before it is read."""
        if name in self.entries[field] or field not in self.kinds:
            return self.entries[field][name]
        entry = self.kinds[field]("", function=name)
        title = short_name(name).replace("{", "{{").replace("}", "}}")
        return entry._replace(title=title) if field == "partition" else entry

    def has_owners(self, partition: Any) -> bool:
        """Return whether the clients of a partition are the owners of the images."""
        chosen = self.entries["partition"].get(partition) if isinstance(partition, str) else None
        return chosen is not None and "owner_choice" in chosen.fields

    def private_fields(self) -> tuple[str, ...]:
        """Return the fields that only aggregators of private runs use."""
        every = self.entries["aggregator"].values()
        private = [entry for entry in every if entry.kind == "private"]
        return tuple(field for entry in private for field in entry.fields)


def num_unseen(share: float, num_clients: int) -> int:
    """Return how many clients are never drawn; a share above 0 makes one at least."""
    return max(1, round(share * num_clients)) if share else 0
