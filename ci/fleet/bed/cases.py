"""What may happen to a fleet, one case a function. After each, Scene.assert_well looks at all guests. A case may return the
guests that it has stopped; a pair of them and of words, these are shown."""

import os
import shutil
import time

from .guests import vm
from .lossy import LateWay
from .nodes import SHARED, WORK, until

HEALTH = "#health-whimbrel-health"


def start_stop_monitor(scene):
    """A guest is stopped, started anew, and found by monitors."""
    scene.cluster.ask("crm_resource", "-r", "bare", "--meta", "-p", "target-role", "-v", "Stopped")
    scene.cluster.wait()
    assert not scene.watch.where("bare")
    scene.cluster.ask("crm_resource", "-r", "bare", "--meta", "-d", "target-role")
    scene.where("bare")
    return ["bare"]


def loaded_again(scene):
    """The configuration that `whimbrel fleet init` has made has nothing that Pacemaker warns of, and is loaded on a cluster that
    runs, as its README says. No guest notices."""
    shutil.copy(WORK / "fleet/cib.xml", SHARED / "cib.xml")
    scene.cluster.ask("cibadmin", "--replace", "--scope", "configuration", "--xml-file", "/shared/cib.xml")
    scene.cluster.wait()
    scene.cluster.ask("crm_verify", "--live-check")


def live_move(scene):
    """An operator moves a guest."""
    target = scene.others(scene.where("disk"))[0]
    scene.cluster.ask("crm_resource", "--move", "-r", "disk", "-N", target)
    scene.arrived("disk", target)


def evacuation(scene):
    """A node goes into standby, and comes back. All guests leave it, and it takes guests in again."""
    source = scene.where("slow")
    began = time.monotonic()
    scene.cluster.standby(source)
    for name in scene.names:
        until(f"{name} leaves {source}", lambda name=name: source not in scene.watch.where(name))
    took = time.monotonic() - began
    scene.cluster.wait()
    scene.cluster.standby(source, "off")
    scene.cluster.wait_online([source])
    scene.cluster.move("disk", source)
    scene.arrived("disk", source)
    return (), f"a node was evacuated within {took:.1f} s"


def agent_killed(scene):
    """The agent that waits for a guest is killed in mid-move."""
    _, target = scene.begin_move("slow")
    assert scene.kill(target, "resource.d/whimbrel/vm", "migrate_from")
    scene.arrived("slow", target)


def carrier_killed(scene):
    """The process is killed that carries a guest."""
    source, target = scene.begin_move("slow")
    assert scene.kill(source, "resource.d/whimbrel/vm", "carry")
    scene.arrived("slow", target)


def timed_out(scene):
    """A move has less time than it takes: it is called off, and the guest runs on where it is."""
    scene.cluster.timeout("slowbare", 5)
    source, target = scene.begin_move("slowbare")
    until("it is called off", lambda: scene.cluster.attribute(source, "offer-slowbare").endswith(f":stayed:{target}"))
    assert scene.watch.where("slowbare") == [source]
    scene.cluster.timeout("slowbare", 40)
    scene.arrived("slowbare", target)


def receiver_killed(scene):
    """The process is killed that takes a guest in."""
    _, target = scene.begin_move("slow")
    pid = until("the receiver has the guest's name", lambda: vm(scene.bed, target, "slow"))["pid"]
    scene.bed.run(target, "kill", "-9", str(pid))
    scene.arrived("slow", target)


def target_into_standby(scene):
    """The target goes into standby in mid-move: the guest goes elsewhere, or stays."""
    _, target = scene.begin_move("slowbare")
    scene.cluster.standby(target)
    scene.cluster.clear()
    scene.cluster.wait()
    assert scene.where("slowbare") != target


def source_killed(scene):
    """The source's power is cut in mid-move. Its guests are started elsewhere, once."""
    source, _ = scene.begin_move("slow")
    began = time.monotonic()
    scene.bed.power_off(source)
    for name in scene.names:
        until(f"{name} runs elsewhere", lambda name=name: source not in scene.watch.where(name) and scene.watch.where(name))
    took = time.monotonic() - began
    for name in scene.names:
        until(f"{name} runs elsewhere", lambda name=name: scene.where(name) != source)
    return (), f"all guests ran elsewhere {took:.1f} s after a node died"


