"""Figures for teaching: steps, trajectory, interpolation, guidance and the forward process."""
