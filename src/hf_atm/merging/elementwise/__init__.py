"""Kernel A: masks, signs and weighted sums, over pieces of a tensor that fit the cache."""
