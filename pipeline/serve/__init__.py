"""Serving an artifact: OpenAI's API over the Engine that parity and bench use too."""
