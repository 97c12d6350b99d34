"""Runs: the loop, its optimiser, checkpoints and run folders."""
