//! The way to launcher 0, whose address may change while it is looked for.

use std::net::SocketAddr;
use std::sync::Arc;

use super::resolver::{NoAddress, Resolver};
use crate::endpoint::Endpoint;

/// Knows where launcher 0 is to be dialled. Clones share a resolver.
#[derive(Debug, Clone)]
pub struct Guide {
    endpoint: Endpoint,
    resolver: Arc<Resolver>,
}

impl Guide {
    /// To the launcher at this endpoint.
    pub fn to(endpoint: &Endpoint) -> Self {
        Self { endpoint: endpoint.clone(), resolver: Arc::default() }
    }

    /// The address to dial at an attempt, counted from 0, as `host:port`: each of the name's present addresses in turn.
    ///
    /// # Errors
    /// The name has no address at present.
    pub async fn address(&self, attempt: usize) -> Result<String, NoAddress> {
        let addresses = self.resolver.addresses(&self.endpoint.host).await?;
        let ip = addresses[attempt % addresses.len()];
        Ok(SocketAddr::new(ip, self.endpoint.port).to_string())
    }
}
