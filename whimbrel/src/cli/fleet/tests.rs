use super::*;
use std::os::unix::fs::PermissionsExt;

const FLEET: &str = "
name = 'shop'
[[hosts]]
name = 'hosta'
addresses = ['10.1.0.1', '10.2.0.1']
migration = '10.3.0.1'
memory = '200G'
cpus = 128
fencing = { ip = '10.9.0.1' }
[[hosts]]
name = 'hostb'
addresses = ['10.1.0.2', '10.2.0.2']
migration = '10.3.0.2'
memory = '100G'
cpus = 64
fencing = { ip = '10.9.0.2' }
[fencing]
agent = 'fence_ipmilan'
options = { username = 'a<b&\"c\"' }
[host]
bandwidth = '10G'
[networks.blue]
bridge = 'br0'
[storage.fast]
path = '/shared/fast'
type = 'nfs4'
[properties]
migration-limit = 4
[corosync.totem]
token = 5000
[machines.web1]
memory = '2G'
vcpus = 3
disk = 'storage=fast,file=web1.raw'
fleet = { migrate-options = '--bandwidth 1G', priority = 5 }
";

/// What the command makes of a file; its folder.
fn made(content: &str, without_fencing: bool) -> anyhow::Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    again(content, without_fencing, &folder)?;
    Ok(folder)
}

fn again(content: &str, without_fencing: bool, folder: &tempfile::TempDir) -> anyhow::Result<()> {
    let file = folder.path().join("fleet.toml");
    fs::write(&file, content)?;
    let init = FleetCommand::Init { file, folder: folder.path().join("out"), without_fencing, days: 1 };
    fleet(FleetArgs { command: init }).map(drop)
}

fn refused(content: &str) -> String {
    format!("{:#}", made(content, false).expect_err(content))
}

#[test]
fn one_file_makes_what_each_host_needs() {
    let folder = made(FLEET, false).unwrap();
    let out = folder.path().join("out");
    let read =
        |name: &str| fs::read_to_string(out.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let service = HostConfig::read(&out.join("hosts/hostb/etc/whimbrel/host.toml")).unwrap();
    assert_eq!(service.listen, Some("10.3.0.2:4444".parse().unwrap()));
    assert_eq!((service.bandwidth, service.networks["blue"].bridge.as_str()), (Some(10_000_000_000), "br0"));
    assert_eq!(service.storage["fast"].path, Path::new("/shared/fast"));
    let machine = read("hosts/hosta/etc/whimbrel/machines/web1.toml");
    assert!(machine.contains("vcpus = 3") && !machine.contains("fleet"), "{machine}");
    let conf = read("hosts/hosta/etc/corosync/corosync.conf");
    for line in ["two_node: 1", "token: 5000", "ring1_addr: 10.2.0.2", "nodeid: 2", "crypto_cipher: aes256"] {
        assert!(conf.contains(line), "{line}: {conf}");
    }
    let key = out.join("hosts/hosta/etc/corosync/authkey");
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o400);
    assert_eq!(fs::read(&key).unwrap(), fs::read(out.join("hosts/hostb/etc/corosync/authkey")).unwrap());
    assert!(read("hosts.names").contains("10.3.0.2 hostb-migration"));
    let cib = read("cib.xml");
    for part in [
        "name=\"stonith-enabled\" value=\"true\"",
        "name=\"migration-limit\" value=\"4\"",
        "name=\"username\" value=\"a&lt;b&amp;&quot;c&quot;\"",
        "rsc=\"fence-hosta\" node=\"hosta\" score=\"-INFINITY\"",
        "name=\"memory\" value=\"204800\"",
        "name=\"memory\" value=\"2048\"",
        "name=\"migrate_options\" value=\"--bandwidth 1G\"",
        "name=\"migration_network_suffix\" value=\"-migration\"",
        "name=\"migrate_from\" interval=\"0s\" timeout=\"600s\" on-fail=\"block\"",
        "name=\"stop\" interval=\"0s\" timeout=\"120s\" on-fail=\"fence\"",
    ] {
        assert!(cib.contains(part), "{part}: {cib}");
    }
    assert!(!cib.contains("failure-timeout"), "what a guest's move has failed with must not expire");
}

