//! Writes the inputs that fuzzing begins with to `fuzz/corpus`: real encodings of all that targets read.
//!
//!     cargo run --manifest-path fuzz/Cargo.toml --example seeds

use migration::machine::SourceMachine;
use migration::memory::{Extent, PAGE_SIZE, RegionLayout};
use migration::message::{
    Epilogue, Estimate, Hello, Message, Offer, Prepare, Prepared, Ready, Running, State,
};
use migration::preamble::{Preamble, Status};
use migration::report::Span;
use migration::transport::{Secret, Token};
use migration::{Code, Failure};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;
use transport_rdma::internals;
use transport_tcp::Connector;
use transport_tcp::frame::{self, Header, Kind};
use transport_tcp::tls::{Files, Renewed};
use vmm::internals::described_with;
use vmm::virtio::block::BlockConfig;
use vmm::virtio::console::ConsoleConfig;
use vmm::virtio::net::NetConfig;
use vmm::virtio::{DeviceConfig, LocalConfig};
use vmm::{Host, Machine, MachineConfig, SerialOutput};
use whimbrel_fuzz::tls;

const TOKEN: Token = Token([7; 16]);

/// Writes a target's seeds, by their numbers.
fn write(target: &str, seeds: impl IntoIterator<Item = Vec<u8>>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&folder).expect("a folder");
    for (seed, number) in seeds.into_iter().zip(1..) {
        fs::write(folder.join(format!("seed-{number:02}")), seed).expect("a seed");
    }
}

fn failure() -> Failure {
    Failure::new(Code::DISKS, "the disks are locked")
}

fn messages() -> Vec<Message> {
    let hello = || Hello { software: "whimbrel 0.1.0".into(), features: 3 };
    let span = || vec![Span { name: "load".into(), us: 900 }];
    let details = Ok(vec![8]);
    vec![
        Message::Hello(hello()),
        Message::Welcome(hello()),
        Message::Prepare(Prepare {
            description: vec![1, 2, 3],
            layout: vec![RegionLayout { guest_address: 0, len: 1 << 20 }],
            transports: vec!["void".into(), "tcp".into()],
        }),
        Message::Prepared(Prepared {
            offers: vec![
                Offer { transport: "void".into(), details },
                Offer { transport: "rdma".into(), details: Err(failure()) },
            ],
            build_us: 1000,
        }),
        Message::Waiting,
        Message::State(State { state: vec![4, 5, 6], digest: None }),
        Message::Ready(Ready { spans: span() }),
        Message::Commit,
        Message::Running(Running { spans: span() }),
        Message::Epilogue(Epilogue { remarks: Some("well".into()), cpu_us: 5, resident: 1 << 20 }),
        Message::Retire("void".into()),
        Message::Retired,
        Message::Estimate(Estimate { handover_us: 3000 }),
        Message::Abort(failure()),
        Message::GaveUp(failure()),
    ]
}

/// What one side hears in a migration, by the messages' numbers above.
fn heard(side: u8, numbers: &[usize]) -> Vec<u8> {
    let all = messages();
    let frames = numbers.iter().flat_map(|number| {
        let frame = all[*number].encode();
        [&(frame.len() as u16).to_le_bytes()[..], &frame].concat()
    });
    [side].into_iter().chain(frames).collect()
}

fn control_links() -> Vec<Vec<u8>> {
    let control = Preamble::control(TOKEN);
    let frames: Vec<u8> = messages()
        .iter()
        .map(Message::encode)
        .flat_map(|frame| [&(frame.len() as u32).to_le_bytes()[..], &frame].concat())
        .collect();
    vec![
        [&control.encode()[..], &frames].concat(),
        control.answer(Status::Busy).encode().into(),
        Preamble::data(TOKEN, 1, 4).encode().into(),
        Preamble::version_mismatch().encode().into(),
    ]
}

/// What callers say, to a listener without certificates (0), to one with (1), and to that one through TLS,
/// with a certificate that it trusts (2: for a control link, 3: for a lane).
fn openings() -> Vec<Vec<u8>> {
    let (control, lane) = (Preamble::control(TOKEN), Preamble::data(TOKEN, 1, 4));
    let proof = Secret::NONE.proof(&control.encode());
    let from = |protected: u8, parts: &[&[u8]]| [&[protected][..], &parts.concat()].concat();
    vec![
        from(0, &[&control.encode(), &proof]),
        from(0, &[&control.encode()[..16]]),
        from(0, &[&lane.encode(), &proof]),
        from(0, &[&control.encrypted(true).encode()]),
        from(1, &[&control.encode(), &proof]),
        from(1, &[&greeting()]),
        // An alert, and a record of another kind.
        from(1, &[&control.encrypted(true).encode(), &[21, 3, 3, 0, 2, 2, 40]]),
        from(1, &[&control.encrypted(true).encode(), &[23, 3, 3, 0, 1, 0]]),
        // A proof of another secret, part of one, and more than one.
        from(2, &[&proof, &control.encode()]),
        from(2, &[&proof[..16]]),
        from(3, &[&proof]),
        from(3, &[&[0; 100]]),
    ]
}

