"""One command: its cells, their rows."""
