//! A virtqueue. When its thread serves it, says `service.rs`.

use super::VirtioDevice;
use super::interrupt::Interrupt;
use super::service::{Doorbell, Service};
use crate::fatal::EndOnPanic;
use crate::memory::GuestMemory;
use crate::poll::poll;
use crate::sandbox;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::thread::JoinHandle;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use super::service::WaitFor;

/// A vector number that means "no interrupt".
pub const NO_VECTOR: u16 = 0xffff;

/// Bytes before the first element of a ring, and those of an element.
const RING_HEADER: u64 = 4;
const AVAILABLE_ELEMENT: u64 = 2;
const USED_ELEMENT: u64 = 8;

/// A descriptor chain in guest RAM.
pub type Chain<'m> = DescriptorChain<&'m GuestMemory>;

/// An error of the driver's that ends a queue's use until the device is reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings cannot be read or written.
    #[error("a ring is unusable: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A request that does not follow the device's format.
    #[error("a request is malformed: {0}")]
    Request(&'static str),
}

impl QueueError {
    /// A buffer that is not in RAM.
    pub const OUTSIDE: QueueError = QueueError::Request("a buffer lies outside guest memory");
}

/// A queue's saved form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    next_used: u16,
    event_index: bool,
    vector: u16,
    broken: bool,
}

/// What a queue's thread, the transport and the machine share.
struct SharedQueue {
    service: Service<Queue, EventFd>,
    vector: AtomicU16,
}

impl Doorbell for EventFd {
    fn ring(&self) {
        // Fails only when the counter is full, which is as good as rung.
        let _ = self.write(1);
    }

    fn silence(&self) {
        // Non-blocking: fails when it has not rung.
        let _ = self.read();
    }
}

/// A virtqueue with its thread. Dropping it ends the thread.
pub struct VirtQueue {
    shared: Arc<SharedQueue>,
    thread: Option<JoinHandle<()>>,
}

/// A queue under its lock, as a device serves it.
pub struct LockedQueue<'a> {
    queue: &'a mut Queue,
    memory: &'a GuestMemory,
    shared: &'a SharedQueue,
    interrupt: &'a Interrupt,
    /// Chains that were put back on the available ring.
    undone: u16,
}

impl<'a> LockedQueue<'a> {
    /// Guest RAM.
    pub fn memory(&self) -> &'a GuestMemory {
        self.memory
    }

    /// Whether somebody else wants the queue's lock. Whoever goes on without [`pop`](Self::pop) looks here.
    pub fn is_wanted(&self) -> bool {
        self.shared.service.is_wanted()
    }

    /// The next chain of the available ring; `None` when there is none, or when somebody else wants the
    /// queue's lock, such as a machine that is to pause.
    pub fn pop(&mut self) -> Result<Option<Chain<'a>>, QueueError> {
        if self.shared.service.is_wanted() {
            return Ok(None);
        }
        Ok(self.queue.iter(self.memory)?.next())
    }

    /// Makes the last `count` chains that [`pop`](Self::pop) gave the next ones again. The device
    /// pops no more before it returns.
    pub fn undo_pop(&mut self, count: u16) {
        self.undone += count;
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Waits until `input` is readable or, if `more` may come, the guest has made more available. Where
    /// somebody wants the queue's lock, only for the input: whoever is asked to let go has to see it through.
    pub fn wait(&mut self, input: BorrowedFd<'_>, more: bool) -> Result<(), QueueError> {
        if !more || self.shared.service.is_wanted() {
            wait(None, Some(input));
            return Ok(());
        }
        if !self.queue.enable_notification(self.memory)? {
            let doorbell = self.shared.service.doorbell();
            wait(Some(doorbell), Some(input));
            doorbell.silence();
        }
        Ok(self.queue.disable_notification(self.memory)?)
    }

    /// Adds a chain, of which `len` bytes were written, to the used ring, and interrupts the guest if it
    /// wants to know.
    pub fn add_used(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        self.queue.add_used(self.memory, head, len)?;
        if self.queue.needs_notification(self.memory)? {
            self.interrupt();
        }
        Ok(())
    }

    /// Adds chains to the used ring at once, so that the guest does not see one without the others: heads,
    /// and how many bytes were written to each.
    pub fn add_used_all(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let [first @ .., (last_head, last_len)] = chains else { return Ok(()) };
        let before = self.queue.next_used();
        for (at, (head, len)) in first.iter().enumerate() {
            let slot = before.wrapping_add(at as u16) % self.queue.size();
            let element = (u64::from(*len) << 32 | u64::from(*head)).to_le();
            let address = GuestAddress(self.queue.used_ring() + RING_HEADER + u64::from(slot) * USED_ELEMENT);
            self.memory.write_obj(element, address).map_err(virtio_queue::Error::GuestMemory)?;
        }
        // The guest sees them by the index, which moves once, with the last of them.
        self.queue.set_next_used(before.wrapping_add(first.len() as u16));
        self.queue.add_used(self.memory, *last_head, *last_len)?;
        if self.wants_interrupt(before)? {
            self.interrupt();
        }
        Ok(())
    }

    /// Whether the guest wants to know of what was added to the used ring from index `before` on. The queue's
    /// own answer takes into account only what was added one by one.
    fn wants_interrupt(&self, before: u16) -> Result<bool, QueueError> {
        if !self.queue.event_idx_enabled() {
            return Ok(true);
        }
        // What was added must be there before the guest's wish is read.
        fence(Ordering::SeqCst);
        let at = self.queue.avail_ring() + RING_HEADER + u64::from(self.queue.size()) * AVAILABLE_ELEMENT;
        let loaded = self.memory.load(GuestAddress(at), Ordering::Relaxed);
        let wanted = u16::from_le(loaded.map_err(virtio_queue::Error::GuestMemory)?);
        let now = self.queue.next_used();
        Ok(now.wrapping_sub(wanted).wrapping_sub(1) < now.wrapping_sub(before))
    }

    fn interrupt(&self) {
        self.interrupt.queue(self.shared.vector.load(Ordering::Relaxed));
    }
}

