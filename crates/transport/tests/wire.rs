//! What the control plane promises about bytes from a peer: no panic, no allocation beyond the limit,
//! and a format that another library could take over.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use paceline_transport::wire::{self, DECODE_MEMORY_LIMIT, MESSAGE_LIMIT, WireError};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

/// Counts what the current thread has allocated and not freed, at its highest.
struct Counting;

thread_local! {
    static IN_USE: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that ends has no counters any more, and nobody asks.
    let _ = IN_USE.try_with(|in_use| {
        in_use.set(in_use.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(in_use.get())));
    });
}

// SAFETY: every call goes to the system's allocator with the arguments unchanged; counting neither
// allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises about `layout` are those that System asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the pointer came from `alloc` above, so from System, with the same layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most that `work` had allocated at a time, in bytes.
fn peak(work: impl FnOnce()) -> usize {
    let before = IN_USE.get();
    MOST.set(before);
    work();
    (MOST.get() - before) as usize
}

/// The shapes that control messages have: strings, lists, nested lists, addresses, enums.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, wincode::SchemaWrite, wincode::SchemaRead)]
enum Message {
    Roster { epoch: u64, members: Vec<(String, u32)> },
    Lists(Vec<Vec<u16>>),
    Bytes(Vec<u8>),
    Optional(Option<Box<Message>>),
    Reason(String),
    Nothing,
}

fn message() -> impl Strategy<Value = Message> {
    let leaf = prop_oneof![
        (any::<u64>(), prop::collection::vec((".{0,20}", any::<u32>()), 0..20))
            .prop_map(|(epoch, members)| Message::Roster { epoch, members }),
        prop::collection::vec(prop::collection::vec(any::<u16>(), 0..20), 0..20).prop_map(Message::Lists),
        prop::collection::vec(any::<u8>(), 0..200).prop_map(Message::Bytes),
        ".{0,50}".prop_map(Message::Reason),
        Just(Message::Nothing),
    ];
    leaf.prop_recursive(3, 8, 1, |inner| {
        prop::option::of(inner.prop_map(Box::new)).prop_map(Message::Optional)
    })
}

/// What may be allocated on top of the decoded values: the error's text, and a vector's growth by
/// doubling before the decoder's own limit stops it.
const SLACK: usize = DECODE_MEMORY_LIMIT + 4096;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn arbitrary_bytes_never_panic_and_never_allocate_beyond_the_limit(bytes: Vec<u8>) {
        let most = peak(|| drop(wire::decode::<Message>(&bytes)));
        prop_assert!(most <= DECODE_MEMORY_LIMIT + SLACK, "{most} bytes");
    }

    #[test]
    fn a_damaged_message_never_panics_and_never_allocates_beyond_the_limit(
        message in message(), at: prop::sample::Index, value: u8, cut: prop::sample::Index,
    ) {
        let mut bytes = wire::encode(&message).expect("short messages fit");
        let index = at.index(bytes.len());
        bytes[index] = value;
        bytes.truncate(cut.index(bytes.len()) + 1);
        let most = peak(|| drop(wire::decode::<Message>(&bytes)));
        prop_assert!(most <= DECODE_MEMORY_LIMIT + SLACK, "{most} bytes");
    }

    #[test]
    fn any_message_survives_and_wincode_writes_and_reads_the_same_bytes(message in message()) {
        let bytes = wire::encode(&message).expect("short messages fit");
        prop_assert_eq!(wire::decode::<Message>(&bytes), Ok(message.clone()));
        let config = wincode::config::Configuration::default().with_varint_encoding();
        prop_assert_eq!(&wincode::config::serialize(&message, config).expect("it encodes"), &bytes);
        let theirs: Message = wincode::config::deserialize(&bytes, config).expect("it decodes");
        prop_assert_eq!(theirs, message);
    }
}

#[test]
fn a_hostile_length_is_an_error_and_not_an_allocation() {
    // A list of 2^40 elements, announced in 10 bytes: without a limit this aborts the process.
    let mut bytes = vec![2, 253];
    bytes.extend_from_slice(&(1u64 << 40).to_le_bytes());
    let mut result = Ok(Message::Nothing);
    let most = peak(|| result = wire::decode::<Message>(&bytes));
    assert!(matches!(result, Err(WireError::Malformed { .. })), "{result:?}");
    assert!(most <= SLACK, "{most} bytes");
}

#[test]
fn what_is_left_over_or_too_long_is_refused() {
    let mut bytes = wire::encode(&Message::Nothing).expect("it fits");
    bytes.push(0);
    let error = wire::decode::<Message>(&bytes).expect_err("a byte too many").to_string();
    assert!(error.contains("left over"), "{error}");
    let long = Message::Bytes(vec![0; MESSAGE_LIMIT]);
    assert!(matches!(wire::encode(&long), Err(WireError::TooLong { .. })));
    assert!(matches!(wire::decode::<Message>(&vec![0; MESSAGE_LIMIT + 1]), Err(WireError::TooLong { .. })));
}

#[test]
fn the_format_is_the_one_of_the_first_release() {
    let message = Message::Roster { epoch: 300, members: vec![("a-0".to_owned(), 7)] };
    assert_eq!(wire::encode(&message), Ok(vec![0, 251, 44, 1, 1, 3, b'a', b'-', b'0', 7]));
}