/// How a source begins that has a certificate: its preamble, and the first record of TLS.
fn greeting() -> Vec<u8> {
    let folder = tls::folder();
    let protection = Renewed::new(Files::in_folder(folder.path()), Vec::new()).protection();
    let connector = Connector::new(protection.expect("certificates"));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let to = listener.local_addr().expect("an address").to_string();
    let caller = std::thread::spawn(move || connector.connect(&to, TOKEN, Duration::from_secs(5)).is_ok());
    let (mut stream, _) = listener.accept().expect("a caller");
    let mut said = vec![0; migration::preamble::LEN];
    stream.read_exact(&mut said).expect("a preamble");
    let answer = Preamble::decode(said.first_chunk().expect("a preamble")).expect("a preamble");
    stream.write_all(&answer.encode()).expect("an answer");
    let mut record = [0; 5];
    stream.read_exact(&mut record).expect("a record");
    let mut hello = vec![0; u16::from_be_bytes([record[3], record[4]]).into()];
    stream.read_exact(&mut hello).expect("a record");
    drop((stream, listener));
    assert!(!caller.join().expect("a caller"));
    [said, record.into(), hello].concat()
}

/// Files that are changed or replaced.
fn tls_files() -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = (0..4).map(|file| [&[file][..], &change(300, b"A")].concat()).collect();
    all.push([&[0x80][..], tls::FILES[1].1, tls::FILES[0].1].concat());
    all.push([&[0x81][..], tls::FILES[0].1].concat());
    all.push([&[0x83][..], tls::FILES[3].1].concat());
    all.push(b"\x82-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n".to_vec());
    all
}

fn patterns() -> Vec<Vec<u8>> {
    ["a.hosts.example", "*.hosts.example", "10.0.0.7", "fd00::7", "web*\nweb12", "a*b*c\nabbc", "*\n", "\n"]
        .map(|text| text.as_bytes().to_vec())
        .into()
}

fn frames() -> Vec<Vec<u8>> {
    let write = |extents: &[Extent], content: bool| {
        let kind = if content { Kind::Write } else { Kind::Zero };
        let mut bytes = Header { kind, extents: extents.len() as u32, round: 0 }.encode().to_vec();
        extents.iter().for_each(|extent| frame::put_extent(&mut bytes, extent));
        let len: u64 = extents.iter().map(|extent| extent.len).sum();
        bytes.resize(bytes.len() + if content { len as usize } else { 0 }, 0x5a);
        bytes
    };
    let barrier = Header { kind: Kind::Barrier, extents: 0, round: 1 }.encode().to_vec();
    let page = |region, page| Extent { region, offset: page * PAGE_SIZE, len: PAGE_SIZE };
    let large = Extent { region: 0, offset: 1 << 16, len: 1 << 16 };
    vec![
        write(&[page(0, 3)], true),
        [write(&[page(0, 0), page(1, 1023)], false), barrier.clone()].concat(),
        [barrier.clone(), write(&[page(1, 0)], true), barrier].concat(),
        write(&[large], true),
        write(&[Extent { len: 4 << 20, ..page(1, 0) }; 3], false),
        write(&[page(2, 0)], false),
    ]
}

fn rdma() -> Vec<Vec<u8>> {
    let (messages, request, offer) = internals::examples();
    let tagged = |tag: u8, bytes: Vec<u8>| [&[tag][..], &bytes].concat();
    messages.into_iter().map(|bytes| tagged(0, bytes)).chain([tagged(1, request), tagged(2, offer)]).collect()
}

/// A machine's description, short of the host's CPU.
fn description() -> Vec<u8> {
    let host = Host::open().expect("KVM");
    let console = ConsoleConfig { output: SerialOutput::Null, input: None };
    let config = MachineConfig {
        serial: SerialOutput::Null,
        devices: vec![DeviceConfig::Rng, DeviceConfig::Console],
        local: LocalConfig { console, ..LocalConfig::default() },
        ..MachineConfig::new(&host, 16 << 20, 2).expect("a machine")
    };
    Machine::build(&host, config).expect("a machine").describe().expect("a description")
}

