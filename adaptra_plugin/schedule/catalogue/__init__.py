"""Schedules that are built by a rule, one algorithm a file."""
