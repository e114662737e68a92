"""Faults by seed: a guest moves, something goes wrong at some moment, and all that is wrong is put right. Then no guest may
have been killed without its host, run twice, or be out of the cluster's sight."""

import random
import signal
import time
import traceback
from collections import Counter

from . import guests
from .nodes import sh, until


def agent_killed(scene, move):
    """The target's agent is killed."""
    scene.kill(move.target, "resource.d/whimbrel/vm", "migrate_from")


def carrier_killed(scene, move):
    """The process is killed that carries the guest; so it never answers."""
    scene.kill(move.source, "resource.d/whimbrel/vm", "carry")


def answer_lost(scene, move):
    """The command is killed that moves the guest; the move goes on."""
    scene.kill(move.source, "whimbrel migrate", move.name)


def both_agents_killed(scene, move):
    """All agents of both hosts are killed."""
    for node in (move.source, move.target):
        scene.kill(node, "resource.d/whimbrel/")


def timed_out(scene, move):
    """The move has less time than it needs. It is asked for anew, since a timeout holds from the next action on."""
    scene.cluster.timeout(move.name, 5)
    scene.cluster.standby(move.source)
    time.sleep(4)
    scene.cluster.timeout(move.name, 40)


def receiver_killed(scene, move):
    """The process is killed that takes the guest in, or has just taken it in: then its guest dies with it."""
    told = guests.vm(scene.bed, move.target, move.name)
    if told and told["state"] == "receiving":
        scene.bed.run(move.target, "kill", "-9", str(told["pid"]), check=False)
        time.sleep(1)
        if not guests.vm(scene.bed, move.source, move.name):
            # It had just arrived, and has died with its machine.
            scene.died.append(move.name)


def target_into_standby(scene, move):
    """The target goes into standby."""
    scene.cluster.standby(move.target)


def both_into_standby(scene, move):
    """Both hosts go into standby."""
    for node in (move.target, move.source):
        scene.cluster.standby(node)


def target_hangs(scene, move):
    """Corosync of the target stands still, so that the target is fenced."""
    scene.kill(move.target, "corosync -f", how=signal.SIGSTOP)
    until("the target is fenced", lambda: not scene.bed.is_on(move.target))


def node_hangs(scene, move):
    """All processes of the source or of the target stand still, the guests among them, until it is fenced."""
    node = scene.dice.choice((move.source, move.target))
    scene.kill(node, how=signal.SIGSTOP)
    until("it is fenced", lambda: not scene.bed.is_on(node), 90)


def target_killed(scene, move):
    """The target loses its power."""
    scene.bed.power_off(move.target)


def source_killed(scene, move):
    """The source loses its power."""
    scene.bed.power_off(move.source)


def short_cut(scene, move):
    """The target has no network for a second and a half."""
    cable = f"v{move.target[1:]}"
    sh(f"ip link set {cable} down")
    time.sleep(1.5)
    sh(f"ip link set {cable} up")


def long_cut(scene, move):
    """The target has no network until it is fenced."""
    sh(f"ip link set v{move.target[1:]} down")
    until("the target is fenced", lambda: not scene.bed.is_on(move.target))


def one_way_cut(scene, move):
    """The source or the target hears nobody, or nobody hears it, until it is fenced."""
    node = scene.dice.choice((move.source, move.target))
    scene.dice.choice((scene.bed.deafen, scene.bed.mute))(node)
    until("it is fenced", lambda: not scene.bed.is_on(node), 90)


def no_quorum(scene, _move):
    """No node has a network for some seconds, so none has quorum."""
    for name in scene.bed.names:
        sh(f"ip link set v{name[1:]} down")
    time.sleep(scene.dice.uniform(5, 12))
    for name in scene.bed.names:
        sh(f"ip link set v{name[1:]} up")


def health_flaps(scene, move):
    """The source's health gets bad and good again, twice."""
    for colour in ("red", "green", "red", "green"):
        scene.cluster.health(move.source, colour)
        time.sleep(scene.dice.uniform(0.1, 1.5))