#[test]
fn made_again_certificates_and_keys_stay() {
    let folder = made(FLEET, false).unwrap();
    let read = |name: &str| fs::read(folder.path().join("out").join(name)).unwrap();
    let names = ["authkey", "pki/ca.pem", "hosts/hosta/etc/whimbrel/tls/cert.pem"];
    let before = names.map(read);
    again(&FLEET.replace("[machines.web1]", "[machines.web2]"), false, &folder).unwrap();
    assert!(names.map(read) == before);
    let machines = folder.path().join("out/hosts/hosta/etc/whimbrel/machines");
    assert!(machines.join("web2.toml").exists() && !machines.join("web1.toml").exists());
}

#[test]
fn what_could_hurt_a_guest_is_refused() {
    let without =
        FLEET.replace("fencing = { ip = '10.9.0.1' }\n", "").replace("fencing = { ip = '10.9.0.2' }\n", "");
    let without =
        without.replace("[fencing]\nagent = 'fence_ipmilan'\noptions = { username = 'a<b&\"c\"' }\n", "");
    assert!(refused(&without).contains("there is no [fencing]"));
    let folder = made(&without, true).unwrap();
    let cib = fs::read_to_string(folder.path().join("out/cib.xml")).unwrap();
    assert!(cib.contains("name=\"stonith-enabled\" value=\"false\"") && !cib.contains("on-fail=\"fence\""));

    for kind in ["9p", "block", "nfs3", "xfs"] {
        let local = FLEET.replace("'nfs4'", &format!("'{kind}'"));
        assert!(refused(&local).contains("do not reach other hosts"), "{kind}");
        let reserved = local.replace("path = '/shared/fast'", "path = '/shared/fast'\nreservation = true");
        assert!(made(&reserved, false).is_ok(), "{kind}");
        assert!(made(&local.replace("fence_ipmilan", "fence_scsi"), false).is_ok(), "{kind}");
        let unfenced = without.replace("type = 'nfs4'", &format!("type = '{kind}'\nreservation = true"));
        assert!(made(&unfenced, true).is_err(), "{kind}: a reservation alone");
    }

    let elsewhere = FLEET.replace("storage=fast,file=web1.raw", "/images/web1.raw");
    assert!(refused(&elsewhere).contains("on no storage of this file"));
    assert!(made(&elsewhere.replace("web1.raw", "web1.raw,readonly"), false).is_ok());
    assert!(made(&elsewhere.replace("/images", "/shared/fast"), false).is_ok());
    assert!(refused(&FLEET.replace("storage=fast", "storage=slow")).contains("on no storage"));
}

#[test]
fn what_is_wrong_is_told() {
    for (from, to, expected) in [
        ("name = 'shop'", "name = 'shop'\ncolour = 1", "fleet.toml:3: unknown field `colour`"),
        ("name = 'hostb'", "name = 'hosta'", "two hosts called hosta"),
        ("name = 'hostb'", "name = '9b'", "does not begin with a letter"),
        ("'10.1.0.2', '10.2.0.2'", "'10.1.0.2'", "another number of addresses"),
        ("'10.1.0.2', '10.2.0.2'", "'10.1.0.1', '10.2.0.2'", "two hosts have the address 10.1.0.1"),
        ("memory = '100G'\n", "", "either all hosts say `memory`"),
        ("memory = '100G'", "memory = 'much'", "write a size such as 200G"),
        ("migration = '10.3.0.2'\n", "", "either all hosts say `migration`"),
        ("vcpus = 3", "vcpus = 'three'", "machine web1"),
        ("vcpus = 3", "colour = 3", "is not an option of `whimbrel run`"),
        ("priority = 5", "weight = 5", "unknown field `weight`"),
        ("web1]", "whimbrel-host]", "resources of the cluster's own"),
        ("bandwidth = '10G'", "speed = '10G'", "unknown field `speed`"),
    ] {
        let told = refused(&FLEET.replacen(from, to, 1));
        assert!(told.contains(expected), "{to}: {told}");
    }
}

#[test]
fn the_example_of_the_guide_is_good() {
    let guide = include_str!("../../../../docs/fleet.md");
    let example = guide.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    made(example, false).unwrap();
}
