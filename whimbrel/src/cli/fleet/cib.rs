//! The cluster's configuration (CIB): what Pacemaker needs to know so that no failed move hurts a guest.
//! docs/fleet.md tells why each of these values is what it is.

use super::file::{Fleet, MIGRATION_SUFFIX, Machine, plain};
use quick_xml::Writer;
use std::io::Result;

/// What must hold in a cluster with our agents, and what suits most. The file may have others.
const PROPERTIES: [(&str, &str); 6] = [
    ("no-quorum-policy", "freeze"),
    ("migration-limit", "2"),
    // Pacemaker's own throttle would take a host that moves guests for one that is overloaded.
    ("load-threshold", "1000%"),
    ("node-health-strategy", "migrate-on-red"),
    ("placement-strategy", "balanced"),
    ("cluster-recheck-interval", "60s"),
];

type Xml = Writer<Vec<u8>>;
type Pairs = Vec<(String, String)>;

/// The CIB as a file.
pub fn cib(fleet: &Fleet, machines: &[Machine]) -> anyhow::Result<Vec<u8>> {
    let rooms = fleet.hosts.iter().map(|host| host.room()).collect::<anyhow::Result<Vec<_>>>()?;
    let mut xml = Writer::new_with_indent(Vec::new(), b' ', 2);
    let head = [
        // The oldest that all of Pacemaker 2.1 understands: it upgrades by itself.
        ("crm_feature_set", "3.16.0"),
        ("validate-with", "pacemaker-3.9"),
        ("epoch", "1"),
        ("num_updates", "0"),
        ("admin_epoch", "1"),
    ];
    element(&mut xml, "cib", &head, |xml| {
        element(xml, "configuration", &[], |xml| {
            element(xml, "crm_config", &[], |xml| {
                set(xml, "cluster_property_set", "cluster", &properties(fleet))
            })?;
            element(xml, "nodes", &[], |xml| {
                for (place, (host, room)) in fleet.hosts.iter().zip(&rooms).enumerate() {
                    let id = (place + 1).to_string();
                    element(xml, "node", &[("id", &id), ("uname", &host.name)], |xml| {
                        set(xml, "utilization", &format!("{}-room", host.name), &owned(room))
                    })?;
                }
                Ok(())
            })?;
            element(xml, "resources", &[], |xml| {
                fencing(xml, fleet)?;
                clone(xml, "host", fleet.times.settle_interval, 60, &Pairs::new())?;
                if fleet.health.enabled {
                    let options: Pairs = fleet
                        .health
                        .options
                        .iter()
                        .map(|(name, value)| (name.clone(), plain(value)))
                        .collect();
                    clone(xml, "health", fleet.health.interval, 30, &options)?;
                }
                machines.iter().try_for_each(|machine| guest(xml, fleet, machine))
            })?;
            element(xml, "constraints", &[], |xml| {
                for host in fleet.hosts.iter().filter(|host| !host.fencing.is_empty()) {
                    let device = device(&host.name);
                    let id = format!("{device}-elsewhere");
                    let of =
                        [("id", id.as_str()), ("rsc", &device), ("node", &host.name), ("score", "-INFINITY")];
                    empty(xml, "rsc_location", &of)?;
                }
                Ok(())
            })?;
            element(xml, "rsc_defaults", &[], |xml| {
                set(xml, "meta_attributes", "defaults", &owned(&[("resource-stickiness", "100".into())]))
            })
        })?;
        empty(xml, "status", &[])
    })?;
    let mut text = xml.into_inner();
    text.push(b'\n');
    Ok(text)
}

fn properties(fleet: &Fleet) -> Pairs {
    let fenced = fleet.fencing.is_some();
    let mut all = owned(&[
        ("cluster-name", fleet.name.clone()),
        ("stonith-enabled", fenced.to_string()),
        ("have-watchdog", "false".into()),
    ]);
    all.extend(PROPERTIES.map(|(name, value)| (name.to_owned(), value.to_owned())));
    for (name, value) in &fleet.properties {
        all.retain(|(known, _)| known != name);
        all.push((name.clone(), plain(value)));
    }
    all
}

/// One device for each host, or one for all if hosts have no options of their own.
fn fencing(xml: &mut Xml, fleet: &Fleet) -> Result<()> {
    let Some(fencing) = &fleet.fencing else { return Ok(()) };
    let options =
        |table: &toml::Table| table.iter().map(|(name, value)| (name.clone(), plain(value))).collect();
    let mut devices: Vec<(String, String, Pairs)> = Vec::new();
    for host in fleet.hosts.iter().filter(|host| !host.fencing.is_empty()) {
        devices.push((device(&host.name), host.name.clone(), options(&host.fencing)));
    }
    if devices.is_empty() {
        let names: Vec<_> = fleet.hosts.iter().map(|host| host.name.as_str()).collect();
        devices.push(("fence-all".into(), names.join(" "), Pairs::new()));
    }
    for (id, hosts, own) in devices {
        element(xml, "primitive", &[("id", &id), ("class", "stonith"), ("type", &fencing.agent)], |xml| {
            let mut all: Pairs = options(&fencing.options);
            all.retain(|(name, _)| !own.iter().any(|(known, _)| known == name));
            all.extend(own);
            if !all.iter().any(|(name, _)| name == "pcmk_host_list" || name == "pcmk_host_map") {
                all.push(("pcmk_host_list".into(), hosts));
            }
            set(xml, "instance_attributes", &format!("{id}-options"), &all)?;
            operations(xml, &id, &[("monitor", 300, 60, None)])
        })?;
    }
    Ok(())
}

