"""The machine that results are from, as the run saw it, and the commit: they stand in every results
file."""

import sys
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness.provenance import commit, processor


def machine() -> str:
    """What the seconds depend on, and the last bits of the weights: the processor, its vectors,
    cores and memory."""
    return f"{processor()}, {psutil.virtual_memory().total >> 30} GiB, Linux"


def made_by() -> dict[str, str | None]:
    """What a results file says of where it is from."""
    return {"machine": machine(), "commit": commit()}


def machines(rows: list[dict]) -> str:
    """What the rows were measured on, each machine once."""
    return "; ".join(sorted({row["machine"] for row in rows}))
