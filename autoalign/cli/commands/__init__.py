"""The commands, one a file: each adds its own parser, and imports what it needs when it runs."""
