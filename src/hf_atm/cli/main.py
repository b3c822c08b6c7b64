"""`hf-atm`: the command line's front door. Only the standard library is imported before a command runs."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from .parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments, without the program's name; the process's own by default.

    Returns:
        `int`: 0 on success, 1 when a run failed, 2 for a wrong input, 130 when interrupted.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in ("train", "compare", "refine", "fewshot"):
        parser.error(f"unknown argument: {rest[0]}")
    debug, quiet = getattr(args, "debug", False), getattr(args, "quiet", False)
    # Set before transformers and tokenizers are imported, which read them once.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if args.command == "demo":
            from .demo import run_demo

            return run_demo(args.output, seed=args.seed, rounds=args.rounds, steps=args.steps, quiet=quiet)
        if args.command == "merge":
            from .merge import merge

            return merge(args.recipe, args.output, args, quiet=quiet)
        if args.command == "inspect":
            from .inspect import inspect

            return inspect(args.base, args.models, args.names, args.level, args.exclude, args.output, quiet)
        if args.command == "card":
            from .card import card

            return card(args.run, args, quiet)
        if args.command == "align":
            from .align import align_models

            return align_models(args.models, args, quiet)
        if args.command == "landscape":
            from .landscape import landscape

            return landscape(args.run, args.config, args, quiet)
        if args.command == "latent":
            from .latent import latent

            return latent(args.config, args.output, quiet)
        if args.command == "push":
            from .push import push_folder

            return push_folder(args.folder, args.repository, args, quiet)
        if args.command == "compare":
            from .compare import compare

            return compare(args.config, rest, args.members, args.seeds, args.steps, quiet=quiet)
        if args.command == "refine":
            from .refine import refine

            return refine(args.model, args.config, rest, args.data, args.share, args.holdout, args.heads, quiet=quiet)
        if args.command == "fewshot":
            from .fewshot import few_shot

            return few_shot(args.config, rest, quiet=quiet)
        from . import commands

        if args.command == "train":
            return commands.train(args.config, rest, quiet=quiet)
        return commands.evaluate(args.model, args.config, args.split, args.tasks, args.batch_size, args.output, quiet)
    except KeyboardInterrupt:
        print("hf-atm: interrupted", file=sys.stderr)
        return 130
    except (ValueError, KeyError, OSError, ImportError) as error:
        if debug:
            traceback.print_exc()
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"hf-atm: error: {' '.join(str(message).split())}", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            traceback.print_exc()
        reason = " ".join(str(error).split())
        print(f"hf-atm: {type(error).__name__}: {reason} (--debug shows where)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
