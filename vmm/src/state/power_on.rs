//! What a machine's processors and interrupt controllers are like when it is built: the state that a reset
//! gives them again.

use super::clock;
use super::irqchip::{IrqchipState, PitState};
use super::vcpu::VcpuState;
use crate::component::Error;
use crate::ioctl;
use crate::lock::lock;
use crate::vcpu::Vcpu;
use crate::vcpu::msr::{self, IA32_TSC_DEADLINE};
use kvm_ioctls::VmFd;
use std::sync::Mutex;

/// The state of what KVM has, as it was before the guest's first instruction.
pub struct PowerOn {
    vcpus: Vec<VcpuState>,
    irqchip: IrqchipState,
    pit: PitState,
}

impl PowerOn {
    /// That of a machine that has not run.
    pub(crate) fn of(vm: &VmFd, vcpus: &[Mutex<Vcpu>]) -> Result<Self, Error> {
        Ok(PowerOn {
            vcpus: vcpus.iter().map(|vcpu| VcpuState::save(&mut lock(vcpu))).collect::<Result<_, _>>()?,
            irqchip: IrqchipState::save(vm)?,
            pit: PitState::save(vm)?,
        })
    }

    /// Gives it to a machine whose vCPUs are all parked. Real time and kvmclock go on; TSCs go on from the
    /// machine's beginning, all in step.
    pub(crate) fn restore(&self, vm: &VmFd, vcpus: &[Mutex<Vcpu>]) -> Result<(), Error> {
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            let mut vcpu = lock(vcpu);
            // An INIT or SIPI that is still on its way arrives now, and not after the reset.
            ioctl::retried!("KVM_GET_MP_STATE", vcpu.fd.get_mp_state())?;
            state.load(&mut vcpu)?;
            if state.has_deadline() {
                msr::write(&vcpu.fd, vcpu.index, IA32_TSC_DEADLINE, 0)?;
            }
            clock::reset_tsc(&vcpu, state)?;
        }
        self.irqchip.load(vm)?;
        Ok(self.pit.load(vm)?)
    }
}
