"""--mode=prepare: download a data set and write it as it is read."""

from resattn_jax.cli import Command
from resattn_jax.data.sources import prepare


def run(command: Command) -> None:
    """Prints where the set lies. Raises UsageError when it cannot be had."""
    print(prepare(command.config.data.name, command.config.data.dir))
