"""What run folders say: a table of runs, the difference of two, and a run as one page. Imports no torch."""
