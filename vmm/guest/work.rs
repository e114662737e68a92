//! What each vCPU does all the time.

use crate::abi::{self, BAD_PAGES, BadPage, COMMAND_NONE, COMMAND_POWER_OFF, Cpu, MAX_VCPUS};
use crate::clock::KvmClock;
use crate::journal::Journal;
use crate::memory::WorkingSet;
use crate::options::Options;
use crate::report::{self, field};
use crate::serial::{Piece, line};
use crate::stamps::{Damage, Stamps};
use crate::watch::Watch;
use crate::{apic, cpu};
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};

/// Pages between two looks at the clock: a quarter of a millisecond even where KVM emulates.
const BATCH: u64 = 16;

/// A slowed guest makes up for this part of a second when it can: more would be a burst.
const CATCH_UP: u64 = 10;

static FILLED: [AtomicBool; MAX_VCPUS] = [const { AtomicBool::new(false) }; MAX_VCPUS];
static FINISHED: [AtomicBool; MAX_VCPUS] = [const { AtomicBool::new(false) }; MAX_VCPUS];

/// A vCPU at work.
struct Worker {
    number: usize,
    options: Options,
    memory: WorkingSet,
    stamps: Stamps,
    share: Range<u64>,
    report: *mut Cpu,
    watch: Watch,
    /// Kept by the first vCPU.
    journal: Option<Journal>,
    tsc_khz: u64,
    /// Pages that may still be rewritten in a guest with a rate, and until when that is accounted for.
    budget: u64,
    budget_from: u64,
}

/// Works for ever.
pub fn run(number: usize, options: &Options, memory: WorkingSet, tsc_khz: u32) -> ! {
    let stamps = Stamps::new(options.words);
    let (pages, vcpus) = (memory.pages(), u64::from(options.vcpus));
    let share = pages * number as u64 / vcpus..pages * (number as u64 + 1) / vcpus;
    for page in share.clone() {
        stamps.write(memory.page(page), page, 0);
    }
    wait_for_all(&FILLED, number, options.vcpus);
    let keeps_journal = number == 0 && options.journal != 0;
    let journal = keeps_journal.then(|| Journal::begin(options.journal)).flatten();
    if keeps_journal && journal.is_none() {
        report::fail(abi::FAILED_DISK, 0);
    }
    apic::start_timer(options.hz, tsc_khz);
    if number == 0 {
        apic::start_pit(options.pit_hz);
        report::state(abi::STATE_RUNNING);
        line(&[Piece::Text("ready")]);
    }
    let sleeps = share.is_empty() || options.rate != 0;
    let watch = Watch::begin(
        number,
        tsc_khz,
        if sleeps { 1000 / u64::from(options.hz) } else { 0 },
        KvmClock::start(number),
    );
    let budget_from = watch.last_tsc();
    let mut worker = Worker {
        number,
        options: *options,
        memory,
        stamps,
        share,
        report: report::cpu(number),
        watch,
        journal,
        tsc_khz: u64::from(tsc_khz),
        budget: 0,
        budget_from,
    };
    cpu::enable_interrupts();
    let generation = worker.rewrite();
    worker.finish(generation)
}

/// Waits until each vCPU has come here.
fn wait_for_all(flags: &[AtomicBool; MAX_VCPUS], number: usize, vcpus: u32) {
    flags[number].store(true, Ordering::Release);
    for flag in &flags[..vcpus as usize] {
        while !flag.load(Ordering::Acquire) {
            core::hint::spin_loop();
        }
    }
}

fn command() -> u32 {
    field!(report::header(), command).get()
}

impl Worker {
    /// Checks and rewrites the share, pass after pass, until told to finish. No table of generations is
    /// needed: a page that the pass has not come to has that of the last one. Returns the last.
    fn rewrite(&mut self) -> u64 {
        let mut generation = 0;
        while command() == COMMAND_NONE {
            if self.share.is_empty() {
                cpu::wait();
                self.look(1);
                continue;
            }
            for first in 0..self.options.step {
                self.rewrite_from(self.share.start + first, generation);
            }
            generation += 1;
            field!(self.report, passes).add(1);
        }
        generation
    }

