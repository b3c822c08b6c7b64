"""Few-shot classification by metric: episodes, prototypes, task conditioning, latent MixUp.

Names are imported on first use, so that heads and episodes need neither scikit-learn nor a Trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .baselines import finetune_baseline, probe_episodes
    from .collating import EpisodeCollator, collate_rows
    from .conditioning import TaskConditioning
    from .descriptors import node_statistics
    from .encoders import EpisodeEncoder, PooledEncoder
    from .episodes import Episode, EpisodeSampler, check_class_split, labels_of
    from .evaluation import accuracy_interval, evaluate_episodes
    from .gin import GINEncoder
    from .graph_sets import GraphSet, load_graph_set, load_tu_dataset, split_graphs
    from .graphs import GraphDataset, NodeFeatures, select_graphs
    from .heads import MatchingHead, PrototypicalHead, class_means, prototype_logits
    from .mixup import latent_mixup_loss, mixup_masks
    from .model import FewShotModel, FewShotModelConfig, FewShotOutput
    from .settings import FewShotConfig
    from .trainer import FewShotTrainer
    from .walks import return_probabilities


_EXPORTS = {
    "Episode": "episodes",
    "EpisodeCollator": "collating",
    "EpisodeEncoder": "encoders",
    "EpisodeSampler": "episodes",
    "FewShotConfig": "settings",
    "FewShotModel": "model",
    "FewShotModelConfig": "model",
    "FewShotOutput": "model",
    "FewShotTrainer": "trainer",
    "GINEncoder": "gin",
    "GraphDataset": "graphs",
    "GraphSet": "graph_sets",
    "MatchingHead": "heads",
    "NodeFeatures": "graphs",
    "PooledEncoder": "encoders",
    "PrototypicalHead": "heads",
    "TaskConditioning": "conditioning",
    "accuracy_interval": "evaluation",
    "check_class_split": "episodes",
    "class_means": "heads",
    "collate_rows": "collating",
    "evaluate_episodes": "evaluation",
    "finetune_baseline": "baselines",
    "labels_of": "episodes",
    "latent_mixup_loss": "mixup",
    "load_graph_set": "graph_sets",
    "load_tu_dataset": "graph_sets",
    "mixup_masks": "mixup",
    "node_statistics": "descriptors",
    "probe_episodes": "baselines",
    "prototype_logits": "heads",
    "return_probabilities": "walks",
    "select_graphs": "graphs",
    "split_graphs": "graph_sets",
}


__getattr__, __dir__ = lazy_names(globals(), _EXPORTS)


__all__ = [
    "Episode",
    "EpisodeCollator",
    "EpisodeEncoder",
    "EpisodeSampler",
    "FewShotConfig",
    "FewShotModel",
    "FewShotModelConfig",
    "FewShotOutput",
    "FewShotTrainer",
    "GINEncoder",
    "GraphDataset",
    "GraphSet",
    "MatchingHead",
    "NodeFeatures",
    "PooledEncoder",
    "PrototypicalHead",
    "TaskConditioning",
    "accuracy_interval",
    "check_class_split",
    "class_means",
    "collate_rows",
    "evaluate_episodes",
    "finetune_baseline",
    "labels_of",
    "latent_mixup_loss",
    "load_graph_set",
    "load_tu_dataset",
    "mixup_masks",
    "node_statistics",
    "probe_episodes",
    "prototype_logits",
    "return_probabilities",
    "select_graphs",
    "split_graphs",
]
