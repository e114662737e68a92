//! Values of options: sizes, names, disks, network interfaces, places for output.

use std::path::PathBuf;
use std::time::Duration;
use vmm::names;
use vmm::virtio::block::{BlockConfig, MAX_QUEUES, OnError};
use vmm::virtio::net::{Announcing, MAX_PAIRS, Mac, TapConfig};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialTarget {
    Stdio,
    Output(OutputTarget),
}

impl std::str::FromStr for SerialTarget {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "stdio" => SerialTarget::Stdio,
            output => SerialTarget::Output(output.parse()?),
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutputTarget {
    Stdout,
    None,
    File(PathBuf),
}

impl std::str::FromStr for OutputTarget {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "stdout" => OutputTarget::Stdout,
            "none" => OutputTarget::None,
            path => OutputTarget::File(path.into()),
        })
    }
}

/// A size in bytes; K, M, G and T are powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let config = parse_size::Config::new().with_binary();
    config.parse_size(text).map_err(|e| format!("{e}; write a size such as 512M or 4G"))
}

/// Bits a second; K, M, G and T are powers of 1000, as it is usual for networks.
pub fn bandwidth(text: &str) -> Result<u64, String> {
    let config = parse_size::Config::new().with_decimal();
    match config.parse_size(text) {
        Ok(0) => Err("nothing would ever arrive; leave the option out for no cap".into()),
        Ok(bits) => Ok(bits),
        Err(error) => Err(format!("{error}; write bits a second such as 500M or 10G")),
    }
}

/// The same, or 0 for no cap.
pub fn bandwidth_or_none(text: &str) -> Result<u64, String> {
    if text == "none" { Ok(0) } else { bandwidth(text) }
}

/// A size that guest memory can have.
pub fn memory(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    vmm::memory::layout::regions(bytes).map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// A name that a machine can have.
pub fn name(text: &str) -> Result<String, String> {
    vmm::machine::check_name(text).map_err(|error| error.to_string())?;
    Ok(text.into())
}

/// What is done about a disk's requests that fail.
fn on_error(option: &str, text: &str) -> Result<OnError, String> {
    match text {
        "report" => Ok(OnError::Report),
        "stop" => Ok(OnError::Stop),
        "enospc" => Ok(OnError::Enospc),
        _ => Err(format!("{option}={text}: use report, stop or enospc")),
    }
}

/// A disk, with the options after its path, or after the name of its storage.
pub fn disk(text: &str) -> Result<BlockConfig, String> {
    let mut parts = text.split(',');
    let mut config = match parts.next() {
        Some(first) => match first.strip_prefix("storage=") {
            Some(storage) => {
                names::check(storage).map_err(|error| error.to_string())?;
                let file = parts.next().and_then(|part| part.strip_prefix("file="));
                let file = PathBuf::from(file.ok_or("after the storage, name the image by file=PATH")?);
                names::check_file(&file).map_err(|error| error.to_string())?;
                BlockConfig::in_storage(storage.into(), file)
            }
            None if !first.is_empty() => BlockConfig::new(first.into()),
            None => return Err("begin with the path of an image, or with storage=NAME,file=PATH".into()),
        },
        None => return Err("begin with the path of an image".into()),
    };
    for option in parts {
        match option.split_once('=') {
            None if option == "readonly" => config.readonly = true,
            None if option == "cached" => config.cached = true,
            Some(("queues", number)) => {
                let queues = number.parse().ok().filter(|queues| (1..=MAX_QUEUES).contains(queues));
                config.queues = queues.ok_or_else(|| format!("queues={number}: use 1 to {MAX_QUEUES}"))?;
            }
            Some(("werror", policy)) => config.errors.write = on_error("werror", policy)?,
            Some(("rerror", policy)) => config.errors.read = on_error("rerror", policy)?,
            _ => {
                return Err(format!(
                    "\"{option}\" is not an option of a disk; use readonly, cached, queues=N, werror=POLICY or \
                     rerror=POLICY"
                ));
            }
        }
    }
    Ok(config)
}

/// A network interface of a machine that is started here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetArg {
    /// Its tap; without a name, one that is made for it.
    pub tap: TapConfig,
    /// Its network.
    pub network: Option<String>,
    /// Its address; without one, a random one.
    pub mac: Option<Mac>,
    /// Pairs of queues.
    pub pairs: u16,
}

/// A network interface, by its options.
pub fn net(text: &str) -> Result<NetArg, String> {
    let mut tap = TapConfig::named("");
    let (mut network, mut mac, mut pairs) = (None, None, 1);
    for option in text.split(',') {
        match option.split_once('=') {
            Some(("tap", name)) if !name.is_empty() => tap.name = name.into(),
            Some(("network", name)) => {
                names::check(name).map_err(|error| error.to_string())?;
                network = Some(name.into());
            }
            Some(("mac", address)) => mac = Some(address.parse()?),
            Some(("queues", number)) => {
                let number = number.parse().ok().filter(|pairs| (1..=MAX_PAIRS).contains(pairs));
                pairs = number.ok_or_else(|| format!("{option}: use 1 to {MAX_PAIRS} pairs"))?;
            }
            Some(("offloads", "off")) => tap.offloads = false,
            _ => {
                return Err(format!(
                    "\"{option}\" is not an option of a network interface; use network=NAME, tap=NAME, mac=ADDRESS, \
                     queues=PAIRS or offloads=off"
                ));
            }
        }
    }
    if tap.name.is_empty() && network.is_none() {
        return Err("name its network by network=NAME, or its tap by tap=NAME".into());
    }
    Ok(NetArg { tap, network, mac, pairs })
}

