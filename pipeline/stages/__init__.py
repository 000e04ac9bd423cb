"""What targets share: one stage a file, each a function that fills one directory."""