/// Descriptions of machines without names and with, whose guests run and stay paused.
fn descriptions() -> Vec<Vec<u8>> {
    let plain = description();
    let mac = "52:54:00:00:00:07".parse().expect("an address");
    let net = |number, network: Option<&str>| {
        DeviceConfig::Net(NetConfig {
            number,
            mac,
            pairs: 2,
            negotiated: None,
            network: network.map(Into::into),
        })
    };
    let disk = |storage: Option<&str>| {
        let config = BlockConfig { storage: storage.map(Into::into), ..BlockConfig::new("web/1.raw".into()) };
        DeviceConfig::Block(config)
    };
    let unnamed = vec![DeviceConfig::Rng, net(0, None), disk(None)];
    let named = vec![disk(Some("fast")), DeviceConfig::Rng, net(0, Some("blue")), net(1, None)];
    let with = |devices: &[DeviceConfig], paused| {
        described_with(&plain, devices.to_vec(), paused).expect("a description")
    };
    vec![plain.clone(), with(&unnamed, true), with(&named, false), with(&named, true)]
}

/// The driver's doings in `whimbrel_fuzz::guest`.
mod driver {
    pub fn start() -> Vec<u8> {
        [&[0][..], &u64::MAX.to_le_bytes()].concat()
    }

    pub fn write(address: u32, bytes: &[u8]) -> Vec<u8> {
        [&[5][..], &address.to_le_bytes(), &[bytes.len() as u8], bytes].concat()
    }

