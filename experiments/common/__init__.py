"""What all studies share: rows of results, tables, and one form of program."""
