"""Lists of samples: packed in a file while a command is at work, and those of tar files kept for the next one."""
