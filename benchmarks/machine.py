"""The machine that results are from: it stands in every results file, and below every table."""

import os
import platform
import re

import psutil

VECTORS = {"avx512_vnni": "AVX-512 VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}  # oneDNN has kernels for each


def machine() -> str:
    """What the seconds depend on, and the last bits of the weights: the processor, its vectors, cores and memory."""
    with open("/proc/cpuinfo") as file:
        about = dict(re.split(r"\s*:\s*", line.strip(), maxsplit=1) for line in file if ":" in line)
    model, flags = about.get("model name", platform.machine()), about.get("flags", "").split()
    vectors = next((name for flag, name in VECTORS.items() if flag in flags), "SSE")
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total >> 30
    return f"{model} with {vectors}, {cores} cores, {memory} GiB, Linux"


def machines(rows: list[dict]) -> str:
    """What the rows were measured on, each machine once."""
    return "; ".join(sorted({row["machine"] for row in rows}))
