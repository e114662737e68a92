"""What the cluster is told, and what it says."""

import re
import time
from xml.etree import ElementTree

from .nodes import until

OPTIONS = {
    "stonith-enabled": "true", "stonith-action": "off", "have-watchdog": "false", "dc-deadtime": "2s",
    "cluster-recheck-interval": "10s", "load-threshold": "100000%", "migration-limit": "2", "transition-delay": "0s",
    "node-health-strategy": "migrate-on-red", "placement-strategy": "balanced",
    # With `stop`, a node that is cut off ends its guests before it is fenced.
    "no-quorum-policy": "freeze",
}


def pairs(of, values):
    """Name-value pairs."""
    return "".join(f'<nvpair id="{of}-{name.strip("#")}" name="{name}" value="{value}"/>' for name, value in values.items())


def operations(of, **timeouts):
    """Operations with their timeouts and further attributes."""
    parts = []
    for name, attributes in timeouts.items():
        words = " ".join(f'{key.replace("_", "-")}="{value}"' for key, value in attributes.items())
        parts.append(f'<op id="{of}-{name}" name="{name}" {words}/>')
    return f"<operations>{''.join(parts)}</operations>"


def guest(name, migrate_options="", move="40s"):
    """The resource of a guest, as docs/fleet.md recommends it."""
    return (
        f'<primitive id="{name}" class="ocf" provider="whimbrel" type="vm">'
        f'<meta_attributes id="{name}-meta">{pairs(name + "-meta", {"allow-migrate": "true", "resource-stickiness": "100"})}'
        f'</meta_attributes><instance_attributes id="{name}-of">'
        f'{pairs(name + "-of", {"migrate_options": migrate_options, "autoset_utilization": "true"})}</instance_attributes>'
        + operations(
            name, monitor={"interval": "5s", "timeout": "20s"}, start={"interval": "0", "timeout": "40s"},
            stop={"interval": "0", "timeout": "40s", "on_fail": "fence"},
            migrate_to={"interval": "0", "timeout": "20s", "on_fail": "block"},
            migrate_from={"interval": "0", "timeout": move, "on_fail": "block"})
        + "</primitive>")


def first_cib(nodes, guests):
    """The configuration that the cluster starts with."""
    resources = (
        '<primitive id="power" class="stonith" type="fence_bed"><instance_attributes id="power-of">'
        f'{pairs("power-of", {"pcmk_host_list": " ".join(nodes)})}</instance_attributes></primitive>'
        '<clone id="hosts"><meta_attributes id="hosts-meta">' + pairs("hosts-meta", {"interleave": "true"}) +
        '</meta_attributes><primitive id="host" class="ocf" provider="whimbrel" type="host">'
        + operations("host", monitor={"interval": "2s", "timeout": "60s"}) + "</primitive></clone>" + "".join(guests))
    # What the nodes have to give, so that guests that say what they need find room.
    members = "".join(
        f'<node id="{name[1:]}" uname="{name}"><utilization id="{name}-gives">'
        f'{pairs(name + "-gives", {"memory": "4096", "cpu": "16"})}</utilization></node>' for name in nodes)
    return (
        '<cib crm_feature_set="3.16.0" validate-with="pacemaker-3.9" epoch="1" num_updates="0" admin_epoch="1">'
        f'<configuration><crm_config><cluster_property_set id="options">{pairs("option", OPTIONS)}'
        f"</cluster_property_set></crm_config><nodes>{members}</nodes><resources>{resources}</resources><constraints/></configuration>"
        "<status/></cib>")


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
        self.ask("cibadmin", "--delete", "--force", "--xpath", "//constraints/rsc_location", check=False)

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
