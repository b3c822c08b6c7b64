"""AdaMerging: coefficients per task and tensor, learnt without labels by minimising the entropy of predictions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..elementwise.chunks import plain_sum
from ..registry import register_merge_method
from ..tensors import canonical_tasks, check_names, listed, sorted_keys
from .batches import batches, device_of, evaluating, logits_of, model_inputs, problem_of, progress_bar


State = Mapping[str, Tensor]


@dataclass(frozen=True)
class LearnedCoefficients:
    """What [`learn_coefficients`] found.

    Args:
        coefficients (`dict[str, list[float]]`): Per tensor one coefficient for each model, in the order they were given
            in; the keyword of the method `adamerging`, also as JSON or YAML.
        history (`list[float]`): Mean entropy over the tasks, in nats, before each step.
    """

    coefficients: dict[str, list[float]]
    history: list[float] = field(default_factory=list)


def _check_coefficients(
    task_vectors: Sequence[State],
    _weights: Any,
    names: Sequence[str],
    *,
    coefficients: Mapping[str, Sequence[float]],
    **_kwargs: Any,
) -> None:
    missing = sorted(key for key in task_vectors[0] if key not in coefficients)
    if missing:
        raise ValueError(
            f"Merge method 'adamerging' has no coefficients for {listed(missing)}; add them, or exclude these tensors."
        )
    for key in sorted(task_vectors[0]):
        row = list(coefficients[key])
        if len(row) != len(names) or not all(map(math.isfinite, row)):
            raise ValueError(
                f"Merge method 'adamerging' got the coefficients {row} for '{key}'; expected {len(names)} finite numbers, "
                "one per model."
            )


@register_merge_method("adamerging", family="linear", per_tensor=True, prepare=_check_coefficients)
def adamerging(
    task_vectors: Sequence[State],
    weights: Sequence[float],
    names: Sequence[str],
    *,
    coefficients: Mapping[str, Sequence[float]],
) -> dict[str, Tensor]:
    """
    AdaMerging's sum with learnt coefficients, `sum_t w_t lambda[t, l] tau_t[l]` for each tensor l
    (https://huggingface.co/papers/2310.02575).

    Args:
        task_vectors (`Sequence[Mapping[str, Tensor]]`):
            T mappings with the same keys and shapes, floating point.
        weights (`Sequence[float]`):
            T factors beside the coefficients; ones leave these as they were learnt.
        names (`Sequence[str]`):
            T different task names; they fix the order of summation.
        coefficients (`Mapping[str, Sequence[float]]`):
            Tensor name to T finite numbers, in the order of the inputs; see [`learn_coefficients`].

    Returns:
        `dict[str, Tensor]`: merged tensors, float32 (float64 for float64 inputs). Scale: as learnt, like a sum with
        coefficients of about 0.3.

    Raises:
        `ValueError`: if a tensor has no coefficients, or not one per model.
    """
    _check_coefficients(task_vectors, weights, names, coefficients=coefficients)
    tasks = canonical_tasks(task_vectors, weights, names, list(range(len(names))))
    return {
        key: plain_sum(tasks, key, [task.weight * coefficients[key][task.extra] for task in tasks])
        for key in sorted_keys(tasks)
    }


def learn_coefficients(
    models: nn.Module | Sequence[nn.Module],
    base: State | nn.Module,
    state_dicts: Sequence[State | nn.Module],
    dataloaders: Mapping[str, Iterable] | Sequence[Iterable],
    names: Sequence[str] | None = None,
    num_steps: int = 1000,
    learning_rate: float = 1e-3,
    initial: float = 0.3,
    layerwise: bool = True,
    exclude: Sequence[str] = (),
    disable_tqdm: bool = False,
) -> LearnedCoefficients:
    """
    Learns the coefficients lambda of `theta_0 + sum_t lambda[t, l] tau_t[l]` at test time
    (https://huggingface.co/papers/2310.02575).

    Adam minimises the Shannon entropy of the predictions, summed over one unlabelled batch per task and step, the mean
    over examples (or unpadded tokens) of each. Only the coefficients are trained: what the modules hold is not changed,
    and what is not merged, such as heads and buffers, is used as it is in each task's module. Modules are in evaluation
    mode meanwhile. Entropy stands for error only while predictions are better than chance: models that interfere too
    much become sure of one class instead.

    Args:
        models (`nn.Module` or `Sequence[nn.Module]`):
            One module for all tasks, whose `forward` is given `task=name` if it takes `task`, as [`MultiTaskModel`]
            does; or T modules of one architecture, each with the head of its task, such as stock classifiers.
        base (`Mapping[str, Tensor] | nn.Module`):
            The common starting point theta_0.
        state_dicts (`Sequence[Mapping[str, Tensor] | nn.Module]`):
            T fine-tuned models. Parameters that modules, base and all models have in one shape are merged.
        dataloaders (`Mapping[str, Iterable]` or `Sequence[Iterable]`):
            Batches without labels by task name, or T of them; gone through again when exhausted. In a mapping tasks may
            be left out, for instance regressions, whose predictions have no entropy; their task vectors still take part.
        names (`Sequence[str]`, *optional*):
            T task names in the order of `state_dicts`. By default the keys of `dataloaders`, else `"task 0"` and so on.
        num_steps (`int`, *optional*, defaults to 1000):
            Optimizer steps.
        learning_rate (`float`, *optional*, defaults to 1e-3):
            Adam's.
        initial (`float`, *optional*, defaults to 0.3):
            All coefficients at the start.
        layerwise (`bool`, *optional*, defaults to `True`):
            One coefficient per task and tensor; `False`: one per task.
        exclude (`Sequence[str]`, *optional*):
            Name patterns of parameters that stay private. Heads belong here: `["classifier.*"]`, or `["heads.*"]`.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to leave out the progress bar.

    Returns:
        [`LearnedCoefficients`]: coefficients by tensor (tied ones under every name), and the entropies. The same inputs
        give the same coefficients.

    Raises:
        `ValueError`: if numbers or names do not fit together, no parameter is shared, a DataLoader is empty, or a task
            predicts a single number.

    Cost: per step one forward and backward pass per task and T axpys over the parameters; memory T + 3 copies of them
    beside the modules.

    Example:

    ```python
    >>> import torch
    >>> from hf_atm.merging import learn_coefficients, merge_state_dicts

    >>> base, *models = (torch.nn.Linear(4, 3) for _ in range(3))
    >>> batches = {"first": [torch.randn(8, 4)], "second": [torch.randn(8, 4)]}
    >>> found = learn_coefficients(models, base, models, batches, num_steps=5, disable_tqdm=True)
    >>> merged = merge_state_dicts(models, base, "adamerging", coefficients=found.coefficients)
    ```
    """
    count = len(state_dicts)
    labels = _task_names(names, dataloaders, count)
    loaders = _loaders(dataloaders, labels)
    modules = [models] * count if isinstance(models, nn.Module) else list(models)
    if len(modules) != count:
        raise ValueError(f"Got {len(modules)} modules for {count} models; give one module, or one per model.")
    vectors = _Interpolation(modules, base, state_dicts, labels, exclude)
    coefficients = torch.full((len(vectors.keys) if layerwise else 1, count), float(initial), dtype=torch.float64)
    optimizer = torch.optim.Adam([coefficients], lr=learning_rate)
    streams = {index: _endless(loaders[index], modules[index]) for index in vectors.order if index in loaders}
    history: list[float] = []
    with evaluating(*modules), progress_bar(num_steps, "AdaMerging", disable_tqdm) as bar:
        for _ in range(num_steps):
            merged = vectors.merge(coefficients)
            total = 0.0
            for index, stream in streams.items():
                with torch.enable_grad():
                    entropy = _entropy(modules[index], merged, next(stream), labels[index])
                    entropy.backward()
                total += float(entropy.detach())
            gradient = vectors.gradient(merged)
            coefficients.grad = gradient if layerwise else gradient.sum(dim=0, keepdim=True)
            optimizer.step()
            history.append(total / len(streams))
            bar.update()
    return LearnedCoefficients(vectors.by_name(coefficients), history)


class _Interpolation:
    """Base and task vectors of the merged parameters, as functions of the coefficients."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        base: State | nn.Module,
        state_dicts: Sequence[State | nn.Module],
        labels: Sequence[str],
        exclude: Sequence[str],
    ) -> None:
        states = [_as_state(item) for item in (base, *state_dicts)]
        parameters = dict(modules[0].named_parameters())
        candidates = [parameters, *(dict(module.named_parameters()) for module in modules[1:]), *states]
        self.keys = [
            key
            for key in sorted(parameters)
            if all(key in mapping and mapping[key].shape == parameters[key].shape for mapping in candidates)
            and parameters[key].is_floating_point()
            and not any(fnmatchcase(key, pattern) for pattern in exclude)
        ]
        if not self.keys:
            raise ValueError("Modules, base and models share no parameter outside exclude; check names and prefixes.")
        self.parameters = parameters
        self.aliases = {name: parameter for name, parameter in modules[0].named_parameters(remove_duplicate=False)}
        # By name, so that sums do not depend on the order of the tasks.
        self.order = sorted(range(len(labels)), key=lambda index: labels[index])
        self.base = {key: self._float(states[0][key], key) for key in self.keys}
        self.vectors = [{key: self._float(s[key], key) - self.base[key] for key in self.keys} for s in states[1:]]

    def _float(self, tensor: Tensor, key: str) -> Tensor:
        dtype = torch.promote_types(torch.float32, self.parameters[key].dtype)
        return tensor.detach().to(self.parameters[key].device, dtype)

    def merge(self, coefficients: Tensor) -> dict[str, Tensor]:
        """The merged parameters, as leaves that collect gradients."""
        merged = {}
        for key, row in zip(self.keys, self._rows(coefficients), strict=True):
            total = self.base[key].clone()
            for index in self.order:
                total.add_(self.vectors[index][key], alpha=row[index])
            merged[key] = total.to(self.parameters[key].dtype).requires_grad_()
        return merged

    def gradient(self, merged: State) -> Tensor:
        """Gradient in the coefficients of all tensors: inner products of the tensors' gradients and task vectors."""
        products = torch.zeros(len(self.keys), len(self.vectors), dtype=torch.float64)
        for position, key in enumerate(self.keys):
            gradient = merged[key].grad
            if gradient is not None:
                for index in self.order:
                    products[position, index] = (gradient.double() * self.vectors[index][key]).sum()
        return products

    def by_name(self, coefficients: Tensor) -> dict[str, list[float]]:
        """Coefficients under every name of each merged parameter."""
        rows = dict(zip(map(id, map(self.parameters.__getitem__, self.keys)), self._rows(coefficients), strict=True))
        found = {name: rows[id(parameter)] for name, parameter in self.aliases.items() if id(parameter) in rows}
        return {name: list(found[name]) for name in sorted(found)}

    def _rows(self, coefficients: Tensor) -> list[list[float]]:
        return coefficients.detach().expand(len(self.keys), -1).tolist()


def _entropy(module: nn.Module, merged: State, batch: Any, task: str) -> Tensor:
    """Mean entropy of a batch's predictions, in nats."""
    args, kwargs = model_inputs(batch)
    if "task" in inspect.signature(module.forward).parameters:
        kwargs["task"] = task
    logits = logits_of(functional_call(module, dict(merged), args, kwargs))
    if logits.shape[-1] == 1 or problem_of(module) == "regression":
        raise ValueError(
            f"Task '{task}' predicts numbers, which have no entropy; leave it out of a mapping of dataloaders."
        )
    if problem_of(module) == "multi_label_classification":
        signs = torch.stack([logits, -logits])
        return -(signs.sigmoid() * nn.functional.logsigmoid(signs)).sum(dim=(0, -1)).mean()
    log_probabilities = logits.log_softmax(dim=-1)
    entropies = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    mask = kwargs.get("attention_mask")
    if entropies.ndim > 1 and isinstance(mask, Tensor) and mask.shape == entropies.shape:
        entropies = entropies[mask != 0]
    return entropies.mean()


def _as_state(item: State | nn.Module) -> State:
    return item.state_dict() if isinstance(item, nn.Module) else item


def _task_names(names: Sequence[str] | None, dataloaders: Any, count: int) -> list[str]:
    if names is None and isinstance(dataloaders, Mapping) and len(dataloaders) == count:
        names = list(dataloaders)
    return check_names([f"task {index}" for index in range(count)] if names is None else names, count)


def _loaders(dataloaders: Any, labels: Sequence[str]) -> dict[int, Iterable]:
    """DataLoaders by position of their task."""
    if not isinstance(dataloaders, Mapping):
        given = list(dataloaders)
        if len(given) != len(labels):
            raise ValueError(f"Got {len(given)} dataloaders for {len(labels)} models; give one per model.")
        dataloaders = dict(zip(labels, given, strict=True))
    unknown = sorted(set(dataloaders) - set(labels))
    if unknown or not dataloaders:
        raise ValueError(
            f"The dataloaders are of {listed(unknown) or 'no task'}, the models of {listed(labels)}; pass names to "
            "tell which model belongs to which task."
        )
    return {labels.index(name): loader for name, loader in dataloaders.items()}


def _endless(dataloader: Iterable, module: nn.Module) -> Iterator[Any]:
    while True:
        # Raises when there is no batch at all, so that this loop always gets somewhere.
        for batch, _ in batches(dataloader, None, device_of(module)):
            yield batch