impl SharedQueue {
    /// Serves what there is; whether to wait for input next.
    fn serve(
        &self,
        index: usize,
        device: &dyn VirtioDevice,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) -> bool {
        let once = |queue: &mut Queue| serve_once(self, queue, index, device, memory, interrupt);
        self.service.serve(once, || interrupt.needs_reset())
    }
}

/// One pass over the available ring; `None` if the guest made more available meanwhile.
fn serve_once(
    shared: &SharedQueue,
    queue: &mut Queue,
    index: usize,
    device: &dyn VirtioDevice,
    memory: &GuestMemory,
    interrupt: &Interrupt,
) -> Result<Option<WaitFor>, QueueError> {
    queue.disable_notification(memory)?;
    let mut locked = LockedQueue { queue, memory, shared, interrupt, undone: 0 };
    let next = device.serve(index, &mut locked)?;
    // What the device has and cannot use yet is not what it waits for.
    let undone = if next == WaitFor::Buffers { locked.undone } else { 0 };
    let next_available = queue.next_avail();
    queue.set_next_avail(next_available.wrapping_add(undone));
    // The ring looks as if more had come when a pause left something in it; that waits.
    let more = queue.enable_notification(memory)?;
    queue.set_next_avail(next_available);
    Ok(if next == WaitFor::Buffers && more { None } else { Some(next) })
}

impl VirtQueue {
    /// Queue `index` of `device`, of at most `size` chains, and its thread.
    ///
    /// # Errors
    /// If there is no thread or no eventfd for it, or the size is no power of two.
    pub fn start(
        index: usize,
        size: u16,
        device: Arc<dyn VirtioDevice>,
        memory: GuestMemory,
        interrupt: Arc<Interrupt>,
    ) -> io::Result<Self> {
        let queue = Queue::new(size).map_err(io::Error::other)?;
        let shared = Arc::new(SharedQueue {
            service: Service::new(queue, EventFd::new(EFD_NONBLOCK)?),
            vector: AtomicU16::new(NO_VECTOR),
        });
        let name = format!("{}.{index}", device.name());
        let served = shared.clone();
        let work = move || {
            let _end = EndOnPanic;
            sandbox::serve();
            served.service.work(
                |doorbell, for_input| wait(Some(doorbell), device.input(index).filter(|_| for_input)),
                || served.serve(index, device.as_ref(), &memory, &interrupt),
            );
        };
        let thread = std::thread::Builder::new().name(name).spawn(work)?;
        Ok(VirtQueue { shared, thread: Some(thread) })
    }

    /// What rings when the guest notifies the device.
    pub fn doorbell(&self) -> &EventFd {
        self.shared.service.doorbell()
    }

    /// Wakes the queue's thread.
    pub fn notify(&self) {
        self.doorbell().ring();
    }

    /// Tries requests again that wait, though the machine is paused.
    pub fn retry(
        &self,
        index: usize,
        device: &dyn VirtioDevice,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) {
        let mut inner = self.shared.service.interrupt_and_lock();
        if !inner.active {
            return;
        }
        let (queue, shared) = (&mut inner.queue, &*self.shared);
        let mut locked = LockedQueue { queue, memory, shared, interrupt, undone: 0 };
        if device.retry(index, &mut locked).is_err() {
            (inner.active, inner.broken) = (false, true);
            interrupt.needs_reset();
        }
    }

