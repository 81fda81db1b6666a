"""What loading and aligning cost in time and memory."""
