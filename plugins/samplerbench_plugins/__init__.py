"""The built-in samplers, guidances and spacings. The core finds them only through their entry points."""
