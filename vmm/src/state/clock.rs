//! Time: kvmclock and the TSC, carried over a blackout.
//!
//! A guest's clocks must go on as if the blackout had been a pause of the CPU: never backwards, and
//! not losing the time that passed. The source saves its TSC and kvmclock together with
//! CLOCK_REALTIME, and the destination moves both on by the real time that has passed since, as
//! KVM itself does for kvmclock with KVM_CLOCK_REALTIME. Where the two hosts' clocks disagree so
//! much that no time seems to have passed, or more than the migration has taken so far, they go on from where
//! they stopped.
//!
//! All vCPUs' TSCs are moved by the same amount, by their offsets, so that they stay as much in
//! step as they were: two writes of IA32_TSC would leave the time between the writes between them.

use super::vcpu::VcpuState;
use crate::component::Error;
use crate::ioctl::{self, KvmContext, KvmError};
use crate::vcpu::Vcpu;
use crate::vcpu::msr::{self, IA32_TSC};
use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VmFd};
use serde::{Deserialize, Serialize};
use std::ops::DerefMut;
use std::time::Duration;

/// A machine's time at the moment it was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// kvmclock, in nanoseconds since the machine began.
    kvmclock: u64,
    /// CLOCK_REALTIME in nanoseconds when `kvmclock` was read, if KVM says.
    kvmclock_realtime: Option<u64>,
    /// The boot vCPU's TSC.
    guest_tsc: u64,
    /// CLOCK_REALTIME in nanoseconds when `guest_tsc` was read, or just after.
    tsc_realtime: u64,
    /// Guest TSC ticks per millisecond.
    tsc_khz: u32,
}

/// CLOCK_REALTIME in nanoseconds.
fn realtime() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

impl ClockState {
    pub fn save(vm: &VmFd, boot_vcpu: &Vcpu) -> Result<Self, KvmError> {
        let guest_tsc = msr::read(&boot_vcpu.fd, IA32_TSC)?;
        let tsc_realtime = realtime();
        let clock = ioctl::retried!("KVM_GET_CLOCK", vm.get_clock())?;
        let has_realtime = clock.flags & KVM_CLOCK_REALTIME != 0;
        Ok(ClockState {
            kvmclock: clock.clock,
            kvmclock_realtime: has_realtime.then_some(clock.realtime),
            guest_tsc,
            tsc_realtime,
            tsc_khz: ioctl::retried!("KVM_GET_TSC_KHZ", boot_vcpu.fd.get_tsc_khz())?,
        })
    }

    /// The same, as if it had been saved now, and how much time seems to have passed, if that is more than
    /// can have passed: this host's clock is then ahead of the other's. Without it, the guest's would leap by
    /// as much.
    pub fn plausible(self, most: Duration) -> (Self, Option<Duration>) {
        self.plausible_at(realtime(), most)
    }

    fn plausible_at(self, now: u64, most: Duration) -> (Self, Option<Duration>) {
        let passed = Duration::from_nanos(now.saturating_sub(self.tsc_realtime));
        if passed <= most {
            return (self, None);
        }
        let kvmclock_realtime = self.kvmclock_realtime.map(|_| now);
        (ClockState { tsc_realtime: now, kvmclock_realtime, ..self }, Some(passed))
    }

    /// What the boot vCPU's TSC should read at CLOCK_REALTIME `now`.
    fn tsc_at(&self, now: u64) -> u64 {
        let elapsed = now.saturating_sub(self.tsc_realtime);
        let ticks = u128::from(elapsed) * u128::from(self.tsc_khz) / 1_000_000;
        self.guest_tsc.wrapping_add(ticks as u64)
    }

