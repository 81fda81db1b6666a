"""Formats that are written, one module for each."""
