//! Two hosts and what joins them: on the machine two namespaces with a switch between them, in the lab the
//! two ends of its cable.

use crate::command::must;
use crate::lab;
use crate::namespace::Namespace;
use crate::proxy::Way;
use crate::scene::Host;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;

/// Where moves happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On this machine, between namespaces. Its kernel may lack netem and RDMA.
    Machine,
    /// In the lab, which has both.
    Lab,
}

/// A queueing discipline that lets nothing pass: the bucket never holds a whole frame.
pub const NOTHING: &str = "tbf rate 8bit burst 1 limit 1";

/// Two hosts that are joined.
pub struct Cable {
    /// Each host's, and the switch's.
    namespaces: Option<[Namespace; 3]>,
}

impl Cable {
    /// Lays one.
    ///
    /// # Errors
    /// Without the right to make namespaces.
    ///
    /// # Panics
    /// Where interfaces cannot be made.
    pub fn lay(place: Place) -> io::Result<Self> {
        if place == Place::Lab {
            let cable = Cable { namespaces: None };
            // There is only one. A move that failed may have left it as it was then.
            cable.mend(Way::Up);
            cable.mend(Way::Down);
            return Ok(cable);
        }
        let hosts = [Namespace::new()?, Namespace::new()?, Namespace::new()?];
        let [a, b, switch] = &hosts;
        switch.within(|| {
            must("ip link add switch type bridge");
            for (port, host) in [("port-a", a), ("port-b", b)] {
                must(&format!("ip link add {port} type veth peer name eth0 netns {}", host.path()));
                must(&format!("ip link set {port} master switch"));
                must(&format!("ip link set {port} up"));
            }
            must("ip link set switch up");
        });
        for (host, own, other) in [(a, 1, 2), (b, 2, 1)] {
            host.within(|| {
                must(&format!("ip link set eth0 address 02:00:00:00:00:0{own}"));
                must(&format!("ip address add 10.78.0.{own}/24 dev eth0"));
                must("ip link set lo up");
                must("ip link set eth0 up");
                // Otherwise the kernel says for seconds after a partition that there is no such host.
                let other = format!("10.78.0.{other} lladdr 02:00:00:00:00:0{other}");
                must(&format!("ip neighbour add {other} dev eth0 nud permanent"));
            });
        }
        Ok(Cable { namespaces: Some(hosts) })
    }

    /// Does something at a host.
    pub fn at<T: Send>(&self, host: Host, what: impl FnOnce() -> T + Send) -> T {
        match &self.namespaces {
            Some(namespaces) => namespaces[host as usize].within(what),
            None => what(),
        }
    }

    /// Where receivers of host B listen.
    pub fn listen(&self) -> SocketAddr {
        let address = match self.namespaces {
            Some(_) => IpAddr::V4(Ipv4Addr::new(10, 78, 0, 2)),
            None => lab::peer(),
        };
        (address, 0).into()
    }

    /// Has what goes this way be treated so by the kernel.
    pub fn treat(&self, way: Way, how: &str) {
        self.switch(|| must(&format!("tc qdisc replace dev {} root {how}", self.interface(way))));
    }

    /// Treats what goes this way as at first.
    pub fn mend(&self, way: Way) {
        let delete = ["qdisc", "delete", "dev", self.interface(way), "root"];
        // There may be nothing to delete.
        let _ = self.switch(|| Command::new("tc").args(delete).output());
    }

    /// The interface that everything leaves by that goes this way.
    fn interface(&self, way: Way) -> &'static str {
        match (&self.namespaces, way) {
            (Some(_), Way::Up) => "port-b",
            (Some(_), Way::Down) => "port-a",
            (None, Way::Up) => "lab0",
            (None, Way::Down) => "lab1",
        }
    }

    fn switch<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        match &self.namespaces {
            Some([_, _, switch]) => switch.within(what),
            None => what(),
        }
    }
}
