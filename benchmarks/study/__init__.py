"""The published study of optimality against speed: ``python -m benchmarks.study``, or ``make study``."""
