"""A bed with a cluster and guests, what a case may rely on, and what must hold after each."""

import os
import signal
from collections import Counter

from . import guests, tools
from .cluster import Cluster
from .nodes import Bed, until

# Name, memory and filled memory in MiB, whether it has a disk, options of its moves. A slow one takes some
# seconds, so that there is time for something to go wrong.
GUESTS = (
    ("disk", 64, 32, True, ""),
    ("bare", 64, 32, False, ""),
    ("slow", 80, 52, True, "--bandwidth 130M"),
    ("slowbare", 80, 52, False, "--bandwidth 130M"),
)


FLEET = """
name = 'bed'
[fencing]
agent = 'fence_bed'
[storage.fast]
path = '/shared'
type = 'nfs4'   # All nodes are on one kernel: locks reach them as they do there.
[times]
monitor-interval = 5
monitor = 20
start = 40
stop = 40
move = 40
settle-interval = 2
[properties]
stonith-action = 'off'
dc-deadtime = '2s'
cluster-recheck-interval = '10s'
load-threshold = '100000%'
[health]
interval = 2
options = { root = '/var/lib/bed', delay = '2s' }
[corosync.totem]
token = 3000
[corosync.quorum]
wait_for_all = 0
[corosync.system]
sched_rr = 'no'
move_to_root_cgroup = 'no'
allow_knet_handle_fallback = 'yes'
[corosync.logging]
to_syslog = 'no'
to_logfile = 'yes'
logfile = '/var/log/bed/corosync'
timestamp = 'hires'
"""


# What `--figures` measures with.
LARGE = tuple((f"large{number}", 256, 192, number % 2 == 0, "") for number in range(4))


def description(nodes, machines):
    """The bed as `whimbrel fleet init` understands it."""
    parts = [FLEET]
    for name in nodes:
        parts.append(f"[[hosts]]\nname = '{name}'\naddresses = ['10.9.0.{name[1:]}']\nmemory = '4G'\ncpus = 16\n")
    for name, memory, fill, disk, options in machines:
        parts.append(f"[machines.{name}]\n{guests.machine_file(memory, fill, disk, name)}")
        if options:
            parts.append(f"fleet = {{ migrate-options = '{options}' }}\n")
    return "".join(parts)


class Hurt(AssertionError):
    """Guests that were killed without their host, and guests that ran twice."""

    def __init__(self, killed, doubled, story):
        super().__init__(f"killed: {killed}, doubled: {doubled}; {story}")
        self.killed = killed
        self.doubled = doubled


