"""`rxe-lab doctor`: what the lab needs, what of it is there, and what to do about the rest."""

import os
import platform
import shutil
import subprocess

from rxe_lab.options import ROOT_PATH
from rxe_lab.vm import HERE, LabError, cache_directory


def virtual_machine():
    """Whether the emulated VM can run, as lines (good, text)."""
    if platform.machine() != "x86_64":
        yield False, f"the VM is an x86-64 one, and this machine is {platform.machine()}"
        return
    if not shutil.which("dpkg-query"):
        yield False, "this is not Debian, whose packages and kernel the VM is made of"
        return
    listing = subprocess.run(["bash", HERE / "setup", "--packages"], check=True, text=True, stdout=subprocess.PIPE)
    if missing := listing.stdout.split():
        yield False, f"packages are missing; as root, run: apt-get update && apt-get install {' '.join(missing)}"
    else:
        yield True, "all packages are there"
    try:
        yield True, f"kernel {(cache_directory() / 'release').read_text().strip()} is ready"
    except LabError as error:
        yield False, str(error)


def on_the_machine():
    """What stands against --native, as far as it can be told without trying; None if nothing does."""
    modprobe = shutil.which("modprobe", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *ROOT_PATH]))
    if not modprobe:
        return "there is no modprobe (package kmod)"
    asked = subprocess.run([modprobe, "--dry-run", "rdma_rxe"], check=False, text=True, stderr=subprocess.PIPE)
    if asked.returncode:
        return (asked.stderr.strip().splitlines() or ["there is no rdma_rxe"])[-1]
    return None


def main(arguments):
    """Prints a line for each thing that was looked at; returns 0 if the lab can run a command here."""
    if arguments:
        raise LabError("doctor takes no arguments")
    fine = True
    for good, text in virtual_machine():
        print(f"{'ok     ' if good else 'MISSING'} {text}")
        fine = fine and good
    print(f"the emulated VM can{'' if fine else 'not'} run here")
    reason = on_the_machine()
    print("the machine's own rdma_rxe " + (f"cannot be used: {reason}" if reason else "may be used by root: run --native auto"))
    return 0 if fine else 1