    /// Sets every vCPU's TSC to its saved value plus what has passed since.
    pub fn advance_tsc(
        &self,
        vcpus: &mut [impl DerefMut<Target = Vcpu>],
        saved: &[VcpuState],
    ) -> Result<(), Error> {
        let (Some(boot_vcpu), Some(boot_saved)) = (vcpus.first(), saved.first()) else { return Ok(()) };
        let offsets = boot_vcpu.tsc_offset && saved.iter().all(|state| state.tsc_offset.is_some());
        if !offsets {
            // An old kernel on either side: KVM itself recognises writes of nearly the same value
            // to several vCPUs and keeps them in step.
            for vcpu in vcpus {
                msr::write(&vcpu.fd, vcpu.index, IA32_TSC, self.tsc_at(realtime()))?;
            }
            return Ok(());
        }
        // Real time first: the TSC is read a moment later, and setting it a moment too low loses
        // that moment, where too high would add it on every move.
        let current_offset = ioctl::get_tsc_offset(&boot_vcpu.fd).context("KVM_VCPU_TSC_OFFSET")?;
        let now = realtime();
        let current_tsc = msr::read(&boot_vcpu.fd, IA32_TSC)?;
        let boot_offset = current_offset.wrapping_add(self.tsc_at(now)).wrapping_sub(current_tsc);
        for (vcpu, state) in vcpus.iter().zip(saved) {
            // A guest may have given its vCPUs different TSCs; that difference is kept.
            let ahead = state.tsc_offset.unwrap_or(0).wrapping_sub(boot_saved.tsc_offset.unwrap_or(0));
            let offset = boot_offset.wrapping_add(ahead);
            ioctl::set_tsc_offset(&vcpu.fd, offset).context("KVM_VCPU_TSC_OFFSET")?;
        }
        Ok(())
    }

    /// Sets kvmclock to its saved value plus what has passed since.
    pub fn load(&self, vm: &VmFd) -> Result<(), KvmError> {
        let takes_realtime = ioctl::capability(vm, Cap::AdjustClock as u32)? & KVM_CLOCK_REALTIME != 0;
        let mut clock = kvm_clock_data { clock: self.kvmclock, ..Default::default() };
        match self.kvmclock_realtime {
            Some(saved) if takes_realtime => {
                clock.flags = KVM_CLOCK_REALTIME;
                clock.realtime = saved;
            }
            saved => {
                let elapsed = realtime().saturating_sub(saved.unwrap_or(self.tsc_realtime));
                clock.clock = self.kvmclock.saturating_add(elapsed);
            }
        }
        ioctl::retried!("KVM_SET_CLOCK", vm.set_clock(&clock))
    }
}

/// Lets a vCPU's TSC go on as if nobody had set it since `initial`, where the kernel can.
pub fn reset_tsc(vcpu: &Vcpu, initial: &VcpuState) -> Result<(), KvmError> {
    match initial.tsc_offset {
        Some(offset) => ioctl::set_tsc_offset(&vcpu.fd, offset).context("KVM_VCPU_TSC_OFFSET"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tsc_goes_on_and_never_back() {
        let state = ClockState {
            kvmclock: 0,
            kvmclock_realtime: None,
            guest_tsc: 1_000_000,
            tsc_realtime: 5_000_000_000,
            tsc_khz: 2_100_000,
        };
        assert_eq!(state.tsc_at(5_000_000_000), 1_000_000);
        assert_eq!(state.tsc_at(5_010_000_000), 1_000_000 + 21_000_000);
        assert_eq!(state.tsc_at(4_000_000_000), 1_000_000, "a clock that is behind adds nothing");
    }

    #[test]
    fn more_time_than_can_have_passed_has_not() {
        let saved = ClockState {
            kvmclock: 7,
            kvmclock_realtime: Some(5_000_000_001),
            guest_tsc: 1_000_000,
            tsc_realtime: 5_000_000_000,
            tsc_khz: 2_100_000,
        };
        let most = Duration::from_secs(2);
        assert_eq!(saved.clone().plausible_at(7_000_000_000, most), (saved.clone(), None));
        assert_eq!(saved.clone().plausible_at(4_000_000_000, most), (saved.clone(), None));
        let now = 3_600_000_000_000;
        let (state, passed) = saved.plausible_at(now, most);
        assert_eq!(passed, Some(Duration::from_secs(3595)));
        assert_eq!((state.tsc_at(now), state.kvmclock_realtime), (1_000_000, Some(now)));
        assert_eq!(state.tsc_at(now + 10_000_000), 1_000_000 + 21_000_000);
    }
}
