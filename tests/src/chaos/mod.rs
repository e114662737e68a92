//! Chaos: many moves, each of which goes wrong in a way that a seed decides, and afterwards nothing is lost,
//! doubled or untrue.
//!
//! | file | what it is about |
//! |---|---|
//! | `cable` | the two hosts, and what joins them |
//! | `fault` | what can go wrong |
//! | `plan` | what does go wrong in a move, and when |
//! | `target` | a process, as those see it who interfere with it |
//! | `course` | how a move runs |
//! | `judge` | what must hold afterwards |
//! | `tally` | what came of all moves |

pub mod cable;
mod course;
mod fault;
mod judge;
mod plan;
pub mod tally;
mod target;

use crate::journal::Disk;
use crate::scene::Scene;
use cable::{Cable, Place};
use course::Course;
use plan::Plan;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fs, io};
use tally::{Done, Tally, Violation};

/// A run of many moves.
pub struct Run {
    /// Decides all of it, but for how fast this machine is.
    pub seed: u64,
    /// Where.
    pub place: Place,
    /// How long a fault lasts at most.
    pub longest: Duration,
    /// Where disks are: on a real file system.
    pub disks: PathBuf,
    /// Where what is left of a violation is kept.
    pub logs: PathBuf,
}

impl Run {
    /// Has what does not hold be told once, by the tally.
    pub fn tell_once(&self) {
        panic::set_hook(Box::new(|panic| *wrong() = panic.to_string()));
    }

    /// Makes one move, and counts what came of it.
    ///
    /// # Errors
    /// Where no move can be made.
    pub fn step(&self, number: u64, tally: &mut Tally) -> io::Result<()> {
        let plan = Plan::of(self.seed, number, self.place, self.longest);
        let cable = Cable::lay(self.place)?;
        let mut scene = match self.place {
            // The kernel tells who touches a disk only of file systems that do not forget.
            _ if plan.fills_disk() => Scene::unobserved(Disk::sparse(&self.disks)),
            Place::Machine => Scene::local(&self.disks),
            // Its kernel cannot tell who touches a disk.
            Place::Lab => Scene::unobserved(Disk::new(&self.disks)),
        };
        scene.like = plan.guest;
        let mut struck = Vec::new();
        let mut said = String::new();
        let result = panic::catch_unwind(AssertUnwindSafe(|| {
            let mut course = Course::run(&plan, &scene, &cable);
            struck = course.struck.iter().map(|fault| fault.kind()).collect();
            said = format!("struck: {:?}\n{:?}\n{:?}\n", course.struck, course.ran, course.proxy);
            let gone = std::mem::take(&mut course.gone);
            let judgement = course.judge();
            // No process is left that has a device open.
            drop(gone);
            judgement
        }));
        let planned = plan.strikes.len();
        tally.add(match result {
            Ok(judgement) => Ok(Done { judgement, late: planned - struck.len(), struck }),
            Err(_) => {
                let what = wrong().clone();
                let logs = self.logs.join(format!("{}-{number}", self.seed));
                keep(&scene, &logs, &format!("{what}\n\n{plan:#?}\n{said}"))?;
                Err(Violation { number, what, struck, logs })
            }
        });
        Ok(())
    }
}

/// What did not hold in the last move in which something did not, and where that is checked.
static WRONG: Mutex<String> = Mutex::new(String::new());

fn wrong() -> MutexGuard<'static, String> {
    WRONG.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the logs of both sides, the disk, and what was going on.
fn keep(scene: &Scene, logs: &Path, story: &str) -> io::Result<()> {
    fs::create_dir_all(logs)?;
    fs::write(logs.join("story"), story)?;
    fs::copy(scene.disk.path(), logs.join("journal"))?;
    for entry in fs::read_dir(scene.folder())? {
        let entry = entry?;
        // Sockets are there as well.
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), logs.join(entry.file_name()))?;
        }
    }
    Ok(())
}
