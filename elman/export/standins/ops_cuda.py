"""Kernels of our own are no part of an export."""
