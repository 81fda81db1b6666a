"""The figures as tables and pictures."""
