"""What may happen to a fleet, one case a function. After each, Scene.assert_well looks at all guests."""


from .guests import vm
from .nodes import until


def start_stop_monitor(scene):
    """A guest is stopped, started anew, and found by monitors."""
    scene.cluster.ask("crm_resource", "-r", "bare", "--meta", "-p", "target-role", "-v", "Stopped")
    scene.cluster.wait()
    assert not scene.watch.where("bare")
    scene.cluster.ask("crm_resource", "-r", "bare", "--meta", "-d", "target-role")
    scene.where("bare")
    return ["bare"]


def live_move(scene):
    """An operator moves a guest."""
    target = scene.others(scene.where("disk"))[0]
    scene.cluster.ask("crm_resource", "--move", "-r", "disk", "-N", target)
    scene.arrived("disk", target)


def evacuation(scene):
    """A node goes into standby, and comes back. All guests leave it, and it takes guests in again."""
    source = scene.where("slow")
    scene.cluster.standby(source)
    for name in scene.names:
        until(f"{name} leaves {source}", lambda name=name: source not in scene.watch.where(name))
    scene.cluster.wait()
    scene.cluster.standby(source, "off")
    scene.cluster.wait_online([source])
    scene.cluster.move("disk", source)
    scene.arrived("disk", source)


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
    scene.bed.power_off(source)
    for name in scene.names:
        until(f"{name} runs elsewhere", lambda name=name: scene.where(name) != source)


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


# Those that leave all nodes their power, and those that do not.
GENTLE = [
    start_stop_monitor, live_move, evacuation, agent_killed, carrier_killed, timed_out, receiver_killed,
    target_into_standby, service_killed]
POWER = [source_killed, target_killed]