/// A tap for an interface that will arrive, and that brings everything else with it.
pub fn tap(text: &str) -> Result<TapConfig, String> {
    match net(text)? {
        NetArg { tap, network: None, mac: None, pairs: 1 } => Ok(tap),
        _ => Err("a guest brings the network, the address and the queues of its interfaces with it".into()),
    }
}

/// When to tell the network where a guest is.
pub fn announcing(text: &str) -> Result<Announcing, String> {
    let mut announcing = Announcing::default();
    for option in text.split(',') {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let time = || match humantime::parse_duration(value) {
            Ok(time) if time <= Duration::from_secs(3600) => Ok(time),
            _ => Err(format!("{option}: write a time such as 50ms, up to 1h")),
        };
        match name {
            "rounds" => {
                let rounds = value.parse().ok().filter(|rounds| *rounds <= 1000);
                announcing.rounds = rounds.ok_or_else(|| format!("{option}: use 0 to 1000"))?;
            }
            "initial" => announcing.initial = time()?,
            "step" => announcing.step = time()?,
            "max" => announcing.most = time()?,
            _ => return Err(format!("\"{option}\": use rounds=N, initial=TIME, step=TIME or max=TIME")),
        }
    }
    Ok(announcing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm::virtio::block::ErrorPolicy;

    #[test]
    fn a_disk_is_a_path_with_options() {
        let config = disk("/img/a.raw,readonly,queues=4").unwrap();
        assert_eq!(config.path, PathBuf::from("/img/a.raw"));
        assert!(config.readonly && !config.cached);
        assert_eq!(config.queues, 4);
        let careful = disk("a,werror=stop,rerror=enospc").unwrap().errors;
        assert_eq!(careful, ErrorPolicy { read: OnError::Enospc, write: OnError::Stop });
        assert_eq!(disk("a").unwrap().errors, ErrorPolicy { read: OnError::Report, write: OnError::Enospc });
        let named = BlockConfig::in_storage("fast".into(), "web/1.raw".into());
        assert_eq!(disk("storage=fast,file=web/1.raw"), Ok(named.clone()));
        let readonly = BlockConfig { readonly: true, ..named };
        assert_eq!(disk("storage=fast,file=web/1.raw,readonly"), Ok(readonly));
        for wrong in [
            "storage=fast",
            "storage=,file=a",
            "storage=fast,file=",
            "storage=fast,file=/a",
            "storage=fast,file=../a",
            "storage=fast,readonly,file=a",
            "a,werror",
            "a,werror=ignore",
            "",
            ",readonly",
            "a,writable",
            "a,queues=0",
            "a,queues=17",
            "a,queues",
            "a,readonly=1",
        ] {
            assert!(disk(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_network_interface_is_a_tap_with_options() {
        let tap_config = |offloads| TapConfig { offloads, ..TapConfig::named("tap0") };
        let plain = NetArg { tap: tap_config(true), network: None, mac: None, pairs: 1 };
        assert_eq!(net("tap=tap0"), Ok(plain.clone()));
        let blue = Some("blue".to_string());
        assert_eq!(net("tap=tap0,network=blue"), Ok(NetArg { network: blue.clone(), ..plain.clone() }));
        assert_eq!(net("network=blue"), Ok(NetArg { network: blue, tap: TapConfig::named(""), ..plain }));
        let mac = Some(Mac([0x52, 0x54, 0, 0, 0, 1]));
        let all = NetArg { tap: tap_config(false), network: None, mac, pairs: 4 };
        assert_eq!(net("mac=52:54:00:00:00:01,queues=4,offloads=off,tap=tap0"), Ok(all));
        let wrong = [
            "",
            "tap0",
            "tap=",
            "queues=2",
            "tap=a,network=",
            "network=a b",
            "tap=a,queues=0",
            "tap=a,queues=9",
            "tap=a,mac=1",
            "tap=a,offloads=on",
            "tap=a,mac=00:00:00:00:00:00",
            "tap=a,mac=ff:ff:ff:ff:ff:ff",
        ];
        for wrong in wrong {
            assert!(net(wrong).is_err(), "{wrong}");
        }
        assert_eq!(tap("tap=tap0,offloads=off"), Ok(tap_config(false)));
        assert!(tap("network=blue").is_err() && tap("network=blue,tap=tap0").is_err());
        assert!(tap("tap=tap0,queues=2").is_err() && tap("tap=tap0,mac=52:54:00:00:00:01").is_err());
    }

    #[test]
    fn announcements_have_a_number_and_waits() {
        let default = "rounds=5,initial=50ms,step=100ms,max=550ms";
        assert_eq!(announcing(default), Ok(Announcing::default()));
        assert_eq!(announcing("rounds=0"), Ok(Announcing { rounds: 0, ..Announcing::default() }));
        let most = Duration::from_secs(1);
        assert_eq!(announcing("max=1s"), Ok(Announcing { most, ..Announcing::default() }));
        for wrong in ["", "5", "rounds", "rounds=-1", "rounds=1001", "initial=50", "step=2h", "often=1"] {
            assert!(announcing(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn bandwidths_are_bits_and_powers_of_1000() {
        assert_eq!(bandwidth("10G"), Ok(10_000_000_000));
        assert_eq!(bandwidth("1.5M"), Ok(1_500_000));
        for wrong in ["0", "-1", "much", "10 Gb/s"] {
            assert!(bandwidth(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(size("64M"), Ok(64 << 20));
        assert_eq!(size("1.5G"), Ok(3 << 29));
        assert!(size("many").is_err());
        assert!(size("-1").is_err());
        assert!(memory("0").is_err());
        assert_eq!(memory("16M"), Ok(16 << 20));
    }
}
