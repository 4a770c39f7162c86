"""Plain float networks, as their papers print them.

One file per family. `models.base.build` finds a network by its registered name; importing this package alone
imports nothing, so that a program can look at the folder without paying for torch.
"""
