"""What is compared: data, method, and the recipe that each tool needs for the same merge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthetic import CHECKPOINTS, Adapters, Checkpoints, adapter_modules, shapes_of


# Tables of embeddings and small heads take the mean in spectral merges, in every tool.
NON_MATRIX = ["*embed*", "*lm_head*", "classifier*"]


@dataclass(frozen=True)
class Arm:
    """One tool's way of running a case.

    Args:
        method (`str`): the tool's name of the method.
        parameters (`dict`): the recipe's `parameters` for it.
        dtype (`str`): working type; every arm writes the case's `out_dtype`.
        once (`bool`): run only once, since its result is wanted and not its time.
        extra (`dict`): further keys of the recipe.
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    once: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A merge that several tools can do.

    Args:
        data (`Checkpoints` or `Adapters`): what is merged.
        weight (`float`): weight of every model.
        arms (`dict`): tools by name; "ours" among them.
        out_dtype (`str`): type of the result.
        note (`str`): how far the tools mean the same.
    """

    data: Checkpoints | Adapters
    weight: float
    arms: Mapping[str, Arm]
    out_dtype: str
    note: str

    def recipe(self, arm: str, folder: Path) -> dict[str, Any]:
        """The recipe of one arm over the models in `folder`."""
        chosen = self.arms[arm]
        models = [
            {"model": str(folder / f"task{task}"), "parameters": {"weight": self.weight}}
            for task in range(self.data.tasks)
        ]
        recipe: dict[str, Any] = {"merge_method": chosen.method, "models": models}
        if isinstance(self.data, Checkpoints):
            recipe |= {"base_model": str(folder / "base"), "dtype": chosen.dtype, "out_dtype": self.out_dtype}
        return recipe | {"parameters": dict(chosen.parameters)} | dict(chosen.extra)


def elementwise_cases(name: str, data: Checkpoints) -> dict[str, Case]:
    cases = {}

    def add(method: str, weight: float, ours: Arm, mergekit: Arm, note: str, **others: Arm) -> None:
        arms = {"ours": ours, **others, "mergekit": mergekit}
        if data.dtype == "bfloat16":
            # What mergekit's own examples ask for: faster and smaller, and the sums are rounded to eight bits.
            arms["mergekit-bf16"] = Arm(mergekit.method, mergekit.parameters, "bfloat16")
        cases[f"{name}-{method}"] = Case(data, weight, arms, data.dtype, note)

    same = Arm("task_arithmetic")
    add("task_arithmetic", 0.3, same, same, "The same sum.", floor=same)
    add(
        "ties",
        1.0,
        Arm("ties", {"density": 0.2, "trim_scope": "tensor", "min_sparse_numel": 0}),
        Arm("ties", {"density": 0.2}),
        "Per-tensor trim; of equal magnitudes at the threshold ours keeps the first, mergekit any; a vote of zero takes "
        "the majority's sign in ours, plus in mergekit.",
    )
    linear = {"normalize": False, "min_sparse_numel": 0}
    add(
        "dare_linear",
        0.3,
        Arm("dare_linear", {"density": 0.5, **linear}),
        Arm("dare_linear", {"density": 0.5}),
        "Random masks differ; ours divides by the density, mergekit restores each tensor's absolute sum.",
    )
    add(
        "della_linear",
        0.3,
        Arm("della_linear", {"density": 0.5, "epsilon": 0.15, **linear}),
        Arm("della_linear", {"density": 0.5, "epsilon": 0.15}),
        "Random masks differ; ours divides by each probability, mergekit restores each tensor's absolute sum.",
    )
    add(
        "breadcrumbs",
        0.3,
        Arm("breadcrumbs", {"density": 0.2, "gamma": 0.01, **linear}),
        Arm("breadcrumbs", {"density": 0.2, "gamma": 0.01}),
        "The same masks but for equal magnitudes at the thresholds.",
    )
    return cases


def spectral_case(method: str, data: Checkpoints, **ours: Any) -> Case:
    parameters = {"non_matrix": NON_MATRIX}
    return Case(
        data,
        1.0,
        {
            "ours": Arm(method, {**parameters, **ours}),
            "plain-svd": Arm(method, parameters),
            "fusion_bench": Arm(method, parameters),
            "svd-float64": Arm(method, parameters, "float64", once=True),
        },
        "float32",
        "The same formula; svd-float64 is the reference.",
    )


def spectral_cases(name: str, data: Checkpoints, share: float) -> dict[str, Case]:
    # Left to itself iso_c spreads the spectrum over the numerical rank here, which the smallest singular value of a
    # random square matrix now and then falls out of; the others spread it over all directions.
    return {
        f"{name}-tsv_m": spectral_case("tsv_m", data.scaled(share)),
        f"{name}-iso_c": spectral_case("iso_c", data, rank_rule="full"),
    }


def ties_over_models(data: Checkpoints) -> dict[str, Case]:
    return {
        "llama-ties-model": Case(
            data,
            1.0,
            {
                "ours": Arm("ties", {"density": 0.2, "min_sparse_numel": 0}),
                "fusion_bench": Arm("ties", {"density": 0.2}),
            },
            data.dtype,
            "Trim over the whole model; ours keeps exactly a fifth, FusionBench all magnitudes equal to the threshold.",
        )
    }


def adapter_cases(data: Adapters) -> dict[str, Case]:
    def ours(output: str, **more: Any) -> Arm:
        return Arm("task_arithmetic", extra={"adapters": {"output": output, **more}})

    return {
        "adapters-svd": Case(
            data,
            0.3,
            {
                "ours": ours("svd", svd_rank=data.rank),
                "peft": Arm("svd", {"combination_type": "svd", "svd_rank": data.rank}),
            },
            "float32",
            "The best adapter of the inputs' rank for the weighted sum of the updates.",
        ),
        "adapters-cat": Case(
            data,
            0.3,
            {"ours": ours("cat"), "peft": Arm("cat", {"combination_type": "cat"})},
            "float32",
            "The weighted sum of the updates, exactly, as an adapter of the summed rank.",
        ),
    }


def all_cases(scale: float) -> dict[str, Case]:
    """Every case by name; `scale` is the share of layers and vocabulary, see [`Checkpoints.scaled`].

    Decompositions of every task cost the same in every layer and take peers many minutes for a whole model, so that
    TSV-M gets fewer layers, as does TIES over the whole model, of which FusionBench holds many copies.
    """
    llama, bert = CHECKPOINTS["llama"].scaled(scale), CHECKPOINTS["bert"].scaled(scale)
    return {
        **elementwise_cases("llama", llama),
        **elementwise_cases("bert", bert),
        **spectral_cases("llama", llama, 1 / 8),
        **spectral_cases("bert", bert, 1 / 6),
        **ties_over_models(llama.scaled(1 / 4)),
        **adapter_cases(Adapters()),
    }


def size(data: Checkpoints | Adapters) -> str:
    """The data in words."""
    if isinstance(data, Adapters):
        return (
            f"{data.tasks} adapters of rank {data.rank}, {len(adapter_modules(data))} modules of "
            f"{data.hidden} x {data.hidden}"
        )
    numels = [math.prod(shape) for shape in shapes_of(data).values()]
    return f"base + {data.tasks} models, {sum(numels) / 1e6:.0f} M {data.dtype} parameters, {len(numels)} tensors"
