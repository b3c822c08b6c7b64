"""What leaves a trainer: the merged model, its card, and uploads to the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from .adapters import merged_state_dict, save_expert_adapters
from .episodic import refresh_tasks
from .hub import check_upload, push
from .lora import LoraSpace
from .model_card import write_card
from .parameters import base_model


logger = logging.get_logger(__name__)
# What only a checkpoint needs, to be resumed from.
_STATES = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "atm_state*", "complete")


class SavingMixin:
    """The part of [`ATMMixin`] that saves, describes and uploads."""

    # Attributes the host sets; declared for the type checker.
    args: Any
    atm: Any
    state: Any
    _staging: str | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the merged model, ready for `from_pretrained`, and upload it if `push_to_hub` is set.

        With an adapter and `lora_merge_mode="delta"` that is the whole model, its weights holding the merged updates;
        otherwise what the host saves. Adapters of the last round's experts go to `adapters/<task>/`.

        Args:
            output_dir (`str`, *optional*): the folder; `args.output_dir` by default.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        self.save_merged(output_dir)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def save_merged(self, output_dir: str | None = None) -> None:
        """As `save_model`, without an upload.

        Args:
            output_dir (`str`, *optional*): the folder; `args.output_dir` by default.
        """
        host: Any = self
        output_dir = self.args.output_dir if output_dir is None else output_dir
        refresh_tasks(self)
        space = self.atm.rounds.space
        if isinstance(space, LoraSpace) and space.mode == "delta":
            # The host saves the plain model inside the adapter, under the names it has without one.
            wrapped, host.model = host.model, base_model(host.model)
            try:
                host._save(output_dir, state_dict=merged_state_dict(wrapped, space))
            finally:
                host.model = wrapped
        else:
            super().save_model(output_dir, _internal_call=True)  # type: ignore[misc]
        if isinstance(space, LoraSpace) and self.args.should_save:
            save_expert_adapters(host.model, self.atm.rounds, output_dir, self.args.hub_model_id or output_dir)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with _without_token(self.args):
            super()._save(*args, **kwargs)  # type: ignore[misc]

    # ---- The card ----

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card: the host's metadata, and what the run's report, pictures and saved model say.

        Args:
            args, kwargs: the host's. Before a round has ended or the model was saved the card is the host's own.
        """
        host: Any = self
        tags = kwargs.get("tags") or []
        kwargs["tags"] = [*([tags] if isinstance(tags, str) else tags), "atm", "model-merging"]
        # The host's card reads the model's configuration, which a module of one's own need not have.
        configured = hasattr(host.model, "config")
        if configured:
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        # Some hosts write a card with every checkpoint; pictures can wait for the end.
        if self._staging is not None or not host.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        known: Any = ModelCard.load(folder / "README.md").data if configured else kwargs
        try:
            write_card(
                folder,
                name=kwargs.get("model_name"),
                repository=host.hub_model_id or self.args.hub_model_id,
                license=known.get("license"),
                language=known.get("language"),
                tags=known.get("tags") or (),
            )
        except (FileNotFoundError, ValueError) as error:
            missing = "is the Trainer's own, without results of the rounds" if configured else "could not be written"
            logger.warning_once(f"The model card {missing}: {error}")

    # ---- The Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository of `hub_model_id`; private unless `private` or `hub_private_repo` is `False`.

        Args:
            token (`str`, *optional*): replaces `hub_token`.
            private (`bool`, *optional*): replaces `hub_private_repo`.

        Raises:
            ValueError: for an id that is none, or in another's namespace.
            OSError: when the Hub cannot be reached, or does not accept the token.
        """
        host: Any = self
        if not host.is_world_process_zero():
            return
        token = self.args.hub_token if token is None else token
        private = self.args.hub_private_repo if private is None else private
        check_upload(self.args.hub_model_id or Path(self.args.output_dir).absolute().name, token)
        super().init_hf_repo(token=token, private=True if private is None else private)  # type: ignore[misc]

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the merged model and its card, and upload `output_dir` in one commit, checkpoints left out.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): what the history says.
            blocking (`bool`, *optional*, defaults to `True`): wait for the upload.
            token (`str`, *optional*): replaces `hub_token`.
            revision (`str`, *optional*): branch, made if it does not exist; `hub_revision` by default.
            private (`bool`, *optional*): as in `init_hf_repo`.
            kwargs: for `create_model_card`.

        Returns:
            `CommitInfo`, or a future of it without `blocking`; `None` on other processes than the first.

        Raises:
            OSError: if the upload failed; says what is on the Hub by then.
        """
        host: Any = self
        host.callback_handler.on_push_begin(self.args, self.state, host.control)
        token = self.args.hub_token if token is None else token
        if host.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_merged()
        if not host.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        kwargs["tags"] = [
            *([tags] if isinstance(tags, str) else tags),
            *(getattr(host.model, "model_tags", None) or []),
        ]
        kwargs.setdefault("model_name", host.hub_model_id.split("/")[-1])
        self.create_model_card(**kwargs)
        host._finish_current_push()
        upload = partial(
            push,
            self.args.output_dir,
            host.hub_model_id,
            token=token,
            revision=self.args.hub_revision if revision is None else revision,
            commit_message=commit_message or "End of training",
        )
        return upload() if blocking else HfApi().run_as_future(upload)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint's model, and with `hub_strategy` the checkpoint, while training goes on."""
        host: Any = self
        strategy = self.args.hub_strategy
        # `_save_checkpoint` asks again once the checkpoint has its final name.
        if self._staging is not None or not host.is_world_process_zero() or strategy == HubStrategy.END:
            return
        busy = host.push_in_progress is not None and not host.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        host.callback_handler.on_push_begin(self.args, self.state, host.control)
        upload = partial(
            push,
            checkpoint_folder,
            host.hub_model_id,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
        )
        api = HfApi()
        jobs = [api.run_as_future(upload, leave_out=_STATES)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = strategy == HubStrategy.CHECKPOINT
            jobs.append(
                api.run_as_future(
                    upload, path_in_repo="last-checkpoint" if last else os.path.basename(checkpoint_folder)
                )
            )
        for job in jobs:
            job.add_done_callback(_tell)
        if busy:
            host.push_in_progress.jobs.extend(jobs)
        else:
            host.push_in_progress = PushInProgress(jobs)


def _tell(job: Future) -> None:
    """What went wrong with an upload that nobody waits for."""
    if not job.cancelled() and job.exception() is not None:
        logger.warning(str(job.exception()))


@contextmanager
def _without_token(args: Any) -> Iterator[None]:
    """The host pickles its arguments beside the model; a token has no place there."""
    token, args.hub_token = args.hub_token, None
    try:
        yield
    finally:
        args.hub_token = token
