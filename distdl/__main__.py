"""The console command ``distdl``, also ``python -m distdl``: ``distdl train …`` is ``python -m distdl.train …``.

To add a command, add its module to `COMMANDS`. The module defines `COMMAND` and ``main(arguments)``.
"""

import importlib
import sys
from collections.abc import Sequence

import distdl
from distdl import cli
from distdl.errors import UserError, nearest, unknown_name
from distdl.job import streams

#: Each command and its module, in the order of ``distdl --help``.
COMMANDS = {
    "train": "distdl.train_command",
    "mpirun": "distdl.mpirun",
    "verify": "distdl.verify",
    "evaluate": "distdl.evaluate",
    "predict": "distdl.predict",
    "report": "distdl.report",
    "export": "distdl.export.__main__",
    "compare": "distdl.compare",
    "replay": "distdl.replay",
    "audit": "distdl.audit",
    "search": "distdl.search.__main__",
    "bench": "distdl.bench.__main__",
    "doctor": "distdl.doctor.__main__",
}


def main() -> int:
    """Run the command that the command line names; return the exit code."""
    streams.use_utf8_names()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        return cli.run(_about, [name])
    module = importlib.import_module(COMMANDS[name])
    return cli.run(module.main, arguments, trains=module.COMMAND.trains)


def _about(arguments: Sequence[str]) -> int:
    """Print the version or the list of commands; raise `UserError` for anything else."""
    (name,) = arguments
    if name == "--version":
        sys.stdout.write(f"distdl {distdl.__version__}\n")
    elif name in {"-h", "--help"}:
        sys.stdout.write("usage: distdl COMMAND [flags]\n\n")
        for command, module in COMMANDS.items():
            sys.stdout.write(f"  {command:10}{importlib.import_module(module).COMMAND.summary}\n")
        sys.stdout.write("\ndistdl COMMAND --help explains a command. distdl --version shows the version.\n")
    elif name.startswith("-"):
        near = nearest(name, ["--help", "--version"], {})
        raise UserError(
            f"unknown flag {name}: {f'did you mean {near}?' if near else 'distdl --help lists all commands'}"
        )
    else:
        raise unknown_name("command", name, COMMANDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
