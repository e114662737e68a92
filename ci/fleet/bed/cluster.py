"""What the cluster is told, and what it says."""

import re
import time
from xml.etree import ElementTree

from .nodes import until

class Cluster:
    """The cluster, asked through one of the nodes that run."""

    def __init__(self, bed):
        self.bed = bed
        self.in_standby = set()
        self.unwell = set()

    def ask(self, *command, **more):
        """Runs a command of the cluster's."""
        return self.bed.run(self.bed.any_on(), *command, **more)

    def status(self):
        """What crm_mon says, as XML; None if it cannot say anything now."""
        try:
            return ElementTree.fromstring(self.ask("crm_mon", "-1", "--output-as", "xml", check=False))
        except ElementTree.ParseError:
            return None

    def online(self):
        """The nodes that are online."""
        told = self.status()
        if told is None:
            return []
        return [node.get("name") for node in told.iterfind("nodes/node")
                if node.get("online") == "true" and node.get("unclean") == "false" and node.get("pending") != "true"]

    def is_gone(self, node):
        """Whether the cluster knows that a node is off."""
        told = self.status()
        return told is not None and any(
            found.get("online") == "false" and found.get("unclean") == "false"
            for found in told.iterfind("nodes/node") if found.get("name") == node)

    def where(self):
        """Where the cluster takes each guest to be: the names of nodes by those of guests."""
        told = self.status()
        if told is None:
            return {}
        return {
            found.get("id"): [node.get("name") for node in found.iterfind("node")]
            for found in told.iter("resource")
            if found.get("resource_agent", "").endswith("whimbrel:vm") and found.get("role") in ("Started", "Migrating")}

    def blocked(self):
        """The guests that the cluster leaves alone after a failure."""
        told = self.status()
        return [found.get("id") for found in told.iter("resource") if found.get("blocked") == "true"] if told is not None else []

    def move(self, name, node):
        """Asks for a live move, as crm_resource --move does; also of a guest that is being moved."""
        text = f'<rsc_location id="cli-prefer-{name}" rsc="{name}" role="Started" node="{node}" score="INFINITY"/>'
        self.ask("cibadmin", "--modify", "--allow-create", "--scope", "constraints", "--xml-text", text)

    def timeout(self, name, seconds):
        """Says how long a guest's moves may take."""
        text = f'<op id="{name}-migrate_from" timeout="{seconds}s"/>'
        self.ask("cibadmin", "--modify", "--scope", "resources", "--xml-text", text)

    def clear(self):
        """Forgets what was asked of moves."""
        self.ask("cibadmin", "--delete-all", "--force", "--xpath", "//constraints/rsc_location", check=False)

    def standby(self, node, value="on"):
        """Has a node run nothing, or again something."""
        self.in_standby.add(node)
        self.ask("crm_attribute", "-N", node, "-n", "standby", "-v", value)

    def health(self, node, colour):
        """Says of a node's health what it is."""
        self.unwell.add(node)
        self.ask("attrd_updater", "-N", node, "-n", "#health-bed", "-U", colour)

    def put_right(self):
        """Undoes all that was asked of it."""
        self.clear()
        for node in list(self.in_standby):
            self.standby(node, "off")
        for node in list(self.unwell):
            self.health(node, "green")
        self.in_standby.clear()
        self.unwell.clear()

    def attribute(self, node, name):
        """The value of a private attribute."""
        found = re.search(r'value="(.*)"', self.ask("attrd_updater", "-Q", "-n", name, "-N", node, check=False))
        return found[1] if found else ""

    def idle(self):
        """Whether the cluster has nothing left to do, and leaves no guest alone."""
        coordinator = re.search(r"(n\d+)", self.ask("crmadmin", "-D", "-q", check=False, timeout=90))
        return coordinator and "S_IDLE" in self.ask("crmadmin", "-S", coordinator[1], check=False) and not self.blocked()

    def wait(self, patience=60):
        """Waits until the cluster has nothing left to do. What was just asked for it may not have begun yet."""
        until("the cluster is idle", lambda: self.idle() and time.sleep(0.5) is None and self.idle(), patience)

    def wait_online(self, nodes, patience=90):
        """Waits until these nodes are online."""
        until(f"{nodes} online", lambda: set(nodes) <= set(self.online()), patience)
