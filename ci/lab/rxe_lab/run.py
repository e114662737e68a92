"""Runs one command in a throw-away VM with soft-RoCE and nested KVM."""

import sys

from rxe_lab import options
from rxe_lab.supervise import Run, attempts
from rxe_lab.vm import Node

EPILOG = """\
The VM sees this machine's root directory; what it writes there is lost, except under --rw.
Two RDMA devices, rxe0 (10.77.0.1 on lab0) and rxe1 (10.77.0.2 on lab1), are joined by a
cable that can be cut: ip link set lab0 down. LAB_ADDR, LAB_PEER, LAB_DEVICE and
LAB_PEER_DEVICE name them. Exit code: the command's; 124 out of time; 125 the lab failed.
"""


def main(arguments):
    """`rxe-lab run`; returns the exit code."""
    parsed = options.parser("run [options] -- COMMAND [ARG...]", __doc__, EPILOG).parse_args(arguments)
    node = Node(
        name="a",
        command=options.command(parsed.command),
        link="veth",
        address="10.77.0.1",
        peer="10.77.0.2",
        peer_device="rxe1",
    )
    files = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}

    def sink(_node, stream, data):
        files[stream].write(data)
        files[stream].flush()

    settings = options.settings(parsed)
    return attempts(parsed.attempts, lambda: Run([node], settings, sink, parsed.timeout).run()["a"])
