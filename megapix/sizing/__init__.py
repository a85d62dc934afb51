"""`megapix plan`: memory, speed and checkpoint interval of a run, predicted before it takes a GPU."""
