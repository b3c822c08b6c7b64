"""What the commands print: plain tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def calm_libraries() -> None:
    """Leaves the console to one progress bar and our own lines."""
    import warnings

    import datasets
    from transformers.utils import logging

    warnings.filterwarnings("ignore", message=".*'pin_memory' argument is set as true")
    warnings.filterwarnings("ignore", message=".*`is_gradient_checkpointing` is deprecated")
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def score_table(columns: Sequence[str], rows: Mapping[str, Mapping[str, float]], title: str = "") -> str:
    """Rows of scores as text, with the average over the columns at the end.

    Args:
        columns (`Sequence[str]`): Names of the columns, such as tasks.
        rows (`Mapping[str, Mapping[str, float]]`): Score by row and column; a missing one shows as a dash and leaves
            its row without an average.
        title (`str`, *optional*): Heads the first column.
    """
    names = [*columns, "average"]
    first = max(map(len, [title, *rows]))
    widths = [max(7, len(name)) for name in names]
    lines = ["  ".join([f"{title:<{first}}", *(f"{n:>{w}}" for n, w in zip(names, widths, strict=True))])]
    lines.append("-" * len(lines[0]))
    for row, scores in rows.items():
        values = [scores.get(column) for column in columns]
        known = [value for value in values if value is not None]
        values.append(sum(known) / len(known) if len(known) == len(columns) else None)
        cells = (f"{'-':>{w}}" if v is None else f"{v:>{w}.3f}" for v, w in zip(values, widths, strict=True))
        lines.append("  ".join([f"{row:<{first}}", *cells]))
    return "\n".join(lines)


def size(nbytes: float) -> str:
    """Bytes in the unit a person would choose."""
    for unit in ("bytes", "KB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
