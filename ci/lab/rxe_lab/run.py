"""Runs one command where there are two RDMA devices: in a throw-away VM, or on the machine itself (--native)."""

import sys

from rxe_lab import native, options
from rxe_lab.supervise import Run, attempts, note
from rxe_lab.vm import LabError, Node

EPILOG = """\
The VM sees this machine's root directory; what it writes there is lost, except under --rw.
Two RDMA devices, rxe0 (10.77.0.1 on lab0) and rxe1 (10.77.0.2 on lab1), are joined by a
cable that can be cut: ip link set lab0 down. LAB_ADDR, LAB_PEER, LAB_DEVICE and
LAB_PEER_DEVICE name them. Exit code: the command's; 124 out of time; 125 the lab failed.
"""


def main(arguments):
    """`rxe-lab run`; returns the exit code."""
    parser = options.parser("run [options] -- COMMAND [ARG...]", __doc__, EPILOG)
    parser.add_argument(
        "--native",
        choices=("never", "auto", "always"),
        default="never",
        help="no VM, but the machine's own rdma_rxe: where that is possible (auto), or else fail (always); needs root, "
        "and what the command writes is not lost (never)",
    )
    parser.add_argument("--no-link", action="store_true", help="a VM without link, RDMA devices and their modules")
    parsed = parser.parse_args(arguments)
    if parsed.no_link and parsed.native != "never":
        raise LabError("--no-link is for the VM, and --native is without one")
    node = Node(
        name="a",
        command=options.command(parsed.command),
        link="none" if parsed.no_link else "veth",
        address="10.77.0.1",
        peer="10.77.0.2",
        peer_device="rxe1",
    )
    settings = options.settings(parsed)
    if parsed.native != "never":
        try:
            with native.Link(settings):
                return native.run(node, settings, parsed.timeout)
        except native.Unavailable as reason:
            if parsed.native == "always":
                raise
            if settings.verbose:
                note(f"{reason}; so the command runs in the emulated VM")
    files = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}

    def sink(_node, stream, data):
        files[stream].write(data)
        files[stream].flush()

    return attempts(parsed.attempts, lambda: Run([node], settings, sink, parsed.timeout).run()["a"])
