"""The text of a card, section by section, from the facts alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..card_parts import auto_class, code_block, table
from .facts import CardFacts


def summary(facts: CardFacts) -> str:
    """One paragraph: what the model is."""
    run, rounds = facts.run, facts.rounds
    tasks = ", ".join(facts.tasks)
    base = run["model"]["base_model"]
    if facts.is_adapter:
        kind = f"An adapter for `{base}`" if base else "An adapter"
    else:
        kind = f"One model, tuned from `{base}`," if base else "One model"
    return (
        f"{kind} that handles {len(facts.tasks)} tasks: {tasks}. It was made by **alternating tuning and merging** "
        f"([ATM](https://huggingface.co/papers/2411.03055)): in each of {len(rounds)} rounds every task tuned the shared "
        f"weights on its own for a while, and the differences were merged (`{rounds[-1]['method']}`) into the weights that "
        "all tasks started the next round from."
    )


def usage(facts: CardFacts, repository: str) -> str:
    """Code that loads the model with stock classes."""
    if facts.is_adapter:
        base = facts.config.get("base_model_name_or_path") or "BASE_MODEL"
        return code_block(
            f'from peft import AutoPeftModel\n\nmodel = AutoPeftModel.from_pretrained("{repository}")  # on {base}'
        )
    if facts.exports:
        task, architecture = next(iter(facts.exports.items()))
        auto, side = auto_class(architecture), "AutoImageProcessor" if "Image" in architecture else "AutoTokenizer"
        folders = ", ".join(f"`tasks/{name}`" for name in facts.exports)
        return (
            f"Every task is a stock transformers model in a folder of its own: {folders}.\n\n"
            + code_block(
                f"from transformers import {', '.join(sorted((auto, side)))}\n\n"
                f'model = {auto}.from_pretrained("{repository}", subfolder="tasks/{task}")\n'
                f'processor = {side}.from_pretrained("{repository}", subfolder="tasks/{task}")'
            )
            + "\n\nAll tasks at once, with one shared backbone:\n\n"
            + _multi_task(repository, task)
        )
    if "tasks" in facts.config:
        return _multi_task(repository, facts.tasks[0])
    if not facts.config:
        return "The weights of a module of one's own; `model` is an instance of it.\n\n" + code_block(
            "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_model\n\n"
            f'load_model(model, hf_hub_download("{repository}", "model.safetensors"))'
        )
    auto = auto_class((facts.config.get("architectures") or [""])[0])
    return code_block(f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{repository}")')


def _multi_task(repository: str, task: str) -> str:
    return code_block(
        f'from hf_atm import MultiTaskModel\n\nmodel = MultiTaskModel.from_pretrained("{repository}")\n'
        f'single = model.to_task_model("{task}")  # a stock transformers model'
    )


def results(facts: CardFacts) -> str:
    """The table of scores by task."""
    record = facts.scored
    if record is None:
        return "The run was not evaluated."
    test = facts.test_scores()
    columns: dict[str, Mapping[str, float]] = {}
    if test:
        columns["test"] = test
    columns["validation"] = record["scores"]
    if record["expert_scores"]:
        columns["this round's expert, validation"] = record["expert_scores"]
    columns |= facts.levels
    header = ["task", "metric", *columns]
    rows = [
        [task, record["metric_names"][task], *(_number(column.get(task)) for column in columns.values())]
        for task in facts.tasks
        if task in record["metric_names"]
    ]
    rows.append(["**average**", "", *(_number(_mean(column, facts.tasks)) for column in columns.values())])
    text = table(header, rows)
    if "expert_scores" in record and record["expert_scores"]:
        text += "\n\nAn expert is the model that one task had tuned when the last merge was made."
    return text


def settings(facts: CardFacts) -> str:
    """Everything that was not left at its default."""
    rows = [[f"`{name}`", f"`{json.dumps(value)}`"] for name, value in sorted(facts.run["settings"].items())]
    return table(["setting", "value"], rows) if rows else "All settings were left at their defaults."


def method(facts: CardFacts) -> str:
    """How the rounds went."""
    run, last = facts.run, facts.rounds[-1]
    sizes = ", ".join(f"{task} {size:,}" for task, size in run["examples"].items())
    steps = run["steps"] // max(1, len(facts.rounds))
    pairs = [last["cosines"][a][b] for i, a in enumerate(last["tasks"]) for b in last["tasks"][i + 1 :]]
    cosine = f" In the last round task vectors had a mean cosine of {sum(pairs) / len(pairs):.3f}." if pairs else ""
    return (
        f"Training examples: {sizes}. A round took {steps} optimizer steps of {run['batch']} examples over all tasks. The "
        f"merged update was scaled by {last['step_size']:.3g} in the last round.{cosine} Seed {run['seed']}."
    )


def cost(facts: CardFacts) -> str:
    """Steps, time, traffic, hardware."""
    run, ledger = facts.run, facts.run["cost"]
    spent = [f"{name} {seconds / 60:.1f} min" for name, seconds in ledger["seconds_by_part"].items() if seconds >= 3]
    return (
        f"{ledger['optimizer_steps']:,} optimizer steps, {ledger['examples']:,} examples; {', '.join(spent) or 'a few seconds'}; "
        f"on {run['hardware']}, {run['processes']} process{'es' if run['processes'] > 1 else ''}. Had every task's data stayed "
        f"in a place of its own, {ledger['communicated_bytes'] / 1e6:,.0f} MB of weights would have travelled."
    )


def private(facts: CardFacts) -> str:
    """What each task keeps to itself; empty when that is nothing."""
    sizes = facts.report.get("private_parameters", {})
    if not any(sum(parts.values()) for parts in sizes.values()):
        return ""
    rows = [[task, f"{parts['head']:,}", f"{parts['modules']:,}"] for task, parts in sizes.items()]
    text = table(["task", "head", "private modules"], rows)
    patterns = facts.run["settings"].get("task_specific_modules")
    if patterns:
        named = ", ".join(f"`{pattern}`" for pattern in patterns)
        text += f"\n\nPrivate modules are the backbone's parameters that match {named}."
    return text + "\n\nAll other parameters are shared, and were merged after every round."


def limits(facts: CardFacts) -> str:
    """What the numbers do not say, and the weakest task."""
    record, lines = facts.scored, []
    if record:
        worst = min(record["scores"], key=lambda task: (record["scores"][task], task))
        lines.append(f"- The lowest score is that of `{worst}` ({record['scores'][worst]:.3f}).")
        experts = record["expert_scores"]
        lost = {task: experts[task] - record["scores"][task] for task in experts if task in record["scores"]}
        if lost and max(lost.values()) > 0:
            task = max(lost, key=lambda name: (lost[name], name))
            lines.append(f"- The last merge cost `{task}` most: {lost[task]:.3f} below its expert on validation data.")
    lines.append(f"- One seed ({facts.run['seed']}); expect other numbers from another one.")
    lines.append("- Biases and gaps of the base model and of the training data carry over, and were not examined.")
    return "\n".join(lines)


def files(facts: CardFacts) -> str:
    """Hashes and versions."""
    rows = [[f"`{name}`", f"`{digest}`"] for name, digest in facts.hashes.items()]
    versions = ", ".join(f"{name} {version}" for name, version in facts.run["versions"].items())
    return (table(["file", "SHA-256"], rows) + "\n\n" if rows else "") + f"Made with {versions}."


def _mean(scores: Mapping[str, float], tasks: Sequence[str]) -> float | None:
    known = [scores[task] for task in tasks if task in scores]
    return sum(known) / len(known) if len(known) == len(tasks) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
