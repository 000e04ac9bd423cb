"""The comparison table, made from what was measured: quality, speed and size of artifacts, and what each can do."""
