"""A way between two hosts on which answers come late, until nothing passes any more."""

import contextlib
import socket
import threading
import time

from .nodes import sh

ADDRESS = "10.9.0.200"
PORT = 4444


class LateWay:
    """A proxy for the service of a node, for one that is to reach it by its name. What that node answers comes late."""

    def __init__(self, bed, source, target, delay):
        self.bed, self.source, self.target, self.delay = bed, source, target, delay
        self.sockets = []

    def __enter__(self):
        sh(f"ip address add {ADDRESS}/24 dev br0")
        self.listener = socket.create_server((ADDRESS, PORT))
        threading.Thread(target=self._serve, daemon=True).start()
        self._name(f"10.9.0.{self.target[1:]}", ADDRESS)
        return self

    def __exit__(self, *_):
        self.cut()
        self._name(ADDRESS, f"10.9.0.{self.target[1:]}")
        sh(f"ip address del {ADDRESS}/24 dev br0")

    def _name(self, old, new):
        if self.bed.is_on(self.source):
            self.bed.run(self.source, "sed", "-i", f"s/^{old} {self.target}$/{new} {self.target}/", "/etc/hosts")

    def cut(self):
        """Nothing passes any more."""
        for each in [self.listener, *self.sockets]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self.listener.accept()
                called = socket.create_connection((f"10.9.0.{self.target[1:]}", PORT))
                self.sockets += [caller, called]
                threading.Thread(target=self._carry, args=(caller, called, 0), daemon=True).start()
                threading.Thread(target=self._carry, args=(called, caller, self.delay), daemon=True).start()

    @staticmethod
    def _carry(of, to, delay):
        with contextlib.suppress(OSError):
            while part := of.recv(1 << 20):
                time.sleep(delay)
                to.sendall(part)
            to.shutdown(socket.SHUT_WR)
