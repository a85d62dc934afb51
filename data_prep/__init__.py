"""Preparation of data, before a run: what it reads is `megapix.shards`' contract on disk.

sources/    what shards can be made of, a kind of source each
listing/    what these share: files, tar files, captions, classes, splits, and how they are read
filters/    which samples are not wanted
writing/    from a source, or from tar files that exist, to a finished folder with an index
passes/     over a finished folder: verify, inspect, statistics, features of images and captions
options.py, cli.py    the commands
"""
