"""What others load: pipelines, and a run's weights in the forms of the programs around it.

`load` makes a pipeline of a run, a checkpoint, a file or a folder; `comfyui` and `diffusers` write what ComfyUI and
diffusers' ports take; `bundle` makes the one file with which an exported folder samples without this program.
"""
