//! The same certificates for HTTP, for whoever makes such connections.

use rustls::{ClientConfig, ServerConfig};
use std::sync::Arc;

/// What is spoken through TLS.
const PROTOCOL: &[u8] = b"http/1.1";

/// How both ends of an HTTP connection show who they are. The server asks each client for a certificate. Whom
/// of those that the authorities vouch for it then answers is its own business: [`Pattern`](super::Pattern).
#[derive(Clone, Debug)]
pub struct Https {
    /// The end that connects.
    pub client: Arc<ClientConfig>,
    /// The end that accepts.
    pub server: Arc<ServerConfig>,
}

impl Https {
    /// As a migration's ends do, but for another purpose: neither takes the other's connections.
    pub(super) fn like(client: &ClientConfig, server: &ServerConfig) -> Self {
        let (mut client, mut server) = (client.clone(), server.clone());
        client.alpn_protocols = vec![PROTOCOL.into()];
        client.enable_secret_extraction = false;
        server.alpn_protocols = vec![PROTOCOL.into()];
        server.enable_secret_extraction = false;
        Https { client: Arc::new(client), server: Arc::new(server) }
    }

    /// Whether both have been made of the same files.
    #[must_use]
    pub fn is(&self, other: &Https) -> bool {
        Arc::ptr_eq(&self.server, &other.server)
    }
}
