"""The cases that the benchmarks measure on. ``gold`` holds real pairs of checkpoint and model, each with its truth."""
