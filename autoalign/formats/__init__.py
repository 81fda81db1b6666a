"""Formats of checkpoints, one a file: each says from the first bytes of a file whether it is of that format."""
