"""Several runs: rows and seeds, their processes, tests, tables and figures; --tune."""
