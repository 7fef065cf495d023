"""The built-in samplers, guidances and spacings: one short file each, found only through their entry points."""
