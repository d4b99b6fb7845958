"""Kernels on the GPU they are for: right, free of races, and how near to what the card can do. One command, run.py."""
