"""`megapix train`."""

from __future__ import annotations

import json

from megapix import config, outage
from megapix.cli.parse import gives_classes, parse_run, print_usage
from megapix.dist import World

TRAIN_USAGE = """usage: megapix train PRESET --data.path SHARDS --out RUN [--SECTION.OPTION VALUE ...]
       megapix train --config FILE [--SECTION.OPTION VALUE ...]

Starts a run, or resumes from its last checkpoint: the same command does both. PRESET is one of

{presets}

  --config FILE   take a JSON file's options (a run's config.json, or a part of one) over the defaults of xl-256
  --dry-run       check everything, print the resolved configuration, and stop

'megapix train PRESET --help' lists every option with that preset's values.
"""


def train(arguments: list[str], world: World) -> int:
    """Train a preset or a file's configuration on this rank."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return print_usage(TRAIN_USAGE, arguments)
    dry_run = "--dry-run" in arguments
    arguments = [a for a in arguments if a != "--dry-run" and not a.startswith("--local_rank=")]
    requested, given = parse_run(arguments, world), gives_classes(arguments)
    outage.wait_at_most(requested.data.outage_minutes)
    if dry_run:
        from megapix.train.resolve import resolve

        resolved = resolve(requested, world.size, classes_given=given).config
        if world.main:
            print(json.dumps(config.to_dict(resolved), indent=1))
        return 0

    from megapix.train import loop

    loop.train(requested, world, given)
    return 0
