"""`megapix sample`: options.py and prompts.py (what is asked for) -> draw.py -> files.py; command.py joins them."""
