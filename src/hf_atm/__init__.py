"""hf-atm: multi-task models by alternating tuning and merging, in the Hugging Face ecosystem.

Names are imported on first use, so that `import hf_atm.merging` needs neither transformers nor peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy_names


__version__ = "0.1.0"

_EXPORTS = {
    "ATMArguments": "config",
    "ATMCallback": "callbacks",
    "ATMConfig": "config",
    "ATMMixin": "trainer",
    "ATMSeq2SeqTrainer": "trainer",
    "ATMTrainer": "trainer",
    "MergeReport": "merge_report",
    "MultiTaskConfig": "modeling",
    "MultiTaskModel": "modeling",
    "PrototypicalTaskHead": "prototypical",
    "RoundPlan": "schedule",
    "TaskDataset": "data",
    "list_merge_methods": "merging",
    "merge_adapters": "merging",
    "merge_checkpoints": "merging",
    "merge_state_dicts": "merging",
    "refresh_prototypes": "episodic",
    "register_merge_method": "merging",
}

__all__ = [
    "ATMArguments",
    "ATMCallback",
    "ATMConfig",
    "ATMMixin",
    "ATMSeq2SeqTrainer",
    "ATMTrainer",
    "MergeReport",
    "MultiTaskConfig",
    "MultiTaskModel",
    "PrototypicalTaskHead",
    "RoundPlan",
    "TaskDataset",
    "list_merge_methods",
    "merge_adapters",
    "merge_checkpoints",
    "merge_state_dicts",
    "refresh_prototypes",
    "register_merge_method",
]

if TYPE_CHECKING:
    from .callbacks import ATMCallback
    from .config import ATMArguments, ATMConfig
    from .data import TaskDataset
    from .episodic import refresh_prototypes
    from .merge_report import MergeReport
    from .merging import (
        list_merge_methods,
        merge_adapters,
        merge_checkpoints,
        merge_state_dicts,
        register_merge_method,
    )
    from .modeling import MultiTaskConfig, MultiTaskModel
    from .prototypical import PrototypicalTaskHead
    from .schedule import RoundPlan
    from .trainer import ATMMixin, ATMSeq2SeqTrainer, ATMTrainer


__getattr__, __dir__ = lazy_names(globals(), _EXPORTS)