    /// Serves the queue in this thread, once its own thread is done.
    #[cfg(feature = "internals")]
    pub fn serve(
        &self,
        index: usize,
        device: &dyn VirtioDevice,
        memory: &GuestMemory,
        interrupt: &Interrupt,
    ) {
        self.shared.serve(index, device, memory, interrupt);
    }

    /// Its interrupt vector.
    pub fn vector(&self) -> u16 {
        self.shared.vector.load(Ordering::Relaxed)
    }

    /// Sets its interrupt vector.
    pub fn set_vector(&self, vector: u16) {
        self.shared.vector.store(vector, Ordering::Relaxed);
    }

    /// Looks at the queue's registers.
    pub fn with_queue<T>(&self, look: impl FnOnce(&mut Queue) -> T) -> T {
        look(&mut self.shared.service.interrupt_and_lock().queue)
    }

    /// Lets the device serve the queue if it is ready and its rings lie in RAM; false if they do not.
    pub fn activate(&self, memory: &GuestMemory, event_index: bool) -> bool {
        let mut inner = self.shared.service.interrupt_and_lock();
        if !inner.queue.ready() || inner.broken {
            return true;
        }
        inner.queue.set_event_idx(event_index);
        inner.active = inner.queue.is_valid(memory);
        self.doorbell().ring();
        inner.active
    }

    /// As it was before the driver came.
    pub fn reset(&self) {
        let mut inner = self.shared.service.interrupt_and_lock();
        inner.queue.reset();
        (inner.active, inner.broken) = (false, false);
        self.set_vector(NO_VECTOR);
    }

    /// Stops serving. When it returns, nothing of the device's touches guest RAM for this queue.
    pub fn pause(&self) {
        self.shared.service.pause();
    }

    /// Serves again.
    pub fn resume(&self) {
        self.shared.service.resume();
    }

    /// The queue's state.
    pub fn save(&self) -> QueueState {
        let inner = self.shared.service.interrupt_and_lock();
        let queue = inner.queue.state();
        QueueState {
            size: queue.size,
            ready: queue.ready,
            descriptors: queue.desc_table,
            available: queue.avail_ring,
            used: queue.used_ring,
            next_available: queue.next_avail,
            next_used: queue.next_used,
            event_index: queue.event_idx_enabled,
            vector: self.vector(),
            broken: inner.broken,
        }
    }

    /// Restores a queue's state; [`activate`](Self::activate) is another matter.
    ///
    /// # Errors
    /// A text that says what is wrong with the state.
    pub fn load(&self, state: &QueueState) -> Result<(), String> {
        let mut inner = self.shared.service.interrupt_and_lock();
        let queue = virtio_queue::QueueState {
            max_size: inner.queue.max_size(),
            next_avail: state.next_available,
            next_used: state.next_used,
            event_idx_enabled: state.event_index,
            size: state.size,
            ready: state.ready,
            desc_table: state.descriptors,
            avail_ring: state.available,
            used_ring: state.used,
        };
        inner.queue = Queue::try_from(queue).map_err(|e| e.to_string())?;
        (inner.active, inner.broken) = (false, state.broken);
        self.set_vector(state.vector);
        Ok(())
    }

    /// Sets the address of one of the rings, or half of it.
    pub fn set_address(&self, which: QueuePart, high: bool, half: u32) {
        let (low, high) = if high { (None, Some(half)) } else { (Some(half), None) };
        self.with_queue(|queue| match which {
            QueuePart::DescriptorTable => queue.set_desc_table_address(low, high),
            QueuePart::AvailableRing => queue.set_avail_ring_address(low, high),
            QueuePart::UsedRing => queue.set_used_ring_address(low, high),
        });
    }

    /// The address of one of the rings.
    pub fn address(&self, which: QueuePart) -> GuestAddress {
        self.with_queue(|queue| {
            GuestAddress(match which {
                QueuePart::DescriptorTable => queue.desc_table(),
                QueuePart::AvailableRing => queue.avail_ring(),
                QueuePart::UsedRing => queue.used_ring(),
            })
        })
    }
}

/// A part of a queue that has an address of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueuePart {
    /// The descriptor table.
    DescriptorTable,
    /// The available ring, which the driver writes.
    AvailableRing,
    /// The used ring, which the device writes.
    UsedRing,
}

impl Drop for VirtQueue {
    fn drop(&mut self) {
        self.shared.service.end();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has printed why.
            let _ = thread.join();
        }
    }
}

/// Waits until the doorbell rings or the input is readable (or has ended), as far as they are given. A signal
/// ends the wait early, which only makes the caller look once more.
fn wait(doorbell: Option<&EventFd>, input: Option<BorrowedFd<'_>>) {
    poll([doorbell.map(AsRawFd::as_raw_fd), input.map(|fd| fd.as_raw_fd())], libc::POLLIN, -1);
}
