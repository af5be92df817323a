//! Who may have a link: every good case, every refusal, and the sentence that each end prints.

mod link_support;

use link_support::{Authority, Wish};
use link_support::{TRUST_DOMAIN, agent, call, gateway, listen, pair, quick, refusal};
use longhaul_common::link::{ALPN_AGENT, ALPN_PEER, Identity, LinkError, Refusal, Role};

#[tokio::test]
async fn a_good_link_carries_streams_both_ways() {
    let (_authority, _listener, near, far) = pair(&quick()).await;
    assert_eq!(near.peer(), &gateway("munich"));
    assert_eq!(far.peer(), &gateway("berlin"));
    assert_eq!(near.alpn(), ALPN_PEER);
    let mut one_way = near.open_uni().await.unwrap();
    one_way.write_all(b"batch").await.unwrap();
    one_way.finish().unwrap();
    assert_eq!(
        far.accept_uni().await.unwrap().read_to_end(100).await.unwrap(),
        b"batch"
    );
    let (mut ask, mut answer) = far.open_bi().await.unwrap();
    ask.write_all(b"?").await.unwrap();
    let (mut reply, mut question) = near.accept_bi().await.unwrap();
    let mut byte = [0];
    question.read_exact(&mut byte).await.unwrap();
    reply.write_all(b"!").await.unwrap();
    answer.read_exact(&mut byte).await.unwrap();
    assert_eq!(&byte, b"!");
    near.close(0x123, "job cancelled");
    let seen = far.closed().await;
    assert_eq!(
        seen.to_string(),
        "the peer closed the link: job cancelled (code 291)"
    );
    assert_eq!(
        near.closed().await.to_string(),
        "the link was closed here: job cancelled"
    );
}
