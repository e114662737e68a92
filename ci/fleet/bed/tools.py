"""The test programs of Debian's package resource-agents, on a machine that the cluster does not know. They run beside the
cases, on a node that keeps its power."""

from .guests import machine_file
from .nodes import HERE

NODE = "n1"

# The program on a host that has much to do: a machine takes some seconds to be built.
SLOW = """#!/bin/sh
if [ "$1" = start ]; then touch /run/slow; fi
if [ "$1" = status ] && [ -e /run/slow ] && [ $(($(date +%s) - $(stat -c %Y /run/slow))) -lt 5 ]; then exit 1; fi
exec whimbrel "$@"
"""


def write_machine(bed):
    """The file of the machine; before the nodes start."""
    (bed.base / "etc/whimbrel/machines/alone.toml").write_text(machine_file(32, 1, False, "alone"))
    configs = bed.base / "usr/share/resource-agents/ocft/configs"
    (configs / "vm").write_text((HERE / "ocft-vm").read_text())
    slow = bed.base / "usr/bin/slow-whimbrel"
    slow.write_text(SLOW)
    slow.chmod(0o755)
    (bed.base / "var/lib/resource-agents/ocft/cases").mkdir(parents=True, exist_ok=True)


def ocf_tester(scene):
    """ocf-tester finds nothing wrong with the agents."""
    for agent, name, option in (("vm", "alone", "name=alone"), ("health", "tested", "root=/var/lib/bed")):
        told = scene.bed.run(
            NODE, "ocf-tester", "-n", name, "-o", option, f"/usr/lib/ocf/resource.d/whimbrel/{agent}", check=False, timeout=150)
        assert "passed all tests" in told, told


def ocft(scene):
    """Nor does ocft, by the cases of ci/fleet/ocft-vm."""
    told = scene.bed.run(NODE, "bash", "-c", "ocft make vm && ocft test vm", check=False, timeout=200)
    cases = (HERE / "ocft-vm").read_text().count("\nCASE \"")
    assert "FAILED" not in told and sum("OK" in line and line.startswith("vm: ") for line in told.splitlines()) == cases, told


TOOLS = [ocf_tester, ocft]
