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


# What a kernel tells, one fact after the other, and how well the host is then.
WELL = "green"
FACTS = (
    ("proc/pressure/memory", "full avg10=0.00 avg60=0.00 avg300=0.00 total=1", WELL),
    ("proc/pressure/io", "full avg10=0.00 avg60=0.00 avg300=0.00 total=1", WELL),
    ("proc/interrupts", " MCE:          0          2   Machine check exceptions", WELL),
    ("proc/diskstats", "   8       0 sda 100 0 0 1000 100 0 0 1000 0 0 0", WELL),
    ("sys/devices/system/edac/mc/mc0/ce_count", "5", WELL),
    ("sys/devices/system/edac/mc/mc0/ue_count", "0", WELL),
    ("sys/class/net/eth0/device", "", WELL),
    ("sys/class/net/eth0/statistics/rx_errors", "70", WELL),
    ("sys/class/infiniband/rxe0/ports/1/state", "4: ACTIVE", WELL),
    ("sys/class/infiniband/rxe0/ports/1/state", "1: DOWN", "red"),
    ("sys/class/infiniband/rxe0/ports/1/state", "4: ACTIVE", WELL),
    ("proc/pressure/memory", "full avg10=0.00 avg60=41.50 avg300=0.00 total=1", "red"),
    ("proc/pressure/memory", "full avg10=0.00 avg60=12.00 avg300=0.00 total=1", "yellow"),
    ("proc/pressure/memory", "full avg10=0.00 avg60=0.00 avg300=0.00 total=1", WELL),
    ("proc/pressure/io", "full avg10=0.00 avg60=95.00 avg300=0.00 total=1", "red"),
    ("proc/pressure/io", "full avg10=0.00 avg60=0.00 avg300=0.00 total=1", WELL),
    # 100 requests took 380 ms each; then a handful, which says nothing.
    ("proc/diskstats", "   8       0 sda 150 0 0 20000 150 0 0 20000 0 0 0", "yellow"),
    ("proc/diskstats", "   8       0 sda 151 0 0 30000 151 0 0 30000 0 0 0", WELL),
    ("sys/devices/system/edac/mc/mc0/ce_count", "25", "yellow"),
    ("health.conf", "ecc_corrected=   # known", WELL),
    ("sys/class/net/eth0/statistics/rx_errors", "500", "yellow"),
    ("health.conf", "ecc_corrected=\nlink_errors=1000:2000", WELL),
    ("proc/interrupts", " MCE:          1          2   Machine check exceptions", "yellow"),
    ("sys/devices/system/edac/mc/mc0/ue_count", "1", "red"),
)


# So many are there before the agent starts.
AT_FIRST = 8


def health_facts(scene):
    """Each fact of a host makes it as unwell as the thresholds say."""
    root = "/var/lib/bed-facts"
    # The cluster is not told within the test's time.
    agent = ["env", "OCF_ROOT=/usr/lib/ocf", "OCF_RESOURCE_INSTANCE=facts", f"OCF_RESKEY_root={root}", "OCF_RESKEY_delay=1h",
             f"OCF_RESKEY_thresholds={root}/health.conf", "OCF_RESKEY_CRM_meta_interval=1000",
             "/usr/lib/ocf/resource.d/whimbrel/health"]
    for number, (path, content, expected) in enumerate(FACTS):
        scene.bed.run(NODE, "sh", "-c", f"mkdir -p $(dirname {root}/{path}); printf '%b\\n' '{content}' >{root}/{path}")
        if number < AT_FIRST:
            continue
        scene.bed.run(NODE, *agent, "start" if number == AT_FIRST else "monitor")
        found = scene.bed.run(NODE, "cat", "/run/resource-agents/whimbrel-health-facts/told").strip()
        assert found == expected, f"{path} {content}: {found}, not {expected}"
    scene.bed.run(NODE, "sh", "-c", f"echo colour=1:2 >{root}/health.conf")
    refused = scene.bed.run(NODE, "sh", "-c", f"{' '.join(agent)} validate-all 2>&1; echo $?", check=False)
    assert "colour=1:2" in refused and refused.split()[-1] == "6", refused
    scene.bed.run(NODE, *agent, "stop")


TOOLS = [ocf_tester, health_facts, ocft]
