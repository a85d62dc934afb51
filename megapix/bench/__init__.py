"""`megapix bench`: how fast this machine takes a run's steps, how near its peak that is, and where the time goes."""
