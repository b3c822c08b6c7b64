"""Aggregates five spaces of 50 000 embeddings over 256 anchors; prints seconds and peak memory of a process of its own.

    python benchmarks/latent/speed.py
    python benchmarks/latent/speed.py --routing knn --disjoint

Every space holds every sample, which is the most work, unless `--disjoint` splits the samples among them.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from hf_atm.latent import EmbeddingSet, aggregate_latent_spaces, linear_cka


def make_sets(samples: int, spaces: int, width: int, anchors: int, disjoint: bool) -> list[EmbeddingSet]:
    """Random spaces over common samples; each space owns its share of them, beside the anchors, which nobody owns."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.arange(samples)
    sets = []
    for index in range(spaces):
        mine = (numbers >= anchors) & (numbers % spaces == index)
        kept = (mine | (numbers < anchors)) if disjoint else numbers >= 0
        rows = torch.randn(int(kept.sum()), width, generator=generator)
        labels = numbers // (10 * spaces) % 10
        # A tenth of its own samples is known to belong to the space; the others would have to be routed.
        own = mine & (numbers // spaces % 10 == 0)
        sets.append(EmbeddingSet(f"space{index}", numbers[kept], rows, labels[kept], own[kept]))
    return sets


def peak() -> float:
    """Largest resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--spaces", type=int, default=5)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--anchors", type=int, default=256)
    parser.add_argument("--routing", default="average")
    parser.add_argument("--disjoint", action="store_true")
    options = parser.parse_args()

    sets = make_sets(options.samples, options.spaces, options.width, options.anchors, options.disjoint)
    anchors = range(options.anchors)
    before, started = peak(), time.perf_counter()
    space = aggregate_latent_spaces(sets, anchors, routing=options.routing)
    seconds, after = time.perf_counter() - started, peak()
    matrix = space.embeddings.nbytes / 2**20
    print(f"{options.spaces} spaces, {len(space)} rows, {options.anchors} anchors, routing {options.routing}:")
    print(f"{seconds:.2f} s on {torch.get_num_threads()} threads")
    print(f"{after - before:.0f} MiB beyond the {before:.0f} MiB that hold the spaces; the result is {matrix:.0f} MiB")
    started = time.perf_counter()
    value = linear_cka(space.embeddings, sets[0].select(space.ids).embeddings) if not options.disjoint else None
    if value is not None:
        print(f"CKA with the first space {value:.4f}, {time.perf_counter() - started:.2f} s")
