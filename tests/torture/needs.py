"""What a level needs from the machine; where it is missing, the level is skipped, and says so."""

import os
import shutil
import subprocess


class Skipped(Exception):
    """This machine lacks what a level needs; says what."""


def need(*programs: str, root: bool = False) -> None:
    """Raise Skipped where a program is not installed, or where only root may do it."""
    for program in programs:
        if shutil.which(program) is None:
            raise Skipped(f"{program} is not installed")
    if root and os.geteuid() != 0:
        raise Skipped("needs root: it mounts file systems")


def shell(command: str) -> str:
    """The output of a command; raises Skipped with its last words where the machine refuses it."""
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skipped(f"{command!r}: {done.stderr.strip()[-200:]}")
    return done.stdout
