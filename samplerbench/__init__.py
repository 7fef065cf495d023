"""samplerbench: diffusion samplers as plugins, and steps-vs-FID tables one can believe."""

__version__ = "0.1.0"
