"""One output made by many processes, on as many machines, that share nothing but its folder."""
