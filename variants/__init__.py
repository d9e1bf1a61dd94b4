"""What only a flag reaches: a module a subject, each imported when a row of federated_learning.py's tables is used."""
