"""Raw bytes from disk: packing, splitting, sampling. Nothing in here knows of models."""
