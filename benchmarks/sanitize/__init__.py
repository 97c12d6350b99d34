"""compute-sanitizer on every family of kernels: ``python -m benchmarks.sanitize``, see ``__main__.py``."""
