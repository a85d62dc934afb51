"""`megapix train`."""

from __future__ import annotations

import json

from megapix import config, outage
from megapix.cli import config_file
from megapix.cli.parse import gives_classes, left_to_defaults, parse_run, print_usage
from megapix.dist import World, warn
from megapix.errors import InputError
from megapix.launch import machine

TRAIN_USAGE = """usage: megapix train PRESET --data.path SHARDS --out RUN [--SECTION.OPTION VALUE ...]
       megapix train [PRESET] --config FILE [--SECTION.OPTION VALUE ...]

Starts a run, or resumes from its last checkpoint: the same command does both. PRESET is one of

{presets}

  --config FILE   take the options of a YAML or JSON file (a run's config.json, or a part of one) over the preset's;
                  without a preset, over the defaults of each option
  --dry-run       check everything, print the resolved configuration, and stop
  --print-config  print the configuration as YAML that --config reads, and stop; needs neither data nor run folder

'megapix train PRESET --help' lists every option with that preset's values.
"""


def train(arguments: list[str], world: World) -> int:
    """Train a preset or a file's configuration on this rank."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return print_usage(TRAIN_USAGE, arguments)
    dry_run, shown = "--dry-run" in arguments, "--print-config" in arguments
    flags = ("--dry-run", "--print-config")
    arguments = [a for a in arguments if a not in flags and not a.startswith("--local_rank=")]
    if not arguments:
        raise InputError(f"{' '.join(flags[shown:][:1])} needs a preset or --config FILE")
    requested, given = parse_run(arguments, world), gives_classes(arguments)
    if shown:
        if world.main:
            print(config_file.as_yaml(requested), end="")
        return 0
    outage.wait_at_most(requested.data.outage_minutes)
    if dry_run:
        from megapix.train.resolve import resolve

        resolved, chosen = resolve(requested, world.size, classes_given=given), requested.machine
        if machine.gpus() or (chosen.attention, chosen.pixel_kernels, chosen.compile is True) != (
            "auto",
            "plain",
            False,
        ):
            from megapix.train.automatic import check_here  # late: torch, which no other check may need

            check_here(resolved, world)
        if world.main:
            print(json.dumps(config.to_dict(resolved.config), indent=1))
        return 0

    if world.main and (line := left_to_defaults(arguments)):
        warn(line)

    from megapix.train import loop

    loop.train(requested, world, given)
    return 0
