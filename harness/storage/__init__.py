"""A run's folder: what is saved in it, read from it, and which program made it."""
