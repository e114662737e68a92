"""How long it takes: guests of 256 MiB, of which 192 are filled. Printed, not judged."""

import json
import time

from .cases import HEALTH
from .nodes import until


def empty(scene, node, names):
    """Seconds until a node has none of these guests, and they run elsewhere."""
    began = time.monotonic()
    for name in names:
        until(f"{name} leaves {node}", lambda name=name: (at := scene.watch.where(name)) and node not in at)
    return time.monotonic() - began


def blackouts(scene):
    """The longest blackout of all moves that the nodes know of, in ms."""
    told = []
    for node in scene.bed.names:
        for entry in json.loads(scene.bed.run(node, "whimbrel", "history", "--json")):
            report = (entry.get("migration") or {}).get("report") or {}
            told.append(report.get("blackout_us", 0) / 1000)
    return max(told, default=0)


def show(scene):
    """Measures."""
    node = scene.bed.names[0]
    scene.gather(node, scene.names)
    scene.cluster.standby(node)
    print(f"evacuation of four guests: {empty(scene, node, scene.names):.1f} s", flush=True)
    scene.cluster.wait()
    scene.cluster.standby(node, "off")
    scene.cluster.wait_online([node])
    two = scene.names[:2]
    scene.gather(node, two)
    scene.bed.pressure(node, 80)
    until(f"{node} is red", lambda: scene.cluster.attribute(node, HEALTH) == "red")
    print(f"a red node with two guests is empty after {empty(scene, node, two):.1f} s", flush=True)
    scene.bed.pressure(node, 0)
    until(f"{node} is green", lambda: scene.cluster.attribute(node, HEALTH) == "green")
    scene.gather(node, two)
    print(f"the longest blackout of all these moves: {blackouts(scene):.1f} ms", flush=True)
    scene.bed.power_off(node)
    print(f"a dead node's two guests run elsewhere after {empty(scene, node, two):.1f} s", flush=True)
    scene.heal()
    scene.assert_well()
