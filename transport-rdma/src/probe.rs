//! What RDMA this host has: plain data for whoever checks a host before a migration.

use crate::api::Api;
use crate::cm::EventChannel;
use crate::device::{Abilities, port_attributes};
use crate::limits;
use rdma_sys::*;
use std::ffi::CStr;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::ptr::NonNull;

/// A host's RDMA.
#[derive(Clone, Debug)]
pub struct Host {
    /// Its devices, or why there are none to be seen.
    pub devices: Result<Vec<Device>, String>,
    /// Whether rdma_cm can make connections, or why not.
    pub connections: Result<(), String>,
    /// Bytes that this process may lock into memory; `None` for no limit.
    pub locked_memory: Option<u64>,
    /// The limits of the process's rdma cgroup, a line for each device; empty where there are none.
    pub cgroup: Vec<String>,
}

/// A device.
#[derive(Clone, Debug)]
pub struct Device {
    /// Its name, as in `rdma link`.
    pub name: String,
    /// What it can do, or why it cannot be opened.
    pub abilities: Result<DeviceAbilities, String>,
    /// Its ports.
    pub ports: Vec<Port>,
}

/// What a device can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceAbilities {
    /// Most memory regions.
    pub max_regions: u64,
    /// Largest message, in bytes.
    pub max_message: u64,
    /// Whether memory need not be pinned (on-demand paging for writes).
    pub on_demand: bool,
}

/// A port of a device.
#[derive(Clone, Debug)]
pub struct Port {
    /// Its number, from 1.
    pub number: u8,
    /// Whether it can be used now.
    pub active: bool,
    /// Its state in words: "active", "down", "initialising", "armed", "deferred", "unknown".
    pub state: &'static str,
    /// "ethernet" (RoCE, iWARP) or "infiniband".
    pub link: &'static str,
    /// Bytes of payload in a packet, now and at best. 1024 on RoCE means that the network interface has an
    /// MTU of 1500.
    pub mtu: u32,
    /// See `mtu`.
    pub max_mtu: u32,
    /// Its addresses.
    pub gids: Vec<Gid>,
}

/// An address of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gid {
    /// Place in the port's table.
    pub index: u32,
    /// The address; for RoCE an IP address of the network interface.
    pub address: IpAddr,
    /// "RoCE v2", "IB/RoCE v1"; empty where the system does not say.
    pub kind: String,
    /// The network interface; empty where there is none.
    pub interface: String,
}

/// Looks at this host.
pub fn host() -> Host {
    Host {
        devices: devices(),
        connections: EventChannel::new().map(drop).map_err(|e| e.to_string()),
        locked_memory: limits::locked_memory(),
        cgroup: cgroup(),
    }
}

/// An address of this host on an active port, to which a source could connect. Those of IPv4 first.
pub fn addresses(host: &Host) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = host
        .devices
        .iter()
        .flatten()
        .flat_map(|device| &device.ports)
        .filter(|port| port.active)
        .flat_map(|port| &port.gids)
        .map(|gid| gid.address)
        // Link-local addresses mean nothing without an interface.
        .filter(|address| !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()))
        .collect();
    found.sort_by_key(|address| address.is_ipv6());
    found.dedup();
    found
}

/// The devices alone. Does not ask rdma_cm, which keeps a device open from then on.
///
/// # Errors
/// Why there are none to be seen, and what to do.
pub fn devices() -> Result<Vec<Device>, String> {
    let api = Api::get()?;
    let mut count = 0;
    // SAFETY: `count` is where the number goes.
    let list = unsafe { (api.ibv_get_device_list)(&mut count) };
    if list.is_null() {
        let error = io::Error::last_os_error();
        return Err(format!(
            "this host has no RDMA ({error}); load the driver of its device and ib_uverbs (see `rdma link`)"
        ));
    }
    let devices = (0..count.max(0) as usize)
        // SAFETY: the list has `count` entries, valid until it is freed below.
        .filter_map(|at| NonNull::new(unsafe { *list.add(at) }))
        .map(|raw| device(api, raw))
        .collect::<Vec<_>>();
    // SAFETY: the list comes from the call above; nothing points into it any more.
    unsafe { (api.ibv_free_device_list)(list) };
    if devices.is_empty() {
        return Err(
            "this host has no RDMA device; load its driver (soft-RoCE: `rdma link add rxe0 type rxe \
                    netdev DEV`)"
                .into(),
        );
    }
    Ok(devices)
}

