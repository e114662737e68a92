//! One vCPU: creating it, and running it until it is told to park.

pub(crate) mod control;
pub(crate) mod kick;
pub(crate) mod msr;
pub(crate) mod outcome;
pub(crate) mod stats;
pub(crate) mod throttle;

use crate::devices::Devices;
use crate::ioctl::{self, KvmError};
use crate::power::Request;
use control::Control;
use kvm_bindings::{
    CpuId, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{Cap, VcpuExit, VcpuFd, VmFd};
use msr::MsrTable;
use outcome::{Crash, Outcome};

/// One vCPU and what saving it needs, prepared so that nothing is looked up during a blackout.
pub struct Vcpu {
    pub(crate) fd: VcpuFd,
    pub(crate) index: u8,
    pub(crate) msrs: MsrTable,
    /// Length of the XSAVE area as KVM_CAP_XSAVE2 reports it; 0 where KVM has only the old call.
    pub(crate) xsave_len: usize,
    /// Whether the TSC offset can be read and set as such.
    pub(crate) tsc_offset: bool,
}

impl Vcpu {
    /// Creates vCPU `index` with `cpuid`. `msrs` are all that KVM can save on this host.
    pub fn new(
        vm: &VmFd,
        index: u8,
        cpuid: &CpuId,
        tsc_khz: Option<u32>,
        msrs: &[u32],
    ) -> Result<Self, KvmError> {
        let fd = ioctl::retried!("KVM_CREATE_VCPU", vm.create_vcpu(u64::from(index)))?;
        // Before anything that the clock derives from.
        if let Some(khz) = tsc_khz
            && ioctl::retried!("KVM_GET_TSC_KHZ", fd.get_tsc_khz())? != khz
        {
            ioctl::retried!("KVM_SET_TSC_KHZ (this host cannot scale the TSC to the guest's)", {
                fd.set_tsc_khz(khz)
            })?;
        }
        ioctl::retried!("KVM_SET_CPUID2", fd.set_cpuid2(cpuid))?;
        let msrs = MsrTable::probe(&fd, msrs)?;
        let reported = ioctl::capability(vm, Cap::Xsave2 as u32)?;
        let tsc_offset = ioctl::get_tsc_offset(&fd).is_ok();
        Ok(Vcpu { fd, index, msrs, xsave_len: reported as usize, tsc_offset })
    }

    /// The page shared with KVM.
    pub(crate) fn run_page(&mut self) -> *mut kvm_run {
        self.fd.get_kvm_run()
    }

    /// Runs the guest until the machine is paused or ends.
    pub fn run(&mut self, control: &Control, devices: &Devices) {
        loop {
            let end = match self.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => {
                    devices.port_in(port, data);
                    None
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    devices.port_out(port, data).map(|request| match request {
                        Request::Reset => Outcome::Reset,
                        Request::PowerOff => Outcome::PoweredOff,
                    })
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    devices.mmio_read(address, data);
                    None
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    devices.mmio_write(address, data);
                    None
                }
                Ok(VcpuExit::Intr | VcpuExit::IoapicEoi(_)) => None,
                Ok(VcpuExit::Shutdown) => Some(Outcome::Crashed(Crash::TripleFault { vcpu: self.index })),
                Ok(VcpuExit::SystemEvent(event, _)) => self.system_event(event),
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    Some(Outcome::Crashed(Crash::Entry { vcpu: self.index, reason }))
                }
                Ok(VcpuExit::InternalError) => Some(Outcome::Crashed(self.internal_error())),
                Ok(exit) => {
                    let what = format!("exit {exit:?}");
                    Some(Outcome::Crashed(Crash::Unknown { vcpu: self.index, what }))
                }
                // EINTR: kicked. EAGAIN: a vCPU that waits to be started was woken.
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
                    let kicked = error.errno() == libc::EINTR;
                    if kicked && !control.go_on(self.index, || self.fd.set_kvm_immediate_exit(0)) {
                        return;
                    }
                    None
                }
                Err(error) => {
                    let what = format!("KVM_RUN: {error}");
                    Some(Outcome::Crashed(Crash::Unknown { vcpu: self.index, what }))
                }
            };
            if let Some(outcome) = end {
                control.end(outcome);
                return self.finish_io();
            }
        }
    }

    /// Completes the exit that ended the guest, so that its registers are whole to be looked at.
    fn finish_io(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        // Comes straight back with EINTR; any other answer leaves nothing to be done about it.
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    fn system_event(&self, event: u32) -> Option<Outcome> {
        match event {
            KVM_SYSTEM_EVENT_SHUTDOWN => Some(Outcome::PoweredOff),
            KVM_SYSTEM_EVENT_RESET => Some(Outcome::Reset),
            KVM_SYSTEM_EVENT_CRASH => Some(Outcome::Crashed(Crash::Reported { vcpu: self.index })),
            _ => None,
        }
    }

    fn internal_error(&mut self) -> Crash {
        let vcpu = self.index;
        let rip = ioctl::retried!("KVM_GET_REGS", self.fd.get_regs()).map_or(0, |regs| regs.rip);
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, for which KVM fills in this member.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        if internal.suberror != KVM_INTERNAL_ERROR_EMULATION {
            return Crash::Internal { vcpu, suberror: internal.suberror, rip };
        }
        // SAFETY: as above; for this suberror the same bytes have this finer layout.
        let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
        let mut bytes = String::new();
        let has_bytes = failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        if failure.ndata >= 3 && has_bytes {
            // SAFETY: the flag says that the instruction's size and bytes are there.
            let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let len = usize::from(instruction.insn_size).min(instruction.insn_bytes.len());
            bytes = instruction.insn_bytes[..len].iter().map(|b| format!("{b:02x}")).collect();
        }
        Crash::Emulation { vcpu, rip, bytes }
    }
}
