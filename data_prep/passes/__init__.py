"""What goes over a finished folder or index: checks, reports, statistics, features."""
