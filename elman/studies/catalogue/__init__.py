"""The studies that ship with elman, a file each; ``elman study list`` tells their questions."""
