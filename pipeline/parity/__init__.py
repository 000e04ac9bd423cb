"""Parity: how far an engine is from the original checkpoint, in numbers, and whether that is near enough."""
