"""Decode attention on a CPU, compiled by numba."""
