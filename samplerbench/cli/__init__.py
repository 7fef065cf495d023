"""The command line: parse, call, print. Importing it imports neither torch nor diffusers."""

from samplerbench.cli.app import main

__all__ = ["main"]
