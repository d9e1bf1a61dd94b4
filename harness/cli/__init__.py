"""The command line: flags, their checks, `--help`, `--list`, and users' own files."""
