"""Weights out of checkpoints and files, and into files, on one process and without DeepSpeed.

An exported file is one safetensors file of the EMA or the raw weights, with the configuration in its metadata under the
key "megapix". Imported weights are such a file in a folder, in the dtypes that they came in:

FOLDER/model.safetensors    the exported file
FOLDER/config.json          model, image size and sampling again, to read and for `train --config`

REPA's projector, which only training needs, stays in the checkpoint.
"""