def target_killed(scene):
    """The target's power is cut in mid-move. The guest runs on."""
    _, target = scene.begin_move("slowbare")
    scene.bed.power_off(target)
    until("the loss of the target is seen", lambda: target not in scene.cluster.online())
    scene.cluster.wait()


def service_killed(scene):
    """The host service is killed on both sides in mid-move, and started anew."""
    source, target = scene.begin_move("slow")
    for node in (source, target):
        assert scene.kill(node, "whimbrel host --config")
    scene.arrived("slow", target)


def red_node(scene):
    """A node has too little memory, by what its kernel tells: its guests leave it, live."""
    # The two that move fast, alone on it.
    source = scene.where("disk")
    guests = ("disk", "bare")
    scene.gather(source, guests)
    scene.bed.pressure(source, 80)
    until(f"{source} is red", lambda: scene.cluster.attribute(source, HEALTH) == "red")
    began = time.monotonic()
    for name in guests:
        until(f"{name} leaves {source}", lambda name=name: source not in scene.watch.where(name))
    took = time.monotonic() - began
    scene.bed.pressure(source, 0)
    until(f"{source} is green", lambda: scene.cluster.attribute(source, HEALTH) == "green")
    return (), f"a red node with two guests was empty after {took:.1f} s"


def balance(scene):
    """All guests are on one node: they are spread with no more moves than needed, and then stay."""
    source = scene.where("disk")
    scene.gather(source, scene.names)
    # Two go, since no three nodes have four guests more evenly than 2, 1, 1.
    began = time.monotonic()
    told = scene.bed.run(scene.bed.any_on(), "whimbrel-balance", timeout=120)
    took = time.monotonic() - began
    assert "\n2 moves" in told, told
    at = {name: scene.where(name) for name in scene.names}
    assert sorted(list(at.values()).count(node) for node in scene.bed.names) == [1, 1, 2], at
    scene.cluster.wait()
    moves = scene.watch.moves
    end = time.monotonic() + float(os.environ.get("FLEET_QUIET", "6"))
    while time.monotonic() < end:
        again = scene.bed.run(scene.bed.any_on(), "whimbrel-balance", timeout=120)
        assert "nothing to gain" in again, again
        time.sleep(3)
    assert scene.watch.moves == moves and at == {name: scene.where(name) for name in scene.names}
    return (), f"four guests of one node were spread by 2 moves in {took:.1f} s, and stayed"


def held(scene):
    """A guest without a disk is handed over, and the answer does not come any more: the source holds it, until the target's
    agent has said that it runs there."""
    source = scene.where("bare")
    target = scene.others(source)[0]
    with LateWay(scene.bed, source, target, 0.8) as way:
        scene.cluster.move("bare", target)
        scene.moving("bare", source)
        # Late answers are long blackouts.
        scene.bed.run(source, "whimbrel", "change", "bare", "--downtime-limit", "20s")
        # The moment lasts as long as an answer is late.
        end = time.monotonic() + 60
        while (vm(scene.bed, source, "bare", "/v1/migration") or {}).get("progress", {}).get("phase") != "committed":
            assert time.monotonic() < end, "it was not handed over"
        way.cut()
        scene.arrived("bare", target)
    until("the source says that it has moved", lambda: scene.cluster.attribute(source, "offer-bare").endswith(f":moved:{target}"))
    report = scene.bed.run(source, "cat", "/run/resource-agents/whimbrel/bare.report")
    assert "HELD" in report, report


# Those that leave all nodes their power, and those that do not.
GENTLE = [
    start_stop_monitor, loaded_again, live_move, evacuation, agent_killed, carrier_killed, timed_out, receiver_killed,
    target_into_standby, service_killed, red_node, balance, held]
POWER = [source_killed, target_killed]
