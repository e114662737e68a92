//! What this host lacks for migrations over RDMA. None of it is fatal, because TCP needs none of it.

use super::{Finding, good, limited};
use transport_rdma::probe::{self, Device, Host, Port};

/// Examines this host's RDMA for a machine of `memory` bytes.
pub(super) fn examine(memory: u64) -> Vec<Finding> {
    findings(&probe::host(), memory)
}

fn findings(host: &Host, memory: u64) -> Vec<Finding> {
    let devices = match &host.devices {
        Ok(devices) => devices,
        Err(why) => {
            return vec![limited("RDMA", format!("not available, so migrations use TCP: {why}"), None)];
        }
    };
    let mut findings: Vec<_> = devices.iter().flat_map(device).collect();
    if let Err(why) = &host.connections {
        let mend = Some("modprobe rdma_ucm".into());
        findings.push(limited("RDMA connections", why.clone(), mend));
    }
    findings.push(locked_memory(host.locked_memory, memory));
    for line in &host.cgroup {
        let mend = Some("raise it in the cgroup's rdma.max if migrations fail with \"rdma cgroup\"".into());
        findings.push(limited("RDMA cgroup", format!("limited to {line}"), mend));
    }
    findings
}

fn device(device: &Device) -> Vec<Finding> {
    match &device.abilities {
        Err(why) => vec![limited(
            "RDMA device",
            format!("{}: {why}", device.name),
            Some("give this user access to /dev/infiniband/uverbs*".into()),
        )],
        Ok(abilities) => {
            let paging = if abilities.on_demand { "on-demand paging" } else { "memory is pinned" };
            let found = format!(
                "{}: messages up to {} MiB, {} memory regions, {paging}",
                device.name,
                abilities.max_message >> 20,
                abilities.max_regions
            );
            std::iter::once(good("RDMA device", found))
                .chain(device.ports.iter().map(|p| port(&device.name, p)))
                .collect()
        }
    }
}

fn port(device: &str, port: &Port) -> Finding {
    let what = "RDMA port";
    let name = format!("{device}/{}", port.number);
    let interface = port.gids.iter().map(|gid| gid.interface.as_str()).find(|name| !name.is_empty());
    let interface = interface.unwrap_or("INTERFACE");
    if !port.active {
        let mend = Some(format!("ip link set {interface} up; check the cable and the switch"));
        return limited(what, format!("{name} is {}", port.state), mend);
    }
    // A source cannot be given the link-local address that the card makes up for itself.
    let routable = port.gids.iter().find(|gid| match gid.address {
        std::net::IpAddr::V4(_) => true,
        std::net::IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    });
    let Some(gid) = routable else {
        let mend = Some(format!("ip address add ADDRESS/PREFIX dev {interface}"));
        return limited(what, format!("{name} has no GID with an address of this host"), mend);
    };
    if port.mtu < port.max_mtu && port.link == "ethernet" {
        return limited(
            what,
            format!(
                "{name} at {}: packets of {} bytes where {} would be faster",
                gid.address, port.mtu, port.max_mtu
            ),
            Some(format!("ip link set {} mtu 9000, on all hosts and switches between", gid.interface)),
        );
    }
    good(what, format!("{name} is active at {} ({}), packets of {} bytes", gid.address, gid.kind, port.mtu))
}

/// Guest RAM that RDMA writes from or into is pinned, and pinning is limited.
fn locked_memory(limit: Option<u64>, memory: u64) -> Finding {
    let what = "locked memory";
    match limit {
        None => good(what, "no limit".into()),
        Some(limit) if limit >= memory => {
            good(what, format!("{} MiB may be pinned for {} MiB", limit >> 20, memory >> 20))
        }
        Some(limit) => limited(
            what,
            format!(
                "{} MiB may be pinned, {} MiB are wanted: RDMA would fall back to TCP",
                limit >> 20,
                memory >> 20
            ),
            Some("ulimit -l unlimited, LimitMEMLOCK=infinity in a unit, or CAP_IPC_LOCK".into()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;
    use transport_rdma::probe::{DeviceAbilities, Gid};

    fn host(change: impl FnOnce(&mut Host)) -> Host {
        let gid =
            Gid { index: 1, address: [10, 1, 0, 2].into(), kind: "RoCE v2".into(), interface: "eth7".into() };
        let port = Port {
            number: 1,
            active: true,
            state: "active",
            link: "ethernet",
            mtu: 4096,
            max_mtu: 4096,
            gids: vec![gid],
        };
        let abilities = DeviceAbilities { max_regions: 1000, max_message: 1 << 30, on_demand: false };
        let device = Device { name: "rxe7".into(), abilities: Ok(abilities), ports: vec![port] };
        let mut host =
            Host { devices: Ok(vec![device]), connections: Ok(()), locked_memory: None, cgroup: Vec::new() };
        change(&mut host);
        host
    }

    fn port_of(host: &mut Host) -> &mut Port {
        &mut host.devices.as_mut().unwrap()[0].ports[0]
    }

    /// The one finding that is not good.
    fn trouble(change: impl FnOnce(&mut Host)) -> Finding {
        let mut findings = findings(&host(change), 1 << 30);
        findings.retain(|f| f.level != Level::Good);
        assert_eq!(findings.len(), 1, "{findings:?}");
        findings.remove(0)
    }

    #[test]
    fn a_host_in_order_gives_no_trouble() {
        assert!(findings(&host(|_| ()), 1 << 40).iter().all(|f| f.level == Level::Good));
    }

    #[test]
    fn each_trouble_is_named_with_what_mends_it() {
        let mend = |finding: Finding| finding.mend.unwrap();
        assert!(trouble(|h| h.devices = Err("no library".into())).found.contains("no library"));
        assert!(mend(trouble(|h| port_of(h).active = false)).contains("ip link set eth7 up"));
        assert!(mend(trouble(|h| port_of(h).mtu = 1024)).contains("eth7 mtu 9000"));
        assert!(
            mend(trouble(|h| port_of(h).gids[0].address = "fe80::1".parse().unwrap()))
                .contains("ip address add")
        );
        assert!(mend(trouble(|h| h.locked_memory = Some(8 << 20))).contains("ulimit -l"));
        assert!(mend(trouble(|h| h.connections = Err("ENODEV".into()))).contains("rdma_ucm"));
        assert!(trouble(|h| h.cgroup = vec!["rxe7 hca_handle=2".into()]).found.contains("hca_handle=2"));
    }
}
