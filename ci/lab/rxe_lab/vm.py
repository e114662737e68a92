"""A throw-away virtual machine under plain emulation: its command line, job and streams.

Nothing of the host is needed but QEMU and the cache that `setup` made: no KVM, no root, no
network. All lines between the host and a VM (streams, control, the cable of a pair) are
socket pairs that QEMU inherits, so there are no ports or paths for parallel runs to
collide on, and nothing to clean up.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
# What to run when something is missing: beside this package in a source tree, or by the installed command.
SETUP = str(HERE.parent / "setup") if (HERE.parent / "setup").exists() else "rxe-lab setup"
# Loaded in every VM. Everything else loads on first use: netem, bridge, tun, vhost-net, nvme, ...
MODULES = ["kvm_amd"]
# What RDMA devices and their links need besides.
RDMA_MODULES = ["crc32_generic", "rdma_rxe", "rdma_ucm"]
LINK_MODULES = {"veth": [*RDMA_MODULES, "veth"], "pair": [*RDMA_MODULES, "virtio_net"], "none": []}
CONSOLE_TAIL_LINES = 40
# How long the monitor is listened to.
MONITOR_SECONDS = 3.0
# Everything that QEMU can emulate, except the two flags that make a kernel copy and clear by `rep movsb` and `rep stosb`.
# Emulation carries these out byte by byte. Without the flags the kernel uses eight bytes at a time, and memory and RDMA
# are twice as fast.
CPU = "max,-erms,-fsrm"


class LabError(Exception):
    """The lab could not do its part; the message says what to do."""


@dataclass
class Settings:
    """What all VMs of one run have in common."""

    cpus: int = 2
    memory: str = "4G"
    mtu: int = 9000
    memlock: str = "unlimited"
    environment: dict = field(default_factory=dict)
    writable: list = field(default_factory=list)
    modules: list = field(default_factory=list)
    # Where console and QEMU logs stay; None: a temporary directory.
    logs: Path | None = None
    guests: str = ""
    verbose: bool = False


@dataclass
class Node:
    """One VM's place: its name, its command and its addresses."""

    name: str
    command: list
    link: str  # "veth": both ends of the cable in this VM; "pair": one end; "none": no cable, no device
    address: str
    peer: str
    device: str = "rxe0"
    peer_device: str = "rxe0"
    cable: socket.socket | None = None
    mac: str = ""


def cache_directory():
    """The directory with kernel, modules and initramfs; LabError if it is stale or absent."""
    base = os.environ.get("RXE_LAB_CACHE")
    if not base:
        xdg = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        base = Path(xdg) / "rxe-lab"
    current = (Path(base) / "current").resolve()
    made_from = hashlib.sha256((HERE / "guest/init").read_bytes()).hexdigest()
    try:
        stamp = (current / "stamp").read_text().strip()
    except OSError:
        stamp = None
    if stamp != made_from:
        raise LabError(f"{base} is {'stale' if stamp else 'empty'}; run '{SETUP}'")
    return current


