"""Runs VMs from start to end: moves their output, keeps the time, takes them down."""

import os
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from rxe_lab.vm import SETUP, LabError, Vm, cache_directory

# Exit codes of the lab itself; any other is the command's own (timeout(1) does the same).
TIMED_OUT = 124
LAB_FAILED = 125

# From the end of the command to the end of QEMU; a healthy VM needs a fraction of it.
GRACE_SECONDS = 20.0

# A VM whose command runs and which uses less than this of a processor in that time stands still. An idle one uses a
# hundred times as much.
STANDSTILL_SECONDS = 60.0
STANDSTILL_CPU_SECONDS = 0.05
LOOK_SECONDS = 5.0


class VmDied(LabError):
    """A VM ended before its command did; the message has the end of its console."""


class VmStandsStill(VmDied):
    """A VM's processors wait for an interrupt that does not come; the message has their registers."""


class OutOfTime(Exception):
    """The time limit passed; the message says how far the VMs came."""


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP arrived."""

    def __init__(self, signum):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def note(text):
    print(f"lab: {text}", file=sys.stderr, flush=True)


class Run:
    """Several VMs from start to end. `sink(node_name, stream, data)` takes their output."""

    def __init__(self, nodes, settings, sink, timeout, leader=None):
        self.nodes = nodes
        self.settings = settings
        self.sink = sink
        self.timeout = timeout
        self.leader = leader
        self.selector = selectors.DefaultSelector()
        self.vms = []
        # For each VM by name: when it last had used more of a processor, and how much.
        self.progress = {}

    def run(self):
        """Returns the exit code of each node by name; raises LabError or Interrupted."""
        cache = cache_directory()
        if not shutil.which("qemu-system-x86_64"):
            raise LabError(f"qemu-system-x86_64 is not there; run '{SETUP}'")
        # QEMU opens a file for every file that is open in a VM.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        with tempfile.TemporaryDirectory(prefix="rxe-lab.") as directory:
            try:
                for node in self.nodes:
                    vm = Vm(node, self.settings, cache, Path(directory))
                    self.vms.append(vm)
                    vm.start()
                    for name, stream in vm.streams.items():
                        # The monitor is listened to when it is asked.
                        if name != "monitor":
                            self.selector.register(stream, selectors.EVENT_READ, (vm, name))
                self._supervise()
            finally:
                for vm in self.vms:
                    vm.kill()
                    if self.settings.logs:
                        vm.keep_logs(self.settings.logs)
        return {vm.node.name: vm.exit_code for vm in self.vms}

    def _supervise(self):
        begin = time.monotonic()
        started = False
        finish_by = None
        while self.selector.get_map():
            limit = begin + self.timeout if finish_by is None else finish_by
            left = limit - time.monotonic()
            if left <= 0 and finish_by is None:
                raise OutOfTime(self._progress())
            if left <= 0:
                # The codes are there; a VM that does not end by itself is ended.
                return
            for key, _ in self.selector.select(min(left, LOOK_SECONDS)):
                self._read(key)
            if finish_by is None:
                self._look()
            if not started and all(vm.ready for vm in self.vms):
                started = True
                for vm in self.vms:
                    vm.tell(b"go")
                if self.settings.verbose:
                    note(f"command started after {time.monotonic() - begin:.1f} s")
            if finish_by is None and self._decided():
                finish_by = time.monotonic() + GRACE_SECONDS
                self._dismiss()
        for vm in self.vms:
            vm.process.wait()

    def _look(self):
        """Whether each VM whose command runs gets on."""
        now = time.monotonic()
        for vm in self.vms:
            used = vm.cpu_seconds()
            since, before = self.progress.get(vm.node.name, (now, used))
            if used is None or vm.exit_code is not None:
                continue
            if used - before > STANDSTILL_CPU_SECONDS:
                since, before = now, used
            self.progress[vm.node.name] = (since, before)
            if now - since > STANDSTILL_SECONDS:
                note(f"VM {vm.node.name} stands still; asking its monitor why")
                raise VmStandsStill(
                    f"VM {vm.node.name} stood still for {now - since:.0f} s; the end of its console:\n"
                    f"{vm.console_tail()}\nand what its monitor says:\n{vm.interrogate()}"
                )

    def _read(self, key):
        vm, name = key.data
        try:
            data = key.fileobj.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            self.selector.unregister(key.fileobj)
            key.fileobj.close()
            if name == "control" and vm.exit_code is None:
                vm.process.wait()
                raise VmDied(vm.post_mortem())
        elif name == "control":
            vm.control(data)
        else:
            self.sink(vm.node.name, name, data)

    def _decided(self):
        deciding = [vm for vm in self.vms if self.leader in (None, vm.node.name)]
        return all(vm.exit_code is not None for vm in deciding)

    def _progress(self):
        late = [vm for vm in self.vms if not vm.ready]
        if late:
            return "\n".join(f"VM {vm.node.name} never came up:\n{vm.console_tail()}" for vm in late)
        running = [vm.node.name for vm in self.vms if vm.exit_code is None]
        return f"the command in VM {' and '.join(running)} was still running"

    def _dismiss(self):
        """Lets the VMs end; those whose command still runs are stopped (--leader)."""
        for vm in self.vms:
            if vm.exit_code is not None:
                vm.tell(b"off")
                continue
            vm.kill()
            for name, stream in vm.streams.items():
                if name != "monitor" and stream.fileno() >= 0:
                    self.selector.unregister(stream)


def attempts(most, once):
    """`once`'s exit code; called again while the lab fails and not the command, `most` times in all."""
    for number in range(1, most + 1):
        try:
            code = once()
        except VmDied as death:
            if number == most:
                raise
            note(str(death))
            code = LAB_FAILED
        if code != LAB_FAILED or number == most:
            break
        note(f"the lab failed, attempt {number} of {most}")
    return code


def install_signal_handlers():
    def interrupt(signum, _frame):
        # A second signal must not break off the cleaning up after the first.
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)


def guarded(main):
    """Runs `main`, turns what can go wrong into exit codes, and ends the process."""
    install_signal_handlers()
    try:
        code = main()
    except LabError as error:
        note(str(error))
        code = LAB_FAILED
    except OutOfTime as error:
        note(f"time is up (--timeout): {error}")
        code = TIMED_OUT
    except BrokenPipeError:
        # The reader of our output has gone. End as a program does that does not ignore SIGPIPE, and keep the
        # interpreter from writing the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Interrupted as error:
        note(f"stopped by {error}")
        code = 128 + error.signum
    sys.exit(code)
