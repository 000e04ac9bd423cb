"""Enginewright: one recipe in, one proved, servable engine out for each place it has to run."""

__version__ = "0.1.0"
