"""The command `rxe-lab`: finds what its first word asks for."""

import os
import sys

from rxe_lab import __version__, doctor, pair, run
from rxe_lab.supervise import guarded
from rxe_lab.vm import HERE, LabError

USAGE = """\
usage: rxe-lab COMMAND

RDMA devices for any command, on a machine that has none: soft-RoCE in a throw-away VM.

  run [options] -- COMMAND...                   runs a command in a VM with two joined devices
  pair [options] -- COMMAND_A... :: COMMAND_B...  runs two commands in two joined VMs
  setup [--refresh] [PACKAGE...]                prepares this machine; installs packages if it is root
  doctor                                        says what is there, what is missing, and what to do
  selftest                                      checks all that the lab promises, in about two minutes
  --version                                     prints the version

`rxe-lab run --help` and `rxe-lab pair --help` list the options.
"""


def script(name):
    """Becomes one of the package's shell scripts. It need not be executable, as wheels are unpacked in many ways."""

    def become(arguments):
        sys.stdout.flush()
        # The selftest starts the lab with this interpreter.
        environment = os.environ | {"RXE_LAB_PYTHON": sys.executable or "python3"}
        os.execvpe("bash", ["bash", str(HERE / name), *arguments], environment)

    return become


COMMANDS = {
    "run": run.main,
    "pair": pair.main,
    "setup": script("setup"),
    "doctor": doctor.main,
    "selftest": script("selftest"),
}


def dispatch(words):
    """Carries out the command line `words`; returns the exit code."""
    match words:
        case ["--version" | "-V", *_]:
            print(f"rxe-lab {__version__}")
            return 0
        case ["--help" | "-h" | "help", *_]:
            print(USAGE, end="")
            return 0
        case [name, *arguments] if name in COMMANDS:
            return COMMANDS[name](arguments)
        case [name, *_]:
            raise LabError(f"no command {name!r}; see rxe-lab --help")
    raise LabError(f"no command\n{USAGE}")


def main(words=None):
    """The entry point. `words` is the command line; by default, this process's own."""
    guarded(lambda: dispatch(sys.argv[1:] if words is None else words))