fn device(host: &str) -> String {
    format!("fence-{host}")
}

/// An agent that runs on each host.
fn clone(xml: &mut Xml, agent: &str, interval: u32, timeout: u32, options: &Pairs) -> Result<()> {
    let id = format!("whimbrel-{agent}");
    element(xml, "clone", &[("id", &format!("{id}-clone"))], |xml| {
        set(xml, "meta_attributes", &format!("{id}-clone-meta"), &owned(&[("interleave", "true".into())]))?;
        let of = [("id", id.as_str()), ("class", "ocf"), ("provider", "whimbrel"), ("type", agent)];
        element(xml, "primitive", &of, |xml| {
            // A host in bad health keeps those who say so, and settle its moves.
            set(
                xml,
                "meta_attributes",
                &format!("{id}-meta"),
                &owned(&[("allow-unhealthy-nodes", "true".into())]),
            )?;
            set(xml, "instance_attributes", &format!("{id}-options"), options)?;
            operations(xml, &id, &[("monitor", interval, timeout, None)])
        })
    })
}

fn guest(xml: &mut Xml, fleet: &Fleet, machine: &Machine) -> Result<()> {
    let id = &machine.name;
    element(
        xml,
        "primitive",
        &[("id", id), ("class", "ocf"), ("provider", "whimbrel"), ("type", "vm")],
        |xml| {
            let mut meta = owned(&[("allow-migrate", "true".into())]);
            meta.extend(machine.options.priority.map(|priority| ("priority".into(), priority.to_string())));
            set(xml, "meta_attributes", &format!("{id}-meta"), &meta)?;
            let mut options = Pairs::new();
            options
                .extend(machine.options.migrate_options.clone().map(|text| ("migrate_options".into(), text)));
            if fleet.hosts.iter().any(|host| host.migration.is_some()) {
                options.push(("migration_network_suffix".into(), MIGRATION_SUFFIX.into()));
            }
            set(xml, "instance_attributes", &format!("{id}-options"), &options)?;
            let times = &fleet.times;
            let all = [
                ("monitor", times.monitor_interval, times.monitor, None),
                ("start", 0, times.start, None),
                // A guest that cannot be ended must not be started elsewhere.
                ("stop", 0, times.stop, Some(if fleet.fencing.is_some() { "fence" } else { "block" })),
                // With the default, a failed move is followed by a stop.
                ("migrate_to", 0, 30, Some("block")),
                ("migrate_from", 0, times.r#move, Some("block")),
            ];
            operations(xml, id, &all)?;
            let mut needs = Vec::new();
            if fleet.hosts.iter().any(|host| host.memory.is_some()) {
                needs.push(("memory", machine.memory.div_ceil(1 << 20).to_string()));
            }
            if fleet.hosts.iter().any(|host| host.cpus.is_some()) {
                needs.push(("cpu", machine.vcpus.to_string()));
            }
            set(xml, "utilization", &format!("{id}-needs"), &owned(&needs))
        },
    )
}

fn operations(xml: &mut Xml, of: &str, all: &[(&str, u32, u32, Option<&str>)]) -> Result<()> {
    element(xml, "operations", &[], |xml| {
        for (name, interval, timeout, on_fail) in all {
            let (id, interval, timeout) =
                (format!("{of}-{name}"), format!("{interval}s"), format!("{timeout}s"));
            let mut attributes =
                vec![("id", id.as_str()), ("name", name), ("interval", &interval), ("timeout", &timeout)];
            attributes.extend(on_fail.map(|what| ("on-fail", what)));
            empty(xml, "op", &attributes)?;
        }
        Ok(())
    })
}

/// A set of names and values; nothing if it is empty.
fn set(xml: &mut Xml, kind: &str, id: &str, pairs: &Pairs) -> Result<()> {
    if pairs.is_empty() {
        return Ok(());
    }
    element(xml, kind, &[("id", id)], |xml| {
        for (name, value) in pairs {
            let id = format!("{id}-{}", name.trim_start_matches('#'));
            empty(xml, "nvpair", &[("id", &id), ("name", name), ("value", value)])?;
        }
        Ok(())
    })
}

fn element(
    xml: &mut Xml,
    name: &str,
    attributes: &[(&str, &str)],
    inner: impl FnOnce(&mut Xml) -> Result<()>,
) -> Result<()> {
    xml.create_element(name).with_attributes(attributes.iter().copied()).write_inner_content(inner).map(drop)
}

/// An element with nothing in it.
fn empty(xml: &mut Xml, name: &str, attributes: &[(&str, &str)]) -> Result<()> {
    xml.create_element(name).with_attributes(attributes.iter().copied()).write_empty().map(drop)
}

fn owned(pairs: &[(&str, String)]) -> Pairs {
    pairs.iter().map(|(name, value)| (name.to_string(), value.clone())).collect()
}
