"""The nodes: namespaces of this machine with a network between them, and the switch that cuts their power."""

import os
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent.parent
PROJECT = HERE.parent.parent
WORK = Path(os.environ["FLEET_WORK"])
WHIMBREL = os.environ["WHIMBREL"]
SHARED = WORK / "shared"
LOG = WORK / "log"

def sh(command, **more):
    """Runs a command of a shell; fails if it does."""
    return subprocess.run(command, shell=True, check=True, text=True, capture_output=True, **more).stdout


def until(what, is_so, patience=60.0):
    """Waits until something is so, and returns what it is."""
    end = time.monotonic() + patience
    while True:
        found = is_so()
        if found:
            return found
        if time.monotonic() > end:
            raise TimeoutError(f"not within {patience:.0f} s: {what}")
        time.sleep(0.1)


class Bed:
    """The nodes n1, n2, …; they run until this process ends."""

    def __init__(self, count=3):
        self.names = [f"n{number}" for number in range(1, count + 1)]
        self.pids = {}
        self.processes = {}
        # Is called with the name of a node that is about to lose its power.
        self.before_power_off = lambda name: None
        for folder in (SHARED, LOG, WORK / "overlay"):
            folder.mkdir(exist_ok=True)
        sh(f"mount -t tmpfs -o size=2G overlay {WORK}/overlay")
        self._base()
        sh("ip link set lo up; ip link add br0 type bridge; ip link set br0 up; ip address add 10.9.0.254/24 dev br0")
        switch = socket.create_server(("10.9.0.254", 4401))
        threading.Thread(target=self._switch, args=(switch,), daemon=True).start()

    def _base(self):
        """What all nodes have in common, above the machine's own files."""
        base = WORK / "overlay/base"
        # A copy, because no layer of an overlay may be in another one.
        sh(f"cp -a {os.environ['FLEET_BASE']} {base}")
        for folder in ("etc/whimbrel/machines", "var/lib/corosync", "var/log/bed", "var/log/cluster",
                       "var/log/pacemaker", "shared", "usr/sbin", "usr/bin", "usr/lib/ocf/lib",
                       "usr/lib/ocf/resource.d", *(f"var/lib/pacemaker/{of}" for of in ("cib", "pengine", "blackbox", "cores"))):
            (base / folder).mkdir(parents=True, exist_ok=True)
        groups = Path("/etc/group").read_text() + "haclient:x:901:hacluster\n"
        (base / "etc/group").write_text(groups)
        users = Path("/etc/passwd").read_text() + "hacluster:x:901:901::/var/lib/pacemaker:/usr/sbin/nologin\n"
        (base / "etc/passwd").write_text(users)
        shutil.copy(HERE / "fence_bed", base / "usr/sbin/fence_bed")
        shutil.copytree(PROJECT / "packaging/ocf/whimbrel", base / "usr/lib/ocf/resource.d/whimbrel")
        shutil.copytree(PROJECT / "packaging/ocf/lib", base / "usr/lib/ocf/lib/whimbrel")
        shutil.copy(PROJECT / "packaging/fleet/whimbrel-balance", base / "usr/sbin/whimbrel-balance")
        (base / "usr/bin/whimbrel").symlink_to(WHIMBREL)
        self.base = base

    def finish_base(self, description):
        """Makes of the fleet's description what the nodes need, by the program's own command. Each node is given its folder
        when it is started for the first time."""
        (WORK / "fleet.toml").write_text(description)
        sh(f"{WHIMBREL} fleet init {WORK}/fleet.toml {WORK}/fleet")
        names = Path("/etc/hosts").read_text() + (WORK / "fleet/hosts.names").read_text()
        (self.base / "etc/hosts").write_text(names)
        # What `cibadmin --replace` would do, before the cluster has ever met.
        shutil.copy(WORK / "fleet/cib.xml", self.base / "var/lib/pacemaker/cib/cib.xml")
        sh(f"chown -R 901:901 {self.base}/var/lib/pacemaker {self.base}/var/log/pacemaker; "
           f"chmod 750 {self.base}/var/lib/pacemaker")

    def power_on(self, name):
        """Starts a node."""
        number = name[1:]
        process = subprocess.Popen(
            ["unshare", "-m", "-n", "-p", "-i", "-u", "-f", "--propagation", "private", "--kill-child",
             str(HERE / "node"), number, str(len(self.names))],
            env={**os.environ, "FLEET_SCRIPTS": str(HERE)}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=open(LOG / f"{name}.start", "ab"))
        own = os.readlink("/proc/self/ns/net")
        until("a network namespace", lambda: os.readlink(f"/proc/{process.pid}/ns/net") != own)
        subprocess.run(f"ip link del v{number}", shell=True, check=False, capture_output=True)
        sh(f"ip link add v{number} type veth peer name eth0 netns {process.pid} && ip link set v{number} master br0 up")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        self.pids[name] = int(until("a node's first process", children.read_text).split()[0])
        self.processes[name] = process

    def power_off(self, name):
        """Ends a node and all that it runs, at once."""
        if self.is_on(name):
            self.before_power_off(name)
        process = self.processes.pop(name, None)
        pid = self.pids.pop(name, None)
        if process:
            os.kill(pid, 9)
            process.wait()
        return "off"

    def deafen(self, name):
        """Lets a node hear nothing, until it is started anew. What it says is heard."""
        sh(f"bridge link set dev v{name[1:]} learning off flood off mcast_flood off bcast_flood off; "
           "ip link set br0 type bridge fdb_flush")

    def mute(self, name):
        """Lets nobody hear a node, until it is started anew. It hears all."""
        for other in [*(int(other[1:]) for other in self.names if other != name), 254]:
            self.run(name, "ip", "neigh", "replace", f"10.9.0.{other}", "lladdr", "02:00:00:00:00:01", "nud", "permanent",
                     "dev", "eth0")

    def pressure(self, name, percent):
        """Writes how long a node waited for memory into the folder that the agent of health takes for proc and sys."""
        line = f"full avg10={percent}.00 avg60={percent}.00 avg300=0.00 total=1"
        self.run(name, "sh", "-c", f"mkdir -p /var/lib/bed/proc/pressure; echo '{line}' >/var/lib/bed/proc/pressure/memory")

    def is_on(self, name):
        """Whether the node runs."""
        return name in self.pids

    def _switch(self, switch):
        while True:
            caller, _ = switch.accept()
            with caller, caller.makefile("rw") as line:
                verb, node = line.readline().split()
                if verb == "list":
                    print(*self.names, file=line)
                elif verb == "off":
                    print(self.power_off(node), file=line)
                else:
                    print("on" if self.is_on(node) else "off", file=line)

    def run(self, node, *command, check=True, timeout=60):
        """Runs a command on a node; returns what it prints."""
        enter = ["nsenter", "-t", str(self.pids[node]), "-a", "-r", "-w", "env",
                 "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C"]
        done = subprocess.run([*enter, *command], text=True, capture_output=True, timeout=timeout, check=False,
                              stdin=subprocess.DEVNULL)
        if check and done.returncode != 0:
            raise RuntimeError(f"{node}: {' '.join(command)}: {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def any_on(self):
        """A node that runs."""
        return next(name for name in self.names if self.is_on(name))

    def processes_of(self, node, *words):
        """The processes of a node whose command line has all these words, as this process numbers them."""
        space = os.readlink(f"/proc/{self.pids[node]}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "ns/pid") == space:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if all(word in line for word in words):
                        found.append(int(entry.name))
            except OSError:
                pass
        return found
