"""Kernel B: directions, polar factors and spectra of matrices."""
