"""Triton kernels and their launchers; imported at the first call that uses one (ops/gpu.py says whether it can be)."""
