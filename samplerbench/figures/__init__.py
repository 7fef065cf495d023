"""The figures of the lectures: images along the steps, the trajectory, between two starts, under guidance and noise."""
