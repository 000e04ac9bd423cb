"""The Hugging Face hub: what a revision holds, and its files."""
