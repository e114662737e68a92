"""Command line options that `run` and `pair` share."""

import argparse
import os
from pathlib import Path

from rxe_lab.vm import LabError, Settings, parse_size

# Where root's programs are, such as tc; a user's PATH may lack them.
ROOT_PATH = ["/usr/sbin", "/sbin"]
# Always passed on; other variables need --env.
DEFAULT_ENVIRONMENT = ["PATH", "HOME", "USER", "LANG", "TERM"]


class Parser(argparse.ArgumentParser):
    """A parser whose complaints end in the lab's own exit code, not one of a command."""

    def error(self, message):
        raise LabError(f"{message}; see --help")


def parser(usage, description, epilog):
    """An argument parser with the common options."""
    made = Parser(
        usage=f"rxe-lab {usage}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--cpus", type=int, default=2, metavar="N", help="vCPUs of a VM (2)")
    add("--memory", default="4G", metavar="SIZE", help="memory of a VM (4G)")
    add("--timeout", type=float, default=600, metavar="SECONDS", help="then the exit code is 124 (600)")
    add("--attempts", type=int, default=1, metavar="N", help="run again when the lab failed, N times in all (1)")
    add("--mtu", type=int, default=9000, metavar="BYTES", help="of the link; 1500 gives RDMA MTU 1024 (9000)")
    add("--memlock", default="unlimited", metavar="SIZE", help="ulimit -l, also for root (unlimited)")
    add("--env", action="append", default=[], metavar="NAME[=VALUE]", help="set or pass on a variable")
    add("--rw", action="append", default=[], metavar="DIR", help="directory that the VM may write, same path inside")
    add("--load", action="append", default=[], metavar="MODULE", help="load a further kernel module")
    add(
        "--low-guests",
        dest="guests",
        action="store_const",
        const="low",
        default="",
        help="nested guests stay in the lower half of the address space (Linux does not), never triple-fault, and are never "
        "refused by VMRUN; if the command fails and one of these was seen, it was the emulator's fault, and the exit "
        "code is 125",
    )
    add(
        "--linux-guests",
        dest="guests",
        action="store_const",
        const="linux",
        help="the same for nested guests that are Linux: they never run at the address of this VM's own VMRUN, never "
        "triple-fault, and are never refused by VMRUN",
    )
    add("--logs", metavar="DIR", help="keep console.log (kernel messages) and qemu.log there")
    add("-v", "--verbose", action="store_true", help="say when the command starts")
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help=argparse.SUPPRESS)
    return made


def settings(options):
    """Checked settings from parsed options."""
    environment = {"PATH": os.defpath}
    environment |= {name: os.environ[name] for name in DEFAULT_ENVIRONMENT if name in os.environ}
    for item in options.env:
        name, equals, value = item.partition("=")
        if not name.isidentifier():
            raise LabError(f"--env {item!r}: {name!r} is no name of a variable")
        if equals:
            environment[name] = value
        elif name in os.environ:
            environment[name] = os.environ[name]
    # The command is root, also if we are not.
    environment["PATH"] += "".join(f":{place}" for place in ROOT_PATH if place not in environment["PATH"].split(":"))
    if options.memlock != "unlimited":
        parse_size(options.memlock)
    parse_size(options.memory)
    return Settings(
        cpus=options.cpus,
        memory=options.memory,
        mtu=options.mtu,
        memlock=options.memlock,
        environment=environment,
        writable=[writable_directory("--rw", name) for name in options.rw],
        modules=options.load,
        logs=writable_directory("--logs", options.logs) if options.logs else None,
        guests=options.guests,
        verbose=options.verbose,
    )


def writable_directory(option, name):
    """The real path of an existing directory that we may write."""
    path = Path(name).resolve()
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise LabError(f"{option} {name}: not a directory that can be written")
    return path


def command(words):
    """The words after the separating `--`."""
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        raise LabError("no command; see --help")
    return words
