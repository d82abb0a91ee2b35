"""Studies: programs that train, measure, and write the results pages from the recorded rows."""
