"""Trainers of the demo and helpers to launch them."""

PROGRESS = "adaptra-progress"
"""First word of the lines that a trainer prints after each iteration: done, loss, ms."""