class Scene:
    """Three nodes that are online, and all guests at work."""

    def __init__(self, machines=GUESTS):
        self.machines = machines
        self.names = [name for name, *_ in machines]
        self.bed = Bed()
        tools.write_machine(self.bed)
        self.bed.finish_base(description(self.bed.names, machines))
        for node in self.bed.names:
            self.bed.power_on(node)
        self.cluster = Cluster(self.bed)
        self.watch = guests.Watch(self.bed, self.names)
        self.cluster.wait_online(self.bed.names)
        until("all guests at work", lambda: all(self.watch.at.get(name) for name in self.names))
        self.cluster.wait()
        # Guests that were on nodes which lost their power.
        self.died = []
        self.bed.before_power_off = self._note_died

    def where(self, name):
        """The node that has a guest: one, by its own word and the cluster's."""
        return until(f"{name} in one place", lambda: self._agreed(name), 45)

    def _agreed(self, name):
        truly, believed = self.watch.where(name), self.cluster.where().get(name, [])
        return truly[0] if len(truly) == 1 and truly == believed else None

    def _all_agreed(self):
        believed = self.cluster.where()
        return all(len(found := self.watch.where(name)) == 1 and found == believed.get(name) for name in self.names)

    def _note_died(self, node):
        for name in self.names:
            told = guests.vm(self.bed, node, name)
            # A node that hangs says nothing of what it has.
            silent = not told and self.watch.at.get(name) == node and guests.socket_of(self.bed, node, name).exists()
            if silent or told and told["state"] in guests.OWNERS:
                self.died.append(name)

    def others(self, *nodes):
        """The nodes other than these."""
        return [node for node in self.bed.names if node not in nodes]

    def where_truly(self, name):
        """The node that has a guest by its own word, whatever the cluster knows; None if it is on its way."""
        found = self.watch.where(name)
        return found[0] if len(found) == 1 else None

    def guest(self, name):
        """What a guest says of itself, where it is."""
        told = guests.vm(self.bed, self.where_truly(name) or self.where(name), name)
        return told and told["guest"]

    def moving(self, name, source):
        """Waits until a guest's memory travels."""
        def is_so():
            told = guests.vm(self.bed, source, name)
            return told and told["state"] == "migrating"
        until(f"{name} is being moved", is_so)

    def begin_move(self, name, target=None):
        """Asks for a move, and waits until memory travels. Returns source and target."""
        source = self.where(name)
        target = target or self.others(source)[0]
        self.cluster.move(name, target)
        self.moving(name, source)
        return source, target

    def kill(self, node, *words, how=signal.SIGKILL):
        """Kills the processes of a node with these words in their command line."""
        found = self.bed.processes_of(node, *words)
        for pid in found:
            try:
                os.kill(pid, how)
            except ProcessLookupError:
                pass
        return found

    def arrived(self, name, node, patience=45):
        """Waits until a guest is on a node."""
        until(f"{name} on {node}", lambda: self._agreed(name) == node, patience)

    def gather(self, node, names):
        """Moves these guests to a node, and the others away from it. The cluster then has no wishes left."""
        elsewhere = self.others(node)[0]
        at = {name: node if name in names else elsewhere for name in self.names}
        for name, wanted in at.items():
            self.cluster.move(name, wanted)
        for name, wanted in at.items():
            self.arrived(name, wanted)
        self.cluster.clear()
        self.cluster.wait()

    def heal(self):
        """Puts right what a case has changed. A node that hangs or is cut off is fenced first."""
        def all_online():
            for node in self.bed.names:
                if not self.bed.is_on(node):
                    # A cluster that has not noticed yet would fence the node that has just come back.
                    until(f"{node} is known to be off", lambda node=node: self.cluster.is_gone(node), 90)
                    self.bed.power_on(node)
            return set(self.bed.names) <= set(self.cluster.online())

        until("all nodes online", all_online, 90)
        self.cluster.put_right()

    def assert_well(self, stopped=()):
        """No guest was killed or doubled, all are where the cluster takes them to be, and go on; their verdict is clean.
        Guests were started anew if they were on a node that lost its power, or `stopped`, and no others. Returns the former."""
        self.cluster.wait()
        until("each guest in one place", self._all_agreed)
        before = {name: self.guest(name) for name in self.names}

        def goes_on():
            now = {name: self.guest(name) for name in self.names}
            return all(now[name]["ticks"] > before[name]["ticks"] and now[name]["pages"] > before[name]["pages"]
                       for name in self.names) and now
        after = until("all guests go on", goes_on)
        for name, told in after.items():
            assert told["clean"], f"{name}: {told['problems']}"
        restarts = Counter(name for _, name, _ in self.watch.restarts)
        doubled = sorted({name for _, name, _ in self.watch.doubled})
        died, ended = list(self.died), Counter([*self.died, *stopped])
        story = f"started anew: {dict(restarts)}; ended with their node, or stopped: {dict(ended)}; {self.watch.doubled}"
        for kept in (self.watch.restarts, self.watch.doubled, self.died):
            kept.clear()
        killed = sorted((restarts - ended).elements())
        if killed or doubled:
            raise Hurt(killed, doubled, story)
        assert restarts == ended, f"were not started anew: {story}"
        return died

    def assert_journals(self):
        """Ends all guests, and reads their disks."""
        last = {name: self.guest(name)["journal"] for name, _, _, disk, _ in self.machines if disk}
        for name in self.names:
            self.cluster.ask("crm_resource", "-r", name, "--meta", "-p", "target-role", "-v", "Stopped")
        self.cluster.wait()
        for name in self.names:
            assert not self.watch.where(name), f"{name} runs on though it was stopped"
        for name, known in last.items():
            found = guests.journal(name)
            assert found >= known > 0, f"{name}: {found} entries, of which it knew {known}"
