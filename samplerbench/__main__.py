"""`python -m samplerbench` is the command `samplerbench` (so that `accelerate launch -m` finds it)."""

from samplerbench.cli import main

if __name__ == "__main__":
    main()