def die_with_parent():
    """In the child: a supervisor that is killed outright takes its QEMU along."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class Vm:
    """One QEMU process with its command, streams and verdict."""

    def __init__(self, node, settings, cache, directory):
        self.node = node
        self.settings = settings
        self.cache = cache
        self.directory = directory / node.name
        self.console = self.directory / "console.log"
        self.process = None
        self.exit_code = None
        self.failed = False
        self.ready = False
        self.streams = {}
        self._control_line = b""

    def start(self):
        job = self.directory / "job"
        job.mkdir(parents=True)
        self._write_job(job)
        inherited = []
        for name in ("control", "stdout", "stderr", "monitor"):
            ours, theirs = socket.socketpair()
            self.streams[name] = ours
            inherited.append(theirs)
        arguments = self._qemu(job, [end.fileno() for end in inherited])
        if self.node.cable:
            inherited.append(self.node.cable)
        with open(self.directory / "qemu.log", "wb") as log:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[end.fileno() for end in inherited],
                # ^C at a terminal is for us to act on, not for QEMU.
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        for end in inherited:
            end.close()

    def _write_job(self, job):
        """Writes the files that `guest/stage2` reads from its job share."""
        node, settings = self.node, self.settings
        release = (self.cache / "release").read_text().strip()
        modules = MODULES + LINK_MODULES[node.link] + settings.modules
        config = {
            "LAB_MODULES": self.cache / "lib/modules" / release,
            "LAB_LOAD": " ".join(modules),
            "LAB_LINK": node.link,
            "LAB_HOSTNAME": f"lab-{node.name}" if node.link == "pair" else "lab",
            "LAB_ADDR": node.address,
            "LAB_MTU": settings.mtu,
            "LAB_GUESTS": settings.guests,
        }
        lines = [f"{name}={shlex.quote(str(value))}\n" for name, value in config.items()]
        (job / "config").write_text("".join(lines))
        shares = [f"share{i} {path}\n" for i, path in enumerate(settings.writable)]
        (job / "shares").write_text("".join(shares))
        in_cgroup = "echo 0 >/sys/fs/cgroup/lab/cgroup.procs\n"
        (job / "enter").write_text(in_cgroup + enter_script(node, settings))
        for name in ("stage2", "links"):
            shutil.copyfile(HERE / "guest" / name, job / name)

    def _qemu(self, job, ports):
        settings = self.settings
        arguments = ["qemu-system-x86_64", "-name", f"lab-{self.node.name}"]
        arguments += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        arguments += ["-machine", "q35", "-accel", "tcg,thread=multi"]
        arguments += ["-cpu", CPU]
        arguments += ["-smp", str(settings.cpus), "-m", settings.memory]
        arguments += ["-kernel", str(self.cache / "vmlinux")]
        arguments += ["-initrd", str(self.cache / "initramfs.cpio")]
        arguments += ["-append", KERNEL_COMMAND_LINE]
        arguments += ["-chardev", f"file,id=console,path={escape(self.console)}"]
        arguments += ["-serial", "chardev:console"]
        arguments += ["-device", "virtio-serial-pci"]
        *ports, monitor = ports
        arguments += ["-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=readline"]
        for number, descriptor in enumerate(ports, 1):
            arguments += ["-chardev", f"socket,id=port{number},fd={descriptor}"]
            arguments += ["-device", f"virtserialport,chardev=port{number},nr={number}"]
        arguments += share("root", "/", "readonly=on,multidevs=remap")
        arguments += share("job", job, "readonly=on")
        for number, path in enumerate(settings.writable):
            arguments += share(f"share{number}", path, "multidevs=remap")
        if self.node.cable:
            arguments += ["-netdev", f"socket,id=cable,fd={self.node.cable.fileno()}"]
            arguments += [
                "-device",
                f"virtio-net-pci,netdev=cable,mac={self.node.mac},host_mtu={settings.mtu},romfile=",
            ]
        return arguments

    def control(self, data):
        """Takes what the VM wrote to its control port."""
        *lines, self._control_line = (self._control_line + data).split(b"\n")
        for line in lines:
            match line.split():
                case [b"ready"]:
                    self.ready = True
                case [b"exit", code]:
                    self.exit_code = int(code)
                case [b"failed"]:
                    self.failed = True

    def tell(self, word):
        """`go` lets the command start, `off` ends the VM when its command has ended."""
        try:
            self.streams["control"].sendall(word + b"\n")
        except OSError:
            # It is gone already; reading its streams tells the rest.
            pass

    def cpu_seconds(self):
        """What QEMU has used so far of processors; None once it has ended."""
        try:
            after_name = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")

    def interrogate(self):
        """What QEMU says of its processors and their interrupts, as its monitor prints it."""
        monitor = self.streams["monitor"]
        monitor.settimeout(MONITOR_SECONDS)
        said = b""
        try:
            monitor.sendall(b"info status\ninfo cpus\ninfo registers -a\ninfo lapic\ninfo pic\n")
            while data := monitor.recv(1 << 16):
                said += data
        except OSError:
            # It has said all that it had to say, or is gone.
            pass
        lines = said.decode(errors="replace").replace("\r", "").splitlines()
        # Without the echo of what was asked, which the monitor draws letter by letter.
        return "\n".join(line for line in lines if not line.startswith("(qemu)"))

    def kill(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def keep_logs(self, destination):
        """Copies the console (kernel messages) and QEMU's own words to a directory."""
        for log in (self.console, self.directory / "qemu.log"):
            if log.exists():
                shutil.copyfile(log, destination / f"{self.node.name}.{log.name}")

    def post_mortem(self):
        """Why there is no exit code, for a human, with the end of the console."""
        tail = self.console_tail()
        if self.console.exists() and b"Kernel panic" in self.console.read_bytes():
            reason = "its kernel panicked"
        elif self.failed:
            reason = "it could not set itself up"
        elif self.process.returncode:
            reason = f"QEMU ended with status {self.process.returncode}"
        else:
            reason = "it stopped before the command ended"
        return f"VM {self.node.name}: {reason}; the end of its console:\n{tail}"

    def console_tail(self):
        """The last lines of the console and of what QEMU itself said."""
        lines = []
        for log in (self.console, self.directory / "qemu.log"):
            if log.exists():
                lines += log.read_text(errors="replace").replace("\r", "").splitlines()
        return "\n".join(lines[-CONSOLE_TAIL_LINES:])


# No mitigations, watchdogs or audit: all of it is emulated, and slow. An oops is a panic,
# since nothing measured after it means anything; a panic restarts at once, which under
# -no-reboot ends QEMU.
KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nowatchdog nokaslr audit=0 "
    "tsc=reliable no_timer_check random.trust_cpu=on cryptomgr.notests net.ifnames=0 "
    "transparent_hugepage=madvise "
    # A kernel that hangs panics, like one that oopses. The emulator's fault causes either.
    "rcupdate.rcu_cpu_stall_timeout=60 sysctl.kernel.panic_on_rcu_stall=1"
)


def enter_script(node, settings):
    """The shell script that becomes the node's command, in its surroundings."""
    environment = {
        "LAB": "1",
        "LAB_NODE": node.name,
        "LAB_ADDR": node.address,
        "LAB_PEER": node.peer,
        "LAB_DEVICE": node.device,
        "LAB_PEER_DEVICE": node.peer_device,
    } | settings.environment
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines.append(f"cd {shlex.quote(os.getcwd())} || exit 126")
    command = shlex.join(node.command)
    if settings.memlock == "unlimited":
        lines.append("ulimit -l unlimited")
    else:
        # CAP_IPC_LOCK overrides the limit, so root has to lose it to feel it.
        lines.append(f"ulimit -l {parse_size(settings.memlock) // 1024}")
        command = f"setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock -- {command}"
    lines.append(f"exec {command}")
    return "\n".join(lines) + "\n"


def escape(path):
    """A path inside a QEMU option: a comma is written twice."""
    return str(path).replace(",", ",,")


def share(tag, path, options):
    """A host directory for the VM over 9p."""
    return [
        "-fsdev",
        f"local,id={tag},path={escape(path)},security_model=none,{options}",
        "-device",
        f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
    ]


def parse_size(text):
    """Bytes, from a number with an optional K, M or G."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    try:
        return int(text[:-1]) * factor if factor else int(text)
    except ValueError:
        raise LabError(f"{text!r} is no size; write for example 8M or unlimited") from None
