"""What alignment costs and how often it is right: ``python -m benchmarks``."""
