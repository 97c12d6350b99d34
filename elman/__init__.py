"""elman: how far can simple nonlinear RNNs go with modern engineering?"""

__version__ = "0.1.0"
