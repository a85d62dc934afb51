"""`megapix bench`: how fast this machine takes the steps of a run, how near its limit that is, and where time goes."""
