"""Tasks: from a data set's name and columns to what the Trainer and a head need.

[`load_task`] reads the splits of a Hub data set or a local folder, finds text, image and label columns and derives the
head from the label's type. [`prepare_text`], [`prepare_images`] and [`prepare_causal_lm`] then turn the columns into
model inputs. Nothing depends on the process: the same specification and seed give the same examples.
"""

from __future__ import annotations

from .loading import TaskData, TaskSpec, load_task
from .preparing import make_image_processor, prepare_causal_lm, prepare_images, prepare_text


__all__ = [
    "TaskData",
    "TaskSpec",
    "load_task",
    "make_image_processor",
    "prepare_causal_lm",
    "prepare_images",
    "prepare_text",
]
