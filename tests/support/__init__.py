"""What several tests share, a job a file."""
