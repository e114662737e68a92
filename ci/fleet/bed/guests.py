"""The guests: where they really are, what they say of themselves, and what is on their disks."""

import http.client
import json
import os
import socket
import struct
import threading
import time
from pathlib import Path

from .nodes import SHARED

PAGE = 4096
BLOCKS = 32
MASK = (1 << 64) - 1
# What stamps are made of, as in vmm/guest/abi.rs.
SEED, PER_PAGE, PER_GENERATION, PER_WORD = (
    0x243F6A8885A308D3, 0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)
OWNERS = ("running", "paused", "migrating", "held")


class _Unix(http.client.HTTPConnection):
    """HTTP over a socket of a node's file system."""

    def __init__(self, path):
        super().__init__("vm", timeout=2)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def socket_of(bed, node, name):
    """The socket of a machine's API."""
    return Path(f"/proc/{bed.pids[node]}/root/run/whimbrel/machines/{name}.sock")


def vm(bed, node, name, path="/v1/vm"):
    """What a machine of a node says of itself; None if there is none."""
    if not bed.is_on(node):
        return None
    try:
        caller = _Unix(str(socket_of(bed, node, name)))
    except KeyError:
        return None
    try:
        caller.request("GET", path)
        answer = caller.getresponse()
        return json.loads(answer.read()) if answer.status == 200 else None
    except (OSError, http.client.HTTPException, KeyError, ValueError):
        return None
    finally:
        caller.close()


def machine_file(memory, fill, disk, name):
    """The file of a machine, which keeps a journal if it has a disk."""
    lines = [f"memory = '{memory}M'", "working-set = '1M'", f"fill = '{fill}M'", "serial = 'none'", "rate = 2000"]
    if disk:
        (SHARED / f"{name}.raw").write_bytes(bytes(BLOCKS * PAGE))
        lines += [f"disk = 'storage=fast,file={name}.raw'", f"journal = {BLOCKS}"]
    return "\n".join(lines) + "\n"


class Watch:
    """Looks at all guests all the time. A guest whose ticks go back was started anew; one that runs on two nodes is
    doubled."""

    def __init__(self, bed, names):
        self.bed = bed
        self.names = names
        self.ticks = dict.fromkeys(names, 0)
        self.at = {}
        self.restarts = []
        self.doubled = []
        self.looks = 0
        # How often a guest was seen on another node than before.
        self.moves = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self):
        while True:
            for name in self.names:
                self._look_at(name)
            self.looks += 1
            time.sleep(0.05)

    def _look_at(self, name):
        running = []
        for node in self.bed.names:
            told = vm(self.bed, node, name)
            if not told or told["state"] not in OWNERS:
                continue
            guest = told.get("guest") or {}
            ticks = guest.get("ticks", 0)
            # A held or migrating guest is paused at its switchover.
            if told["state"] == "running":
                running.append((node, ticks, told["pid"]))
                if guest.get("state") == "running":
                    if ticks < self.ticks[name]:
                        self.restarts.append((time.monotonic(), name, node))
                    self.ticks[name] = ticks
                    self.moves += self.at.get(name) not in (None, node)
                    self.at[name] = node
        if len(running) > 1:
            # Asked one after the other, it may have moved in between.
            again = [vm(self.bed, node, name) for node, _, _ in running]
            if sum(1 for told in again if told and told["state"] == "running") > 1:
                self.doubled.append((time.monotonic(), name, running))

    def where(self, name):
        """The nodes on which a guest is, by what the nodes themselves say."""
        told = {node: vm(self.bed, node, name) for node in self.bed.names}
        return [node for node, found in told.items() if found and found["state"] in OWNERS]


def journal(name):
    """Counts the entries of a guest's journal, which is an unbroken series at every moment when nobody writes."""
    image = (SHARED / f"{name}.raw").read_bytes()
    found = [_generation(image[place * PAGE:][:PAGE], place) for place in range(BLOCKS)]
    entries = [None if generation is None else generation * BLOCKS + place for place, generation in enumerate(found)]
    count = max((entry for entry in entries if entry is not None), default=-1) + 1
    for place, entry in enumerate(entries):
        generations = (count + BLOCKS - 1 - place) // BLOCKS
        expected = (generations - 1) * BLOCKS + place if generations else None
        if entry != expected:
            raise AssertionError(f"{name}: block {place} has entry {entry}, not {expected}, of {count}")
    return count


def _generation(block, place):
    words = struct.unpack("<512Q", block)
    if not any(words):
        return None
    inverse = pow(PER_GENERATION, -1, 1 << 64)
    generations = {
        (word - (SEED + place * PER_PAGE + index * PER_WORD)) * inverse & MASK for index, word in enumerate(words)}
    if len(generations) != 1:
        raise AssertionError(f"block {place} is torn")
    return generations.pop()
