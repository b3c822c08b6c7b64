"""What every card is made of: code that loads, tables, citations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


_REBASIN = (
    "ainsworth2022rebasin",
    "Git Re-Basin: Merging Models modulo Permutation Symmetries",
    "2209.04836",
    2022,
)

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
    "regmean": (
        "jin2022regmean",
        "Dataless Knowledge Fusion by Merging Weights of Language Models",
        "2212.09849",
        2022,
    ),
    "adamerging": (
        "yang2023adamerging",
        "{AdaMerging}: Adaptive Model Merging for Multi-Task Learning",
        "2310.02575",
        2023,
    ),
    "model_stock": (
        "jang2024modelstock",
        "Model Stock: All We Need Is Just a Few Fine-Tuned Models",
        "2403.19522",
        2024,
    ),
    "magmax": (
        "marczak2024magmax",
        "{MagMax}: Leveraging Model Merging for Seamless Continual Learning",
        "2407.06322",
        2024,
    ),
    "pcb": ("du2024pcb", "Parameter Competition Balancing for Model Merging", "2410.02396", 2024),
    "opcm": (
        "tang2025opcm",
        "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging",
        "2501.09522",
        2025,
    ),
    "wudi": (
        "cheng2025wudi",
        "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
        "2503.08099",
        2025,
    ),
    "c2m3": (
        "crisostomi2024c2m3",
        "$C^2M^3$: Cycle-Consistent Multi-Model Merging",
        "2405.17897",
        2024,
    ),
    "git-rebasin": _REBASIN,
    "merge-many": _REBASIN,
    "consensus": (
        "wang2024consensus",
        "Localizing Task Information for Improved Model Merging and Compression",
        "2405.07813",
        2024,
    ),
}

# Ends of architectures' names, and the class that loads any model of the kind.
_AUTO_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForImageClassification": "AutoModelForImageClassification",
}


def auto_class(architecture: str) -> str:
    """The stock class that loads a model.

    Args:
        architecture (`str`): its class, as in `config.json`.
    """
    return next((auto for end, auto in _AUTO_CLASSES.items() if architecture.endswith(end)), "AutoModel")


def citations(methods: Sequence[str], settings: Mapping[str, Any] | None = None) -> str:
    """BibTeX entries of the papers that methods come from; empty when none is known.

    Args:
        methods (`Sequence[str]`): merge methods, and `"atm"` for the loop.
        settings (`Mapping[str, Any]`, *optional*): of a run; those that come from a paper are cited as well.
    """
    # A method's name holds those of the methods it is made of, as in dare_ties.
    keys = [key for method in methods for key in _ENTRIES if key in method]
    if settings and settings.get("moment_exponent"):
        keys.append("fisher")
    return "\n\n".join(_entry(*_ENTRIES[key]) for key in dict.fromkeys(keys))


def _entry(key: str, title: str, arxiv: str, year: int) -> str:
    return (
        f"@misc{{{key},\n  title = {{{title}}},\n  year = {{{year}}},\n  eprint = {{{arxiv}}},\n"
        f"  archivePrefix = {{arXiv}},\n  url = {{https://arxiv.org/abs/{arxiv}}}\n}}"
    )


def code_block(text: str, language: str = "python") -> str:
    """Fenced code."""
    return f"```{language}\n{text}\n```"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        header (`Sequence[str]`): names of the columns.
        rows (`Sequence[Sequence[str]]`): cells, as many in each.
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
