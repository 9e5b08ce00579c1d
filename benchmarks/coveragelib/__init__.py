"""What `benchmarks/coverage.py` is made of: the models, what others say of them, the checks."""