    /// Looks at the clock, and whether the disk has answered. `units` is what was done since.
    fn look(&mut self, units: u64) {
        self.watch.look(units);
        if let Some(journal) = &mut self.journal {
            journal.step(true);
        }
    }

    /// The pages from `page` to the end of the share that are multiples of the step apart.
    fn rewrite_from(&mut self, mut page: u64, generation: u64) {
        let step = self.options.step;
        while page < self.share.end {
            let part_end = self.memory.part_end(page).min(self.share.end);
            let count = self.allowance().min((part_end - page).div_ceil(step));
            let address = self.memory.page(page);
            let right = self.stamps.renew(address, page, step, count, generation);
            page += right * step;
            let mut done = right;
            if right < count {
                self.bad(page, generation);
                self.stamps.write(self.memory.page(page), page, generation + 1);
                page += step;
                done += 1;
            }
            field!(self.report, pages).add(done);
            self.budget = self.budget.saturating_sub(done);
            self.look(done);
        }
    }

    /// How many pages to do before the next look at the clock. Sleeps while the rate allows none.
    fn allowance(&mut self) -> u64 {
        let rate = self.options.rate.div_ceil(u64::from(self.options.vcpus));
        if rate == 0 {
            return BATCH;
        }
        let second = (self.tsc_khz * 1000).max(1);
        // Of a guest that is slower than that, one page.
        let memory = (second / CATCH_UP).max(second.div_ceil(rate));
        while self.budget == 0 && command() == COMMAND_NONE {
            let now = self.watch.last_tsc();
            self.budget_from = self.budget_from.max(now.saturating_sub(memory));
            self.budget = now.saturating_sub(self.budget_from).saturating_mul(rate) / second;
            // The remainder, which is not worth a whole page, is left for the next time.
            self.budget_from += self.budget.saturating_mul(second) / rate;
            if self.budget == 0 {
                cpu::wait();
                self.look(0);
            }
        }
        self.budget.clamp(1, BATCH)
    }

    /// Verifies the share once more; then sleeps, or powers off when all have done so.
    fn finish(&mut self, generation: u64) -> ! {
        while self.journal.as_mut().is_some_and(|journal| journal.step(false)) {
            self.watch.look(1);
        }
        for page in self.share.clone() {
            if self.stamps.check(self.memory.page(page), page, generation).is_err() {
                self.bad(page, generation);
            }
            field!(self.report, verified).add(1);
            if page % BATCH == 0 {
                self.watch.look(1);
            }
        }
        FINISHED[self.number].store(true, Ordering::Release);
        loop {
            if self.number == 0 {
                self.conclude();
            }
            cpu::wait();
            self.watch.look(1);
        }
    }

    /// Says that all vCPUs have finished, once they have.
    fn conclude(&self) {
        let vcpus = self.options.vcpus as usize;
        let finished = FINISHED[..vcpus].iter().filter(|f| f.load(Ordering::Acquire)).count();
        field!(report::header(), finished).set(finished as u64);
        if finished == vcpus {
            report::state(abi::STATE_FINISHED);
            if command() == COMMAND_POWER_OFF {
                line(&[Piece::Text("powers off")]);
                cpu::out_word(abi::POWER_PORT, abi::POWER_OFF);
            }
        }
    }

    /// Counts and describes a page that is wrong.
    fn bad(&self, page: u64, generation: u64) {
        let address = self.memory.page(page);
        let Err((word, found)) = self.stamps.check(address, page, generation) else { return };
        let known = field!(self.report, lost).get()
            + field!(self.report, stale).get()
            + field!(self.report, torn).get();
        let (counter, name) = match self.stamps.diagnose(address, page, generation) {
            Damage::Lost => (field!(self.report, lost), "lost"),
            Damage::Stale => (field!(self.report, stale), "stale"),
            Damage::Torn => (field!(self.report, torn), "torn"),
        };
        counter.add(1);
        if (known as usize) < BAD_PAGES {
            field!(self.report, bad[known as usize]).set(BadPage { page, expected: generation, word, found });
            line(&[Piece::Text(name), Piece::Text(" page "), Piece::Number(page)]);
        }
    }
}
