"""What to cite for a run's method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


_ENTRIES = {
    "atm": ("zhou2024atm", "{ATM}: Improving Model Merging by Alternating Tuning and Merging", "2411.03055", 2024),
    "ties": ("yadav2023ties", "{TIES}-Merging: Resolving Interference When Merging Models", "2306.01708", 2023),
    "dare": (
        "yu2023dare",
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        "2311.03099",
        2023,
    ),
    "breadcrumbs": (
        "davari2023breadcrumbs",
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        "2312.06795",
        2023,
    ),
    "della": (
        "deep2024della",
        "{DELLA}-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        "2406.11617",
        2024,
    ),
    "tsv_m": (
        "gargiulo2024tsv",
        "Task Singular Vectors: Reducing Task Interference in Model Merging",
        "2412.00081",
        2024,
    ),
    "iso": (
        "marczak2025iso",
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        "2502.04959",
        2025,
    ),
    "task_arithmetic": ("ilharco2022task", "Editing Models with Task Arithmetic", "2212.04089", 2022),
    "fisher": ("matena2021fisher", "Merging Models with {Fisher}-Weighted Averaging", "2111.09832", 2021),
    "consensus": (
        "wang2024consensus",
        "Localizing Task Information for Improved Model Merging and Compression",
        "2405.07813",
        2024,
    ),
}


def citations(settings: Mapping[str, Any], method: str) -> str:
    """BibTeX entries for ATM and for what a run's settings use beside the mean.

    Args:
        settings (`Mapping[str, Any]`): those that are not defaults.
        method (`str`): the merge method.
    """
    keys = ["atm", *(key for key in _ENTRIES if key != "atm" and method.startswith(key))]
    if settings.get("moment_exponent"):
        keys.append("fisher")
    return "\n\n".join(_entry(*_ENTRIES[key]) for key in dict.fromkeys(keys))


def _entry(key: str, title: str, arxiv: str, year: int) -> str:
    return (
        f"@misc{{{key},\n  title = {{{title}}},\n  year = {{{year}}},\n  eprint = {{{arxiv}}},\n"
        f"  archivePrefix = {{arXiv}},\n  url = {{https://arxiv.org/abs/{arxiv}}}\n}}"
    )
