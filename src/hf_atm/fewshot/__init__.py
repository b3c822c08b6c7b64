"""Few-shot classification by metric: episodes, prototypes, task conditioning, latent MixUp."""

from __future__ import annotations

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
    "select_graphs",
    "split_graphs",
]
