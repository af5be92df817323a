//! What a connection to a peer begins with: agreeing on the windows that payloads refer to.
//!
//! Owns saying hello, for every tenant's window at once, and hearing the answers. Leaves what they mean to `reduction`. Promises to end in
//! time, whatever the peer does: without an answer, payloads refer to nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use longhaul_common::link::Link;
use longhaul_common::wire::frame;
use longhaul_common::wire::session::PeerTask;
use longhaul_common::wire::window::WindowAnswer;
use tokio::task::JoinSet;

use crate::reduction::Pair;

/// The peer's answer about a window must be there by then.
const AGREE_TIME: Duration = Duration::from_secs(5);
/// Each try begins a later epoch than the peer has seen: two are enough, unless connections do it at once.
const AGREE_TRIES: usize = 4;

/// Agrees with the peer at `site` on the windows, by tenant.
pub(super) async fn agree(link: &Link, site: &str, pairs: &BTreeMap<String, Arc<Pair>>) {
    let mut asked = JoinSet::new();
    for (tenant, pair) in pairs {
        let (site, tenant) = (site.to_owned(), tenant.clone());
        let asking = agree_on(link.clone(), tenant.clone(), Arc::clone(pair));
        asked.spawn(async move {
            match tokio::time::timeout(AGREE_TIME, asking).await {
                Ok(Some(answer)) => {
                    tracing::debug!(peer = %site, tenant, epoch = answer.epoch, "the window is agreed on")
                }
                _ if tenant.is_empty() => {
                    tracing::debug!(peer = %site, "the peer has no window for this gateway")
                }
                // Its jobs go on, and cost more than they need to.
                _ => tracing::warn!(
                    peer = %site,
                    tenant,
                    "no window for this tenant is agreed on with the peer; is it in reduction.tenants there?"
                ),
            }
        });
    }
    while asked.join_next().await.is_some() {}
}

/// Says hello until the peer agrees.
async fn agree_on(link: Link, tenant: String, pair: Arc<Pair>) -> Option<WindowAnswer> {
    for _ in 0..AGREE_TRIES {
        let hello = pair.hello();
        let (mut send, mut recv) = link.open_bi().await.ok()?;
        let tenant = tenant.clone();
        let task = PeerTask::Window { tenant, hello };
        frame::write(&mut send, &task).await.ok()?;
        let _ = send.finish();
        let answer = frame::read::<WindowAnswer>(&mut recv).await.ok()??;
        if pair.answered(hello, answer) {
            return Some(answer);
        }
    }
    None
}