    /// A chain of buffers (address, length, whether the device writes it), served at once.
    pub fn request(queue: u8, buffers: &[(u32, u32, bool)]) -> Vec<u8> {
        let mut bytes = vec![queue << 4 | 7, buffers.len() as u8 - 1];
        for (address, len, input) in buffers {
            bytes.extend(address.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            bytes.push(if *input { 2 } else { 0 });
        }
        bytes
    }

    /// The same, whose descriptors are in a table of their own.
    pub fn indirect(queue: u8, table: u32) -> Vec<u8> {
        let mut bytes = vec![queue << 4 | 7, 0];
        bytes.extend(table.to_le_bytes());
        bytes.extend(32u32.to_le_bytes());
        bytes.push(4);
        bytes
    }
}

const BUFFERS: u32 = 1 << 20;

fn rng() -> Vec<Vec<u8>> {
    let start = driver::start();
    let table: Vec<u8> = [u64::from(BUFFERS), 64 | 3 << 32 | 1 << 48, u64::from(BUFFERS) + 64, 64 | 2 << 32]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    vec![
        [start.clone(), driver::request(0, &[(BUFFERS, 100, true), (BUFFERS + 4096, 50, true)])].concat(),
        [start.clone(), driver::write(BUFFERS + 8192, &table), driver::indirect(0, BUFFERS + 8192)].concat(),
        [start, driver::request(0, &[(u32::MAX, 100, true)])].concat(),
    ]
}

fn console() -> Vec<Vec<u8>> {
    let start = driver::start();
    vec![
        [start.clone(), driver::write(BUFFERS, b"hello"), driver::request(1, &[(BUFFERS, 5, false)])]
            .concat(),
        [start, driver::request(0, &[(BUFFERS, 100, true)]), driver::request(0, &[(BUFFERS, 100, true)])]
            .concat(),
    ]
}

fn block() -> Vec<Vec<u8>> {
    let header = |kind: u32, sector: u64| {
        driver::write(BUFFERS, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat())
    };
    let status = (BUFFERS + 0x8000, 1, true);
    let data = |len, input| driver::request(0, &[(BUFFERS, 16, false), (BUFFERS + 4096, len, input), status]);
    let mut seeds = Vec::new();
    for how in [0, 1, 2, 5] {
        let begin = [vec![how], driver::start()].concat();
        seeds.push([begin.clone(), header(0, 1), data(4096, true), header(1, 2), data(512, false)].concat());
        // Flush, discard, write zeros, identity.
        let segment = [&8u64.to_le_bytes()[..], &8u32.to_le_bytes(), &[0; 4]].concat();
        let segment = driver::write(BUFFERS + 4096, &segment);
        let flush = driver::request(0, &[(BUFFERS, 16, false), status]);
        let rest =
            [header(4, 0), flush, segment, header(11, 0), data(16, false), header(13, 0), data(16, false)];
        seeds.push([begin, rest.concat(), header(8, 0), data(20, true)].concat());
    }
    seeds
}

fn net() -> Vec<Vec<u8>> {
    // With 12 bytes of header before each frame, two of which come in.
    let frame = |len: u16| [&(12 + len).to_le_bytes()[..], &[0; 12], &vec![0x5a; len.into()]].concat();
    let arrived = |pairs: u8| [vec![pairs | 2 << 5], frame(60), frame(1500), driver::start()].concat();
    let receive = |queue, len| driver::request(queue, &[(BUFFERS, len, true)]);
    let transmit = |queue| driver::request(queue, &[(BUFFERS, 12, false), (BUFFERS + 4096, 60, false)]);
    let command = |queue, class: u8, number: u8, data: &[u8]| {
        let status = (BUFFERS + 0x8000, 1, true);
        let buffers = [(BUFFERS, 2, false), (BUFFERS + 4096, data.len() as u32, false), status];
        [
            driver::write(BUFFERS, &[class, number]),
            driver::write(BUFFERS + 4096, data),
            driver::request(queue, &buffers),
        ]
        .concat()
    };
    // The driver's features are those that it is offered, or only that of version 1.
    let plain = [&[0][..], &0u64.to_le_bytes()].concat();
    vec![
        [arrived(0), receive(0, 2000), receive(0, 2000), transmit(1)].concat(),
        [arrived(0), receive(0, 30), receive(0, 100), receive(0, 2000), receive(0, 2000)].concat(),
        [vec![1 << 5], frame(60), plain, receive(0, 2000), transmit(1)].concat(),
        [arrived(1), command(4, 4, 0, &[2, 0]), receive(2, 4000), transmit(3), vec![12]].concat(),
        [arrived(0), command(2, 1, 1, &[2, 0, 0, 0, 0, 1]), command(2, 3, 0, &[]), vec![12]].concat(),
        [arrived(0), command(2, 5, 0, &[2, 0, 0, 0, 0, 0, 0, 0]), vec![10, 12, 11]].concat(),
    ]
}

fn ports() -> Vec<Vec<u8>> {
    let register = |device: u8, register: u8, value: &[u8]| {
        let len = match value.len() {
            1 => 0x00,
            2 => 0x10,
            _ => 0x20,
        };
        [&[3 | len, device, register][..], value].concat()
    };
    vec![
        // Serial port: enable, send, look.
        vec![0, 0xf9, 3, 3, 0, 0xf8, 3, b'x', 2, 0xfd, 3],
        // Power: enable the button, press it, look, clear.
        vec![0x10, 2, 6, 0, 1, 12, 0x12, 0, 6, 0x10, 0, 6, 0, 1],
        [
            register(1, 4, &[0, 0]),
            register(1, 0x10, &[0xff; 4]),
            vec![0x24, 1, 0x10],
            register(1, 4, &[6, 0]),
        ]
        .concat(),
        [register(2, 0x10, &0xd123_0000u32.to_le_bytes()), vec![0x28], 0xd123_0014u64.to_le_bytes().into()]
            .concat(),
        [&[5, 20, 0, 1][..], &[5, 20, 0, 3], &[0x26, 4, 0], &[10, 11, 9]].concat(),
    ]
}

/// Changes to a good disk or state.
fn change(at: u32, bytes: &[u8]) -> Vec<u8> {
    [&at.to_le_bytes()[..], &[bytes.len() as u8], bytes].concat()
}

fn boot_disks() -> Vec<Vec<u8>> {
    let good = (0..4).map(|which| vec![which]);
    // A link that claims to be 25 GB long; and a disk with a partition for /boot.
    let later = [vec![2, 0x6b, 0x27, 1, 0x18, 0xff, 0, 6], vec![4]];
    let changes = [
        // The number of entries, their size, the table's place.
        (2, 512 + 80, &[0xff; 4][..]),
        (2, 512 + 84, &[0, 16]),
        (2, 512 + 72, &[0xff; 8]),
        (3, 446 + 8, &[0xff; 8]),
        // In the superblock: blocks, block size, features.
        (1, 1024 + 4, &[0xff; 4]),
        (1, 1024 + 24, &[6]),
        (1, 1024 + 96, &[0xff]),
        // Where its group descriptors and inodes are.
        (1, 2048, &[0xff; 8]),
        (1, 6 << 10, &[0xff; 8]),
    ];
    let changed = changes.map(|(which, at, bytes)| [&[which][..], &change(at, bytes)].concat());
    good.chain(changed).chain(later).collect()
}

fn configs() -> Vec<Vec<u8>> {
    [
        "run\n-m\n64M\n-c\n2\n--disk\na.raw,readonly,queues=2\n--net\ntap=vm1,mac=52:54:00:00:00:01,queues=2",
        "run\0memory = '2G'\nvcpus = 2\ndisk = ['a.raw,cached', 'b.raw']\nrng = true\nserial = 'none'\n",
        "run\n--announce\nrounds=3,initial=10ms,step=1s,max=2s\n--pages\n2m\n--fill\n1.5G\n--fill-with\nzeros",
        "receive\n-l\n127.0.0.1:7000\n--disks\n/a\n--net\ntap=t,offloads=off",
        "receive\0listen = '[::1]:7'\ndisks = ['/a']\nonce = true\n",
        "migrate\n--api\na\n--to\nhost:1\n--downtime-limit\n20ms\n--timeout\n2m\n--on-stall\nforce",
        "demo\n--via\n::1\n--moves\n3\n--working-set\n8M",
        "doctor\n-m\n4G\n--json",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

fn requests() -> Vec<Vec<u8>> {
    let body = "{\"to\":\"host:1\",\"transport\":\"tcp\",\"streams\":2,\"downtime_limit_ms\":100,\"timeout_s\":5,\
                \"on_stall\":\"abort\",\"compare_memory\":true,\"silence_s\":3}";
    let post = format!(
        "POST /v1/migration HTTP/1.1\r\nhost: vm\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let put = "PUT /v1/vm/resume?force=true HTTP/1.1\r\nhost: vm\r\n\r\n";
    [
        body,
        &post,
        put,
        "GET /v1/vm HTTP/1.1\r\nhost: vm\r\n\r\nDELETE /v1/migration HTTP/1.1\r\nhost: vm\r\n\r\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

/// Requests that make something of a guest that is here.
fn orders() -> Vec<Vec<u8>> {
    let put = |what: &str| format!("PUT /v1/vm/{what} HTTP/1.1\r\nhost: vm\r\n\r\n");
    let get = |what: &str| format!("GET /v1/{what} HTTP/1.1\r\nhost: vm\r\n\r\n");
    let body = "{\"to\":\"127.0.0.1:1\",\"transport\":\"tcp\"}";
    let migrate = |how: &str| {
        let head = "HTTP/1.1\r\nhost: vm\r\ncontent-type: application/json\r\ncontent-length";
        format!("POST /v1/migration{how} {head}: {}\r\n\r\n{body}", body.len())
    };
    let cancel = "DELETE /v1/migration HTTP/1.1\r\nhost: vm\r\n\r\n";
    [
        [put("pause"), get("vm"), put("resume")].concat(),
        [put("pause"), migrate("?wait=true"), put("resume?force=true"), get("vm")].concat(),
        [migrate(""), get("migration"), cancel.into(), get("migration?wait=true"), migrate("")].concat(),
        [put("shutdown"), put("quit"), get("vm"), get("arrival")].concat(),
    ]
    .map(String::into_bytes)
    .into()
}

fn main() {
    write("message", messages().iter().map(Message::encode));
    write("control_link", control_links());
    write(
        "protocol",
        [
            heard(0, &[0, 2, 4, 5, 7]),
            heard(0, &[0, 2, 10, 5, 7]),
            heard(0, &[0, 2, 5, 13]),
            heard(0, &[0, 7]),
            heard(1, &[1, 3, 6, 8, 9]),
            heard(1, &[1, 12, 3, 6, 14]),
            heard(1, &[1, 3, 14]),
            heard(1, &[1, 3, 11, 6]),
        ],
    );
    write("opening", openings());
    write("tls_files", tls_files());
    write("patterns", patterns());
    write("tcp_frames", frames());
    write("rdma", rdma());
    write("description", descriptions());
    write("component", [b"WHIM\x01\x05\x00\x01\x04\x00\x00\x00\x00".to_vec(), b"WHIM\x00".to_vec()]);
    write("load", [vec![], change(0, b"WHIN"), change(200, &[0xff; 8]), change(5000, &[0; 40])]);
    write("virtio_rng", rng());
    write("virtio_console", console());
    write("virtio_block", block());
    write("virtio_net", net());
    write("ports", ports());
    write("boot_disk", boot_disks());
    write("config", configs());
    write("api", requests());
    write("api_guest", orders());
}
