"""The one optional dependency."""

from __future__ import annotations

from typing import Any


def torch_geometric() -> Any:
    """The module `torch_geometric.nn`.

    Raises:
        ImportError: In one sentence that names the extra.
    """
    try:
        import torch_geometric.nn
    except ImportError as error:
        raise ImportError("graphs need torch_geometric; install it with pip install 'hf-atm[graphs]'") from error
    return torch_geometric.nn
