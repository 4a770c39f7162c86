"""Kills, faults and mutations, done for real to the real program: `python -m tests.torture`. README.md says what is covered."""
