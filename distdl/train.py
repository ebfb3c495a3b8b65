"""Train: ``python -m distdl.train``, or ``mpirun -n 4 python -m distdl.train``; ``--help`` lists all flags.

`distdl/train_command.py` is the command. Its module has another name than this file because `distdl.train` is the
function that a script calls. ``import distdl.train`` would replace that function by this module, so this module puts
the function in its own place.
"""

import sys

from distdl import cli, train_command

if __name__ == "__main__":
    sys.exit(cli.run(train_command.main, trains=train_command.COMMAND.trains))

from distdl.library import train

# An import binds the object that it finds here.
sys.modules[__name__] = train  # type: ignore[assignment]
