"""The part of elman that an exported model needs."""