/// Most entries of a port's table of addresses that are looked at.
const MAX_GIDS: i32 = 1024;

/// An open device.
struct Opened {
    api: &'static Api,
    raw: NonNull<ibv_context>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: opened by us, and nothing was made on it.
        unsafe { (self.api.ibv_close_device)(self.raw.as_ptr()) };
    }
}

fn device(api: &'static Api, raw: NonNull<ibv_device>) -> Device {
    // SAFETY: the caller's list is alive; names are C strings inside it.
    let name = unsafe { CStr::from_ptr((api.ibv_get_device_name)(raw.as_ptr())) };
    let name = name.to_string_lossy().into_owned();
    // SAFETY: as above.
    let Some(raw) = NonNull::new(unsafe { (api.ibv_open_device)(raw.as_ptr()) }) else {
        let error = io::Error::last_os_error();
        let hint = match error.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => "; give this user access to /dev/infiniband/uverbs*",
            _ => "",
        };
        let abilities = Err(format!("{name} cannot be opened: {error}{hint}"));
        return Device { name, abilities, ports: Vec::new() };
    };
    let opened = Opened { api, raw };
    // SAFETY: the device is open, and every device has a port 1.
    let abilities = unsafe { Abilities::of(api, raw.as_ptr(), 1) };
    let abilities = abilities.map_err(|e| format!("{name} does not say what it can do: {e}"));
    let ports = (1..=u8::MAX).map_while(|number| port(&opened, &name, number)).collect();
    let abilities = abilities.map(|a| DeviceAbilities {
        max_regions: a.max_mr,
        max_message: u64::from(a.max_message_bytes),
        on_demand: a.on_demand,
    });
    Device { name, abilities, ports }
}

/// A port, if there is one of that number.
fn port(device: &Opened, name: &str, number: u8) -> Option<Port> {
    // SAFETY: the device is open; for a port that it does not have the call fails.
    let attributes = unsafe { port_attributes(device.api, device.raw.as_ptr(), number) }.ok()?;
    let state = match attributes.state {
        ibv_port_state::IBV_PORT_ACTIVE => "active",
        ibv_port_state::IBV_PORT_DOWN => "down",
        ibv_port_state::IBV_PORT_INIT => "initialising",
        ibv_port_state::IBV_PORT_ARMED => "armed",
        ibv_port_state::IBV_PORT_ACTIVE_DEFER => "deferred",
        _ => "unknown",
    };
    const ETHERNET: u8 = 2;
    // The enumeration counts powers of two from 256 bytes on.
    let mtu = |code: u32| if (1..=5).contains(&code) { 128 << code } else { 0 };
    let table = attributes.gid_tbl_len.clamp(0, MAX_GIDS);
    Some(Port {
        number,
        active: attributes.state == ibv_port_state::IBV_PORT_ACTIVE,
        state,
        link: if attributes.link_layer == ETHERNET { "ethernet" } else { "infiniband" },
        mtu: mtu(attributes.active_mtu),
        max_mtu: mtu(attributes.max_mtu),
        gids: (0..table).filter_map(|index| gid(device, name, number, index)).collect(),
    })
}

/// An entry of a port's table, if it is in use.
fn gid(device: &Opened, name: &str, port: u8, index: i32) -> Option<Gid> {
    let mut gid = ibv_gid { raw: [0; 16] };
    // SAFETY: the device is open; `gid` is where the entry goes.
    let result = unsafe { (device.api.ibv_query_gid)(device.raw.as_ptr(), port, index, &mut gid) };
    // SAFETY: every bit pattern is a valid array of bytes.
    let raw = unsafe { gid.raw };
    if result != 0 || raw == [0; 16] {
        return None;
    }
    let attribute = |what: &str| {
        let path = format!("/sys/class/infiniband/{name}/ports/{port}/gid_attrs/{what}/{index}");
        fs::read_to_string(path).map(|text| text.trim().to_string()).unwrap_or_default()
    };
    let address = Ipv6Addr::from(raw).to_canonical();
    Some(Gid { index: index as u32, address, kind: attribute("types"), interface: attribute("ndevs") })
}

fn cgroup() -> Vec<String> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::")) else { return Vec::new() };
    let limits = fs::read_to_string(format!("/sys/fs/cgroup{path}/rdma.max")).unwrap_or_default();
    limits.lines().map(str::to_string).collect()
}
