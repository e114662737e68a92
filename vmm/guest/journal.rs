//! A journal on a disk: blocks that are written in turn, over and over. Each has a stamp of its place and of
//! the number of times that the journal has come to it. Before a block is written again it is read, and must
//! hold what was written there last. Blocks that were lost, torn or are stale are counted. There is one
//! request at a time, so that at every moment the disk holds an unbroken series of entries, which can be
//! checked from outside.

use crate::abi::{BadPage, PAGE};
use crate::disk::{Disk, Operation};
use crate::report::{self, field};
use crate::serial::{Piece, line};
use crate::stamps::Stamps;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Doing {
    Nothing,
    Reading,
    Writing,
}

/// The journal of this guest, which its first vCPU keeps.
pub struct Journal {
    disk: Disk,
    blocks: u64,
    stamps: Stamps,
    /// The entry that is next to be written or under way.
    entry: u64,
    doing: Doing,
}

impl Journal {
    /// A journal of so many blocks, or of as many as the disk has; `None` if there is no disk.
    pub fn begin(blocks: u64) -> Option<Self> {
        let disk = Disk::find()?;
        let blocks = blocks.min(disk.blocks());
        let stamps = Stamps::new(PAGE / 8);
        (blocks > 0).then_some(Journal { disk, blocks, stamps, entry: 0, doing: Doing::Nothing })
    }

    /// Goes one step on if the disk has answered, and begins the next entry if it may. Returns whether a
    /// request is under way.
    pub fn step(&mut self, begin: bool) -> bool {
        if self.doing != Doing::Nothing && !self.disk.is_done() {
            return true;
        }
        let (block, generation) = (self.entry % self.blocks, self.entry / self.blocks);
        if self.doing != Doing::Nothing && !self.disk.succeeded() {
            field!(report::header(), journal_failed).add(1);
            self.doing = Doing::Nothing;
        }
        match self.doing {
            Doing::Nothing if begin => {
                self.disk.begin(Operation::Read, block);
                self.doing = Doing::Reading;
            }
            Doing::Nothing => {}
            Doing::Reading => {
                if let Some(last) = generation.checked_sub(1) {
                    self.check(block, last);
                }
                self.stamps.write(self.disk.block(), block, generation);
                self.disk.begin(Operation::Write, block);
                self.doing = Doing::Writing;
            }
            Doing::Writing => {
                self.entry += 1;
                field!(report::header(), journal).set(self.entry);
                self.doing = Doing::Nothing;
            }
        }
        self.doing != Doing::Nothing
    }

    /// Counts and describes a block that is wrong.
    fn check(&self, block: u64, generation: u64) {
        let Err((word, found)) = self.stamps.check(self.disk.block(), block, generation) else { return };
        let bad = field!(report::header(), journal_bad);
        if bad.get() == 0 {
            let first = BadPage { page: block, expected: generation, word, found };
            field!(report::header(), journal_first).set(first);
            line(&[Piece::Text("wrong block "), Piece::Number(block), Piece::Text(" on the disk")]);
        }
        bad.add(1);
    }
}
