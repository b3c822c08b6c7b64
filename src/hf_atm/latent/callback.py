"""How the merged model's space lies to those of its experts, round by round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..callbacks import ATMCallback
from ..checkpoint import write_json
from ..seeding import isolated_rng
from .anchors import select_anchors
from .extraction import extract_embeddings
from .ids import positions
from .metrics import linear_cka
from .relative import RelativeProjector
from .spaces import EmbeddingSet


REPORT_NAME = "latent_spaces.json"


class LatentSpaceCallback(ATMCallback):
    """
    Measures, in every round, how alike the merged model's space is to the mean of its experts' relative spaces.

    A merge that keeps this high and yet loses accuracy has a problem in its heads, not in its space. Each expert is run
    over the data once a round, the merged model once, and the first model before all; no weight and no random number of the run is touched. Works
    on the main process, which must hold the whole model.

    Args:
        dataloader (`DataLoader`):
            Samples, see [`extract_embeddings`]; in a fixed order, or with ids.
        anchors (`Sequence` or `int`, *optional*, defaults to 256):
            Ids of the anchors, or how many to choose at random, at most half of the samples. Spaces are compared on the
            other samples.
        reference ([`EmbeddingSet`] or encoder, *optional*):
            A space to compare with as well, such as that of a jointly trained model: its embeddings of the same samples,
            or an encoder for the same data loader.
        encoder (`Callable`, *optional*):
            From the model in training to what is run, such as `lambda model: model.body`; by default the model itself,
            of a [`MultiTaskModel`] the backbone.
        pooling, layer:
            See [`extract_embeddings`].
        seed (`int`, *optional*, defaults to 0):
            Decides anchors that are chosen.

    Attributes:
        history (`list[dict]`): one record per finished round, also written to `latent_spaces.json` in the run's
            `output_dir`: `round`; `experts`, CKA of the merged space to the mean of the experts' relative spaces;
            `experts_absolute`, the same of plain embeddings, the baseline for experts of one base; `reference`, CKA to
            the reference's relative space. `None` where there is no reference, or a round was resumed inside and its
            earlier experts were not seen.
    """

    def __init__(
        self,
        dataloader: Any,
        anchors: Any = 256,
        reference: Any = None,
        encoder: Callable[[Any], Any] | None = None,
        pooling: Any = "auto",
        layer: int = -1,
        seed: int = 0,
    ) -> None:
        self.dataloader, self.reference = dataloader, reference
        self.anchors: Any = anchors if isinstance(anchors, int) else RelativeProjector(anchors).anchors
        if isinstance(anchors, int) and anchors < 2:
            raise ValueError(f"anchors is {anchors}; relative coordinates need at least two.")
        self.encoder, self.pooling, self.layer, self.seed = encoder, pooling, layer, seed
        self.history: list[dict[str, Any]] = []
        self._ids: Any = None
        self._forget()

    def _forget(self) -> None:
        self._seen: set[str] = set()
        self._relative: Tensor | float = 0.0
        self._absolute: Tensor | float = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._forget()
        self._ids = None
        self.history = []
        path = Path(args.output_dir, REPORT_NAME)
        if state.global_step and path.is_file():
            self.history = json.loads(path.read_text(encoding="utf-8"))
        if not state.is_world_process_zero:
            return
        # Whatever does not fit is found now, not after a round of tuning.
        space = self._embed(kwargs["model"], "start")
        self._project(space)
        if self.reference is not None:
            if not isinstance(self.reference, EmbeddingSet):
                self.reference = self._extract(self.reference, "reference")
            self.reference = self.reference.select(space.ids)
            self._project(self.reference)

    def on_round_begin(self, args, state, control, *, round, **kwargs):
        self._forget()

    def on_task_end(self, args, state, control, *, round, task, task_vector_norm, **kwargs):
        if state.is_world_process_zero:
            space = self._embed(kwargs["model"], task)
            # Sums, since CKA knows no scale.
            self._relative = self._relative + self._project(space).double()
            self._absolute = self._absolute + space.embeddings.double()
            self._seen.add(task)

    def on_round_end(self, args, state, control, *, round, report, **kwargs):
        if not state.is_world_process_zero:
            return
        merged = self._embed(kwargs["model"], "merged")
        relative = self._project(merged)
        rows = torch.from_numpy(positions(self.anchors, merged.ids) < 0)
        record: dict[str, Any] = {"round": round, "experts": None, "experts_absolute": None, "reference": None}
        if self._seen == set(report.tasks):
            assert isinstance(self._relative, Tensor) and isinstance(self._absolute, Tensor)
            record["experts"] = linear_cka(relative[rows], self._relative[rows])
            record["experts_absolute"] = linear_cka(merged.embeddings[rows], self._absolute[rows])
        if self.reference is not None:
            reference = self._project(self.reference)
            record["reference"] = linear_cka(relative[rows], reference[rows])
        self._forget()
        self.history = [entry for entry in self.history if entry["round"] < round] + [record]
        write_json(Path(args.output_dir, REPORT_NAME), self.history)

    def _embed(self, model: Any, name: str) -> EmbeddingSet:
        space = self._extract(model if self.encoder is None else self.encoder(model), name)
        # Rows are summed over experts, whatever order the data came in.
        space = space.select(np.sort(space.ids) if self._ids is None else self._ids)
        self._ids = space.ids
        if isinstance(self.anchors, int):
            # Others must be left to compare on.
            count = min(self.anchors, len(space) // 2)
            self.anchors = np.array(select_anchors([space], count, seed=self.seed))
        return space

    def _extract(self, encoder: Any, name: str) -> EmbeddingSet:
        # A data loader draws a seed even when it does not shuffle.
        with isolated_rng():
            return extract_embeddings(encoder, self.dataloader, self.pooling, self.layer, task=name, progress=False)

    def _project(self, space: EmbeddingSet) -> Tensor:
        return RelativeProjector(self.anchors).fit(space).transform(space.embeddings)
