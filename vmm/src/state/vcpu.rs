//! One vCPU's state.

use crate::component::{Error, Kind};
use crate::ioctl::{self, KvmContext, KvmError};
use crate::vcpu::Vcpu;
use crate::vcpu::msr::MAX_MSRS;
use crate::vcpu::msr::{self, IA32_TSC_DEADLINE};
use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

/// One vCPU's state, in the order in which it is saved.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    #[serde(with = "migration::bounded::bytes")]
    xsave: Vec<u8>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    #[serde(deserialize_with = "migration::bounded::at_most::<MAX_MSRS, _, _>")]
    msrs: Vec<(u32, u64)>,
    tsc_deadline: Option<u64>,
    /// Guest TSC minus host TSC on the source; only differences between vCPUs mean anything
    /// elsewhere. `None` where the source's kernel cannot say.
    pub(super) tsc_offset: Option<u64>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads the state of a parked vCPU.
    pub(crate) fn save(vcpu: &mut Vcpu) -> Result<Self, KvmError> {
        let fd = &vcpu.fd;
        let mp_state = ioctl::retried!("KVM_GET_MP_STATE", fd.get_mp_state())?;
        let regs = ioctl::retried!("KVM_GET_REGS", fd.get_regs())?;
        let sregs = ioctl::retried!("KVM_GET_SREGS", fd.get_sregs())?;
        let mut xsave = vec![0; vcpu.xsave_len.max(size_of::<kvm_xsave>())];
        ioctl::get_xsave(fd, &mut xsave, vcpu.xsave_len).context("KVM_GET_XSAVE2")?;
        let xcrs = ioctl::retried!("KVM_GET_XCRS", fd.get_xcrs())?;
        let debugregs = ioctl::retried!("KVM_GET_DEBUGREGS", fd.get_debug_regs())?;
        let tsc_deadline = match msr::read(fd, IA32_TSC_DEADLINE) {
            Ok(deadline) => Some(deadline),
            // There is no such register. Any other failure would cost the guest its timer.
            Err(error) if error.source.raw_os_error() == Some(libc::EINVAL) => None,
            Err(error) => return Err(error),
        };
        let lapic = ioctl::retried!("KVM_GET_LAPIC", fd.get_lapic())?;
        let msrs = vcpu.msrs.save(fd)?;
        let tsc_offset = if vcpu.tsc_offset {
            Some(ioctl::get_tsc_offset(fd).context("KVM_VCPU_TSC_OFFSET")?)
        } else {
            None
        };
        let events = ioctl::retried!("KVM_GET_VCPU_EVENTS", fd.get_vcpu_events())?;
        Ok(VcpuState {
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debugregs,
            lapic,
            msrs,
            tsc_deadline,
            tsc_offset,
            events,
        })
    }

    /// Sets the state of a parked vCPU, all but its TSC and what needs the TSC.
    pub(crate) fn load(&self, vcpu: &mut Vcpu) -> Result<(), Error> {
        let xsave = self.fitting_xsave(vcpu)?;
        let fd = &vcpu.fd;
        ioctl::retried!("KVM_SET_MP_STATE", fd.set_mp_state(self.mp_state))?;
        ioctl::retried!("KVM_SET_REGS", fd.set_regs(&self.regs))?;
        ioctl::retried!("KVM_SET_SREGS", fd.set_sregs(&self.sregs))?;
        ioctl::set_xsave(fd, &xsave, vcpu.xsave_len).context("KVM_SET_XSAVE")?;
        ioctl::retried!("KVM_SET_XCRS", fd.set_xcrs(&self.xcrs))?;
        ioctl::retried!("KVM_SET_DEBUGREGS", fd.set_debug_regs(&self.debugregs))?;
        ioctl::retried!("KVM_SET_LAPIC", fd.set_lapic(&self.lapic))?;
        msr::restore(&vcpu.fd, vcpu.index, &self.msrs)?;
        // With the flags that KVM gave them: they say which fields are true. (A pending SIPI is not
        // among these; it was turned into `mp_state` when that was read.)
        Ok(ioctl::retried!("KVM_SET_VCPU_EVENTS", vcpu.fd.set_vcpu_events(&self.events))?)
    }

    /// Whether the vCPU has a deadline timer.
    pub(super) fn has_deadline(&self) -> bool {
        self.tsc_deadline.is_some()
    }

    /// Arms the deadline timer again, once LAPIC and TSC are in place.
    pub(crate) fn load_deadline(&self, vcpu: &mut Vcpu) -> Result<(), Error> {
        match self.tsc_deadline {
            Some(deadline) if deadline != 0 => msr::write(&vcpu.fd, vcpu.index, IA32_TSC_DEADLINE, deadline),
            _ => Ok(()),
        }
    }

    /// The XSAVE area in this host's length. What would be cut off must be empty.
    fn fitting_xsave(&self, vcpu: &Vcpu) -> Result<Vec<u8>, Error> {
        let len = vcpu.xsave_len.max(size_of::<kvm_xsave>());
        let mut xsave = self.xsave.clone();
        if xsave.iter().skip(len).any(|byte| *byte != 0) {
            let what = format!("its XSAVE area of {} bytes does not fit this host's {len}", xsave.len());
            return Err(Error::Malformed { kind: Kind::Vcpu, index: vcpu.index, what });
        }
        xsave.resize(len, 0);
        Ok(xsave)
    }

    /// Sets to zero what may differ between two saves of a vCPU that did not run between them.
    pub(super) fn forget_time(&mut self) {
        // The LAPIC timer's current count, which KVM derives from the host's clock.
        const CURRENT_COUNT: usize = 0x390;
        // The processor priority, which KVM derives from the task priority and the interrupts in
        // service, but only when it needs it: a save may show an older one.
        const PROCESSOR_PRIORITY: usize = 0xa0;
        for register in [CURRENT_COUNT, PROCESSOR_PRIORITY] {
            self.lapic.regs[register..register + 4].fill(0);
        }
        self.tsc_offset = None;
    }

    /// The state in parts, named, to be compared one by one.
    pub(super) fn name_parts(&self, index: usize, out: &mut Vec<(String, Vec<u8>)>) -> Result<(), Error> {
        let mut add = |name: &str, part: postcard::Result<Vec<u8>>| {
            out.push((format!("{name} of vCPU {index}"), part?));
            Ok::<_, Error>(())
        };
        add("mp_state", postcard::to_stdvec(&self.mp_state))?;
        add("regs", postcard::to_stdvec(&self.regs))?;
        add("sregs", postcard::to_stdvec(&self.sregs))?;
        add("xsave", postcard::to_stdvec(&self.xsave))?;
        add("xcrs", postcard::to_stdvec(&self.xcrs))?;
        add("debugregs", postcard::to_stdvec(&self.debugregs))?;
        add("lapic", postcard::to_stdvec(&self.lapic))?;
        add("TSC deadline", postcard::to_stdvec(&self.tsc_deadline))?;
        add("events", postcard::to_stdvec(&self.events))?;
        for (msr, value) in &self.msrs {
            add(&format!("MSR {msr:#x}"), postcard::to_stdvec(value))?;
        }
        Ok(())
    }
}
