"""Training of the networks that the benchmark samples from, is guided by and measures with."""
