//! The interrupt controllers and the timer, all KVM's.

use crate::ioctl::{self, KvmError};
use kvm_bindings::{kvm_irqchip, kvm_pit_state2};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// Master PIC, slave PIC, IOAPIC: KVM's numbers for them.
const CHIPS: u32 = 3;

/// Both PICs and the IOAPIC.
#[derive(Serialize, Deserialize)]
pub struct IrqchipState {
    chips: [kvm_irqchip; CHIPS as usize],
}

impl IrqchipState {
    pub fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let mut chips = [kvm_irqchip::default(); CHIPS as usize];
        for (chip_id, chip) in (0..CHIPS).zip(&mut chips) {
            chip.chip_id = chip_id;
            ioctl::retried!("KVM_GET_IRQCHIP", vm.get_irqchip(chip))?;
        }
        Ok(IrqchipState { chips })
    }

    pub fn load(&self, vm: &VmFd) -> Result<(), KvmError> {
        for (chip_id, chip) in (0..CHIPS).zip(self.chips) {
            // The position says which chip it is, whatever the state claims.
            ioctl::retried!("KVM_SET_IRQCHIP", vm.set_irqchip(&kvm_irqchip { chip_id, ..chip }))?;
        }
        Ok(())
    }
}

/// The timer.
#[derive(Serialize, Deserialize)]
pub struct PitState(kvm_pit_state2);

impl PitState {
    pub fn save(vm: &VmFd) -> Result<Self, KvmError> {
        Ok(PitState(ioctl::retried!("KVM_GET_PIT2", vm.get_pit2())?))
    }

    pub fn load(&self, vm: &VmFd) -> Result<(), KvmError> {
        ioctl::retried!("KVM_SET_PIT2", vm.set_pit2(&self.0))
    }

    /// The state without the host times at which its channels were loaded.
    pub fn without_time(mut self) -> Self {
        self.0.channels.iter_mut().for_each(|channel| channel.count_load_time = 0);
        self
    }
}
