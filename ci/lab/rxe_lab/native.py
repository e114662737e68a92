"""`run --native`: the same two RDMA devices, made by the machine's own kernel instead of a VM's."""

import fcntl
import os
import subprocess
import tempfile
import time
from pathlib import Path

from rxe_lab.supervise import OutOfTime, note
from rxe_lab.vm import HERE, RDMA_MODULES, LabError, die_with_parent, enter_script

# There is one set of names and addresses on a machine, so native runs go one after the other. The file's content says
# whether a link is there that a killed run has left.
STATE = Path("/run/rxe-lab.native")
NAMES = ["/sys/class/net/lab0", "/sys/class/net/lab1", "/sys/class/infiniband/rxe0", "/sys/class/infiniband/rxe1"]
# Newer kernels have it built in, under another name.
OPTIONAL_MODULES = ["crc32_generic"]
# The command's own processes: with their first one, all of them end.
NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
PING_SECONDS = 20.0
PING_PORT = "18577"


class Unavailable(LabError):
    """This machine cannot make the devices itself; the message says why."""


def _try(*command, environment=None):
    """Runs a command that has to succeed; what it complained of becomes the reason otherwise."""
    try:
        done = subprocess.run(
            command,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
    except FileNotFoundError:
        raise Unavailable(f"not native: there is no {command[0]}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise Unavailable(f"not native: {' '.join(command[:3])}: {said[-1]}")


def _links(function, mtu):
    """Calls a function of guest/links."""
    _try("sh", "-ec", f'. "$0"; {function}', str(HERE / "guest/links"), environment={"LAB_MTU": str(mtu)})


def _ping():
    """Whether messages really go from one device to the other: a container's kernel may accept all that comes before."""
    common = ["ibv_rc_pingpong", "-g", "1", "-n", "10", "-p", PING_PORT]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    end = time.monotonic() + PING_SECONDS
    try:
        with subprocess.Popen([*common, "-d", "rxe1"], preexec_fn=die_with_parent, **quiet) as server:
            try:
                while server.poll() is None and time.monotonic() < end:
                    client = [*common, "-d", "rxe0", "10.77.0.2"]
                    if subprocess.run(client, timeout=PING_SECONDS, check=False, **quiet).returncode == 0:
                        return
                    time.sleep(0.1)
            except subprocess.TimeoutExpired:
                pass
            finally:
                server.kill()
    except FileNotFoundError:
        raise Unavailable("not native: there is no ibv_rc_pingpong (package ibverbs-utils)") from None
    raise Unavailable("not native: the devices can be made here, but no message comes from one to the other")


class Link:
    """The devices rxe0 and rxe1 and their link, for as long as it is entered."""

    def __init__(self, settings):
        self.settings = settings
        self.state = None

    def __enter__(self):
        if os.geteuid() != 0:
            raise Unavailable("not native: only root can load modules and make interfaces")
        for module in RDMA_MODULES + ["veth"] + self.settings.modules:
            try:
                _try("modprobe", module)
            except Unavailable:
                if module not in OPTIONAL_MODULES:
                    raise
        _try(*NAMESPACES, "true")
        self.state = open(STATE, "a+", encoding="ascii")
        fcntl.flock(self.state, fcntl.LOCK_EX)
        try:
            if STATE.read_text(encoding="ascii"):
                self._remove()
            self._make()
        except BaseException:
            self.state.close()
            raise
        return self

    def _make(self):
        if taken := [name for name in NAMES if os.path.exists(name)]:
            raise Unavailable(f"not native: {' '.join(taken)} is there already, and would be in the way")
        STATE.write_text("linked\n", encoding="ascii")
        try:
            _links("link_veth", self.settings.mtu)
            _ping()
        except BaseException:
            self._remove()
            raise

    def _remove(self):
        _links("unlink_veth || true", self.settings.mtu)
        STATE.write_text("", encoding="ascii")

    def __exit__(self, *_):
        try:
            self._remove()
        finally:
            self.state.close()


def run(node, settings, timeout):
    """Runs the node's command while a `Link` is entered; returns its exit code."""
    with tempfile.NamedTemporaryFile("w", prefix="rxe-lab.", encoding="utf-8") as enter:
        enter.write(enter_script(node, settings))
        enter.flush()
        if settings.verbose:
            note("the command starts on the machine itself")
        # The first process of its namespace must not be the command: it would not get signals that it does not handle.
        command = [*NAMESPACES, "sh", "-c", 'sh "$0"; exit $?', enter.name]
        with subprocess.Popen(
            command,
            env={},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        ) as process:
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise OutOfTime("the command was still running") from None
            finally:
                process.kill()
    return code if code >= 0 else 128 - code
