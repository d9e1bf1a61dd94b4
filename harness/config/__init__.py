"""What follows from the values of flags: notices, refusals, and values in use."""
