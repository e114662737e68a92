//! End-to-end tests: real processes, real KVM, real sockets, real faults. What they share is here; the
//! tests are in `tests/`:
//!
//! | file | what it shows |
//! |---|---|
//! | `chain` | guests of all sizes move ten times while they rewrite their memory, and nothing is wrong |
//! | `kill` | either side is killed at any moment: there is one owner, or the guest is held and says so |
//! | `disks` | the same with a disk: one side at most touches it, and nothing on it is lost, torn or stale |
//! | `disk_full` | a disk that its host has no room for: the guest waits, moves meanwhile, and goes on |
//! | `nfs` | the same with the disk on an NFS server, with each host as a client (in the lab) |
//! | `chaos` | whatever goes wrong by seed, nothing is lost, doubled or untrue: a short part of `ci/chaos` |
//! | `cuts` | the connection is cut, or goes silent, at any byte |
//! | `hostile` | peers of either side that are not Whimbrel, or violate the protocol |
//! | `costs` | what a peer can make a side allocate |
//! | `differing` | a page that differs between the sides is found, named and kept |
//! | `limits` | a receiver takes no guest that is larger than its operator allows, or has another name |
//! | `flood` | guests move while hundreds of hostile callers a second call |
//! | `security` | certificates of all kinds, and what somebody on the network can do |
//! | `versions` | guests move between this program and the one of the last release, both ways |
//! | `host` | the service of a host: many guests through one port, and what happens when it is killed |
//! | `page` | the page of a host: who may look at it, and a browser that does (`ci/page`) |
//! | `hosts` | destinations that could not run the guest |
//! | `threads` | destinations that can start no thread once the guest comes |
//! | `turns` | busy receivers, second migrations, cancelled and stalled ones |
//! | `names` | machines of a host are found, listed, stopped and moved by their names |
//! | `evacuate` | a host is emptied: to hosts that refuse, with guests that are held, and called off |
//! | `guests` | foreign guests |
//! | `rdma`, `memlock` | moves over RDMA, and without it (in the lab) |
//! | `copies` | over RDMA no system call carries pages (in the lab) |
//! | `huge` | a guest in huge pages moves over RDMA (in the lab) |
//! | `crosscheck` | another implementation of verbs sees the same devices (in the lab) |
//! | `networks_by_name` | each host has its own bridges and folders for what guests name, and leaves no tap behind |
//! | `network` | a Linux guest's network connections while it moves (in the lab) |
//! | `pair` | moves between two hosts (two VMs of the lab) |
//! | `sandbox` | what a machine's process can no longer do |
//! | `reboot` | a guest that reboots wherever it is, and while it moves |
//! | `openapi` | each API has what its description says, no more and no less, and answers as it says |
//! | `events` | what happens on two hosts is told as it happens, and told again to whoever has missed it |
//! | `usage`, `cli`, `http` | the program as its users see it |
//!
//! If a test says that a guest is undamaged, the guest has been moved once more, into the test's own process
//! ([`inspect`]). All memory was compared on the way, and the guest has verified each of its pages there.

pub mod bridges;
pub mod chaos;
pub mod chromium;
pub mod client;
pub mod command;
pub mod counting;
pub mod described;
pub mod flood;
pub mod http;
pub mod inject;
pub mod inspect;
pub mod journal;
pub mod kills;
pub mod lab;
pub mod mitm;
pub mod named;
pub mod namespace;
pub mod nfs;
pub mod observer;
pub mod program;
pub mod proxy;
pub mod rogue;
pub mod say;
pub mod scene;
pub mod seclusion;
pub mod service;
pub mod sides;
pub mod strace;
pub mod tshark;
#[path = "../../vmm/src/virtio/net/wire.rs"]
pub mod wire;