def change_of_mind(scene, move):
    """The operator wants the guest on another node, and then where it was."""
    for node in (scene.others(move.source, move.target)[0], move.source):
        scene.cluster.move(move.name, node)
        time.sleep(scene.dice.uniform(0, 1))


def services_upgraded(scene, move):
    """The host services of both hosts are killed, and others take their place."""
    for node in (move.source, move.target):
        scene.kill(node, "whimbrel host --config")


def offer_overtaken(scene, move):
    """The target goes into standby just when the guest has been offered, before it is claimed."""
    scene.cluster.standby(move.target)


FAULTS = [
    agent_killed, carrier_killed, answer_lost, both_agents_killed, timed_out, receiver_killed, target_into_standby,
    both_into_standby, target_hangs, node_hangs, target_killed, source_killed, short_cut, long_cut, one_way_cut, no_quorum,
    health_flaps, change_of_mind, services_upgraded, offer_overtaken]


class Move:
    """A move that has been asked for."""

    def __init__(self, scene, name):
        self.name = name
        self.source = scene.where(name)
        self.target = scene.dice.choice(scene.others(self.source))


def one(scene, fault):
    """A move with a fault. Returns how many guests died with their host, and what came of the one that moved."""
    move = Move(scene, scene.dice.choice(scene.names))
    scene.cluster.move(move.name, move.target)
    if fault is offer_overtaken:
        end = time.monotonic() + 5
        while ":offered" not in scene.cluster.attribute(move.source, f"offer-{move.name}") and time.monotonic() < end:
            pass
    else:
        scene.moving(move.name, move.source)
        time.sleep(scene.dice.uniform(0, 3.5 if move.name.startswith("slow") else 0.8))
    fault(scene, move)
    time.sleep(1)
    scene.heal()
    died = scene.assert_well()
    if move.name in died:
        return len(died), "restarted"
    return len(died), "moved" if scene.where(move.name) == move.target else "stayed"


HEADS = ("faults", "moved", "stayed", "restarted", "died", "killed", "doubled", "lost")
LEGEND = """moved, stayed: where the guest was in the end whose move the fault met; restarted: it died with its host, and was started
anew; died: all guests that died with their host; killed: guests that died without that; doubled: guests that ran twice; lost:
faults after which the cluster's view of a guest was not the truth, or a guest did not run, a minute after all was put right"""


def many(scene, count, seed):
    """So many faults, in the order of the seed's dice. Prints a table; returns how many guests were hurt."""
    scene.dice = random.Random(seed)
    table = {fault.__name__: Counter() for fault in FAULTS}
    order = []
    while len(order) < count:
        order += scene.dice.sample(FAULTS, len(FAULTS))
    for number, fault in enumerate(order[:count]):
        row = table[fault.__name__]
        row["faults"] += 1
        began = time.monotonic()
        try:
            died, came = one(scene, fault)
            row["died"] += died
            row[came] += 1
        except Exception as error:  # pylint: disable=broad-except
            traceback.print_exc()
            killed, doubled = getattr(error, "killed", ()), getattr(error, "doubled", ())
            row["killed"] += len(killed)
            row["doubled"] += len(doubled)
            row["lost"] += not killed and not doubled
            came = f"HURT: {error}"
            try:
                scene.heal()
                scene.assert_well()
            except Exception:  # pylint: disable=broad-except
                traceback.print_exc()
        print(f"{time.strftime('%T')} {number:3} {fault.__name__}: {came} ({time.monotonic() - began:.0f} s)", flush=True)
    rows = [*table.items(), ("all", sum(table.values(), Counter()))]
    print("| fault | " + " | ".join(HEADS) + " |\n|---|" + "---:|" * len(HEADS))
    for name, row in rows:
        print(f"| {name.replace('_', ' ')} | " + " | ".join(str(row[head]) for head in HEADS) + " |")
    print(LEGEND)
    return sum(rows[-1][1][head] for head in HEADS[5:])
