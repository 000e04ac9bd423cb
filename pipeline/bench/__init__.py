"""Speed of artifacts, measured: each in a process of its own, turn by turn, beside what the machine's memory allows."""
