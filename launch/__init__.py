"""Trainers of the demo and helpers to launch them."""
