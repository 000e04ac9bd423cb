"""Artifacts: a directory that its runtime serves as it is, plus a manifest that says what is in it."""
