"""Kernels compiled ahead of time: registers and spills against baselines."""
