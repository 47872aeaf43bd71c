//! Typed message lanes on a connection between two members.

mod common;

use std::time::Duration;

use common::*;
use paceline_transport::quic::{Connection, IoThread};
use paceline_transport::wire::{MESSAGE_LIMIT, WireError};
use paceline_transport::{Error, wire};
use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Talk {
    Number(u64),
    Text(String),
}

/// Runs `talk` with the two ends of a connection.
fn talk<F>(job: &str, talk: impl FnOnce(Connection, Connection) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let authority = authority(job);
    let io = IoThread::start().expect("a thread");
    let [here, there] = ["here", "there"].map(|member| bind(&io, &identity(&authority, member)));
    let meet = async move {
        let dialled = here.connect(there.local_addr(), "there").await.expect("a member gets in");
        let accepted = there.accept().await.expect("the endpoint is open");
        // The endpoints may go; connections live on.
        (dialled, accepted)
    };
    let (dialled, accepted) = io.handle().block_on(meet).expect("io runs");
    let talk = talk(dialled, accepted);
    let talk = async move { tokio::time::timeout(PATIENCE, talk).await };
    io.handle().block_on(talk).expect("io runs").expect("the talk ends");
}

#[test]
fn messages_arrive_in_order_both_ways_and_end_in_order() {
    talk("order", |dialled, accepted| async move {
        let (mut to, mut from) = dialled.open_messages().await.expect("open");
        let (mut back, mut got) = accepted.accept_messages().await.expect("open");
        back.send(&Talk::Text("the accepting side may speak first".to_owned())).await.expect("open");
        assert!(matches!(from.recv().await, Ok(Some(Talk::Text(_)))));
        for n in 0..1000 {
            to.send(&Talk::Number(n)).await.expect("open");
        }
        let (finished, ()) = tokio::join!(to.finish(), async {
            for n in 0..1000 {
                assert_eq!(got.recv().await, Ok(Some(Talk::Number(n))));
            }
            assert_eq!(got.recv::<Talk>().await, Ok(None));
            assert_eq!(got.recv::<Talk>().await, Ok(None));
        });
        assert_eq!(finished, Ok(()));
        drop(back);
        assert_eq!(from.recv::<Talk>().await, Ok(None));
    });
}

#[test]
fn a_message_over_the_limit_is_refused_where_it_is_sent() {
    talk("limit", |dialled, accepted| async move {
        let (mut to, _from) = dialled.open_messages().await.expect("open");
        let (_back, mut got) = accepted.accept_messages().await.expect("open");
        let text = |len: usize| Talk::Text("x".repeat(len));
        let refused = to.send(&text(MESSAGE_LIMIT)).await;
        assert!(matches!(refused, Err(Error::Wire(WireError::TooLong { .. }))), "{refused:?}");
        let overhead = wire::encode(&text(60_000)).expect("short").len() - 60_000;
        let longest = MESSAGE_LIMIT - overhead;
        to.send(&text(longest)).await.expect("the longest one");
        assert!(matches!(got.recv().await, Ok(Some(Talk::Text(text))) if text.len() == longest));
    });
}

#[test]
fn cancelled_receives_lose_nothing() {
    talk("cancel", |dialled, accepted| async move {
        let (mut to, _from) = dialled.open_messages().await.expect("open");
        let (_back, mut got) = accepted.accept_messages().await.expect("open");
        let texts = |n: u64| Talk::Text(n.to_string().repeat(8000));
        let sender = async {
            for n in 100..300 {
                to.send(&texts(n)).await.expect("open");
                tokio::task::yield_now().await;
            }
            to.finish().await.expect("all is read");
        };
        let receiver = async {
            let mut next = 100;
            while next < 300 {
                // A receive that is not ready at once is dropped half-way and begun again.
                let mut recv = Box::pin(got.recv::<Talk>());
                let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(recv.as_mut().poll(cx))).await;
                drop(recv);
                match polled {
                    std::task::Poll::Ready(message) => {
                        assert_eq!(message, Ok(Some(texts(next))));
                        next += 1;
                    }
                    std::task::Poll::Pending => tokio::task::yield_now().await,
                }
            }
        };
        tokio::join!(sender, receiver);
    });
}

#[test]
fn a_close_with_a_reason_is_seen_with_the_reason() {
    talk("close", |dialled, accepted| async move {
        let (mut to, mut from) = dialled.open_messages().await.expect("open");
        dialled.close("the job is over");
        let error = to.send(&Talk::Number(1)).await.expect_err("closed");
        assert!(matches!(error, Error::Refused { .. }), "{error}");
        assert!(from.recv::<Talk>().await.is_err());
        let reason = accepted.closed().await;
        assert!(reason.contains("the job is over"), "{reason}");
        assert!(accepted.accept_messages().await.is_err());
    });
}

#[test]
fn a_message_of_another_type_is_an_error() {
    talk("type", |dialled, accepted| async move {
        let (mut to, _from) = dialled.open_messages().await.expect("open");
        let (_back, mut got) = accepted.accept_messages().await.expect("open");
        to.send(&"not a Talk at all").await.expect("open");
        let error = got.recv::<Talk>().await.expect_err("another type");
        assert!(matches!(error, Error::Wire(WireError::Malformed { .. })), "{error}");
        assert!(got.recv::<Talk>().await.is_err(), "a broken lane stays broken");
    });
}

#[test]
fn accept_and_connect_work_on_a_foreign_executor() {
    let authority = authority("foreign");
    let io = IoThread::start().expect("a thread");
    let [here, there] = ["here", "there"].map(|member| bind(&io, &identity(&authority, member)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let meet = async { tokio::join!(here.connect(there.local_addr(), "there"), there.accept()) };
        let (dialled, accepted) = tokio::time::timeout(PATIENCE, meet).await.expect("both in time");
        let (mut to, _from) = dialled.expect("in").open_messages().await.expect("open");
        let (_back, mut got) = accepted.expect("open").accept_messages().await.expect("open");
        to.send(&Talk::Number(1)).await.expect("open");
        assert_eq!(got.recv().await, Ok(Some(Talk::Number(1))));
        // Cancelling an accept loses no connection.
        let cancelled = tokio::time::timeout(Duration::from_millis(1), there.accept()).await;
        assert!(cancelled.is_err());
        let _again = here.connect(there.local_addr(), "there").await.expect("in");
        let accepted = tokio::time::timeout(PATIENCE, there.accept()).await.expect("in time");
        assert_eq!(accepted.expect("open").member(), "here");
    });
}
