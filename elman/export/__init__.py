"""Trained models for other libraries, in folders that need no elman to be read."""
