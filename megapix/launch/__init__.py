"""`megapix launch`, which launch.sh calls: starts ranks on this machine, on several nodes, or as one task of srun.

`command.launch` puts the parts together. Nothing here loads torch.
"""
