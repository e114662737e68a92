"""Runs two commands in two joined throw-away VMs, each with an RDMA device on the link."""

import dataclasses
import socket
import sys
from pathlib import Path

from rxe_lab import options
from rxe_lab.supervise import LAB_FAILED, Run, attempts
from rxe_lab.vm import LabError, Node

SEPARATOR = "::"
EPILOG = """\
VM a is 10.77.0.1, VM b is 10.77.0.2, each with one RDMA device rxe0 on lab0; both commands
start when both VMs are up. LAB_NODE is a or b; LAB_ADDR and LAB_PEER are the addresses.
Every line of output begins with `a| ` or `b| `, or goes to files under --out.
Exit code: a's if it is not 0, else b's (with --leader, that one's); 124 out of time; 125
the lab failed.
"""


class Prefixed:
    """Writes whole lines of both VMs, marked with the name of the VM."""

    def __init__(self):
        self.rest = {}
        self.files = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}

    def __call__(self, node, stream, data):
        *lines, self.rest[node, stream] = (self.rest.get((node, stream), b"") + data).split(b"\n")
        for line in lines:
            self._write(node, stream, line)

    def _write(self, node, stream, line):
        self.files[stream].write(node.encode() + b"| " + line + b"\n")
        self.files[stream].flush()

    def close(self, _codes=None):
        """Writes what did not end in a newline."""
        for (node, stream), line in self.rest.items():
            if line:
                self._write(node, stream, line)
        self.rest.clear()


class ToFiles:
    """Writes NAME.stdout, NAME.stderr and NAME.exit into a directory."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.files = {}
        for node in "ab":
            for stream in ("stdout", "stderr"):
                path = self.directory / f"{node}.{stream}"
                self.files[node, stream] = open(path, "wb", buffering=0)

    def __call__(self, node, stream, data):
        self.files[node, stream].write(data)

    def close(self, codes=None):
        for file in self.files.values():
            file.close()
        for node, code in (codes or {}).items():
            (self.directory / f"{node}.exit").write_text(f"{code}\n")


def main(arguments):
    """`rxe-lab pair`; returns the exit code."""
    parser = options.parser("pair [options] -- COMMAND_A... :: COMMAND_B...", __doc__, EPILOG)
    parser.add_argument("--out", metavar="DIR", help="outputs and exit codes into files")
    parser.add_argument("--leader", choices="ab", help="stop when this one's command ends")
    parser.set_defaults(cpus=1)
    parsed = parser.parse_args(arguments)
    words = options.command(parsed.command)
    if words.count(SEPARATOR) != 1:
        raise LabError(f"two commands with one {SEPARATOR} between them are wanted")
    cut = words.index(SEPARATOR)
    commands = words[:cut], words[cut + 1 :]
    if not all(commands):
        raise LabError(f"one of the two commands around {SEPARATOR} is empty")

    return attempts(parsed.attempts, lambda: run_once(parsed, *commands))


def run_once(parsed, command_a, command_b):
    # The cable: frames travel whole and in order, and nothing on the host's network sees it.
    plugs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    a = Node("a", command_a, "pair", "10.77.0.1", "10.77.0.2", cable=plugs[0])
    b = Node("b", command_b, "pair", "10.77.0.2", "10.77.0.1", cable=plugs[1])
    a, b = (dataclasses.replace(n, mac=f"52:54:00:00:77:0{i}") for i, n in enumerate((a, b), 1))
    sink = ToFiles(parsed.out) if parsed.out else Prefixed()
    codes = None
    try:
        run = Run([a, b], options.settings(parsed), sink, parsed.timeout, parsed.leader)
        codes = run.run()
    finally:
        sink.close(codes)
    # One side often ends because the other has failed, so a failure of the lab on either side counts first.
    if LAB_FAILED in codes.values():
        return LAB_FAILED
    if parsed.leader:
        return codes[parsed.leader]
    return codes["a"] or codes["b"]
