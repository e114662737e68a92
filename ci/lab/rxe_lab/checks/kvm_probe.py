#!/usr/bin/env python3
"""Runs the smallest KVM guest there is: real-mode code that adds, writes to a port, halts.

Exits 0 if /dev/kvm gives a VM, a vCPU and the right sum, and a write of the guest shows in
KVM's dirty log. With `high` the guest is entered at an address in the upper half instead, once, whatever it does
there, for a second at most: what the lab takes for the emulator's fault under `--low-guests`. With `vmrun` that is the
address of the VM's own VMRUN, for `--linux-guests`.
"""

import ctypes
import fcntl
import mmap
import os
import signal
import struct
import sys

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_RUN = 0xAE80
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_GET_DIRTY_LOG = 0x4010AE42
KVM_GET_REGS, KVM_SET_REGS = 0x8090AE81, 0x4090AE82
KVM_GET_SREGS, KVM_SET_SREGS = 0x8138AE83, 0x4138AE84
KVM_MEM_LOG_DIRTY_PAGES = 1
EXIT_IO, EXIT_HLT = 2, 5
PORT = 0x3F8
ENTRY = 0x1000
HIGH = 0xFFFF8000 << 32
VMRUN = "__svm_vcpu_run"
WRITTEN_PAGE = 3
# mov dx,PORT; add al,bl; out dx,al; mov [WRITTEN_PAGE * 4096],al; hlt
CODE = bytes([0xBA, PORT & 0xFF, PORT >> 8, 0x00, 0xD8, 0xEE, 0xA2, 0x00, WRITTEN_PAGE << 4, 0xF4])
SIZE = 16 * 4096


def main(entry):
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    assert fcntl.ioctl(kvm, KVM_GET_API_VERSION) == 12
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    memory = mmap.mmap(-1, SIZE)
    memory[ENTRY : ENTRY + len(CODE)] = CODE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    region = struct.pack("=IIQQQ", 0, KVM_MEM_LOG_DIRTY_PAGES, 0, SIZE, address)
    fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, region)
    vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    run = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE))

    sregs = bytearray(fcntl.ioctl(vcpu, KVM_GET_SREGS, bytes(0x138)))
    # cs is the first segment: base (u64), limit (u32), selector (u16).
    struct.pack_into("=Q", sregs, 0, 0)
    struct.pack_into("=H", sregs, 12, 0)
    fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(sregs))
    regs = [0] * 18
    regs[0], regs[1], regs[16], regs[17] = 2, 3, entry or ENTRY, 2  # rax, rbx, rip, rflags
    fcntl.ioctl(vcpu, KVM_SET_REGS, struct.pack("=18Q", *regs))

    if entry:
        signal.setitimer(signal.ITIMER_REAL, 1)
    fcntl.ioctl(vcpu, KVM_RUN, 0)
    if entry:
        return
    (reason,) = struct.unpack_from("=I", run, 8)
    assert reason == EXIT_IO, f"exit reason {reason}, not I/O"
    _, _, port, _, offset = struct.unpack_from("=BBHIQ", run, 32)
    assert (port, run[offset]) == (PORT, 5), f"port {port:#x} got {run[offset]}"
    fcntl.ioctl(vcpu, KVM_RUN, 0)
    (reason,) = struct.unpack_from("=I", run, 8)
    assert reason == EXIT_HLT, f"exit reason {reason}, not halt"

    bitmap = ctypes.create_string_buffer(8)
    log = struct.pack("=IIQ", 0, 0, ctypes.addressof(bitmap))
    fcntl.ioctl(vm, KVM_GET_DIRTY_LOG, log)
    (dirty,) = struct.unpack("=Q", bitmap.raw)
    assert dirty >> WRITTEN_PAGE & 1, f"dirty log {dirty:#x}"
    print(f"nested KVM: 2 + 3 = 5, dirty log {dirty:#x}")


def out_of_time(*_):
    os._exit(0)


def entry(name):
    """Where else the guest is to be entered."""
    if name == "vmrun":
        with open("/proc/kallsyms") as symbols:
            return next(int(line.split()[0], 16) for line in symbols if line.split()[2] == VMRUN)
    return HIGH + ENTRY if name == "high" else None


signal.signal(signal.SIGALRM, out_of_time)
main(entry(sys.argv[1] if len(sys.argv) > 1 else ""))
sys.stdout.flush()
# Not through the interpreter's end: `memory` is still exported to ctypes.
os._exit(0)
