//! What the two ends of a connection say to each other, written by hand, all integers little-endian.
//!
//! ```text
//! receiver → sender, for each receive that is posted: an offer
//!   byte 0      4        8         16
//!        "PNO1" count    number    count × { tag i32, 0 u32, size u64 }
//! sender → receiver, for each send: a head, and then the bytes
//!   byte 0      4        8         16      24
//!        "PNM1" slot     offer     size    …
//! ```
//! A sender sends only what was offered, so that nothing arrives that there is no room for, and a message that is waited
//! for never stands behind one that is not. The sizes and numbers of a peer are checked against what was offered before
//! anything is done with them; nothing here allocates.

/// Receives that are posted together at most: NCCL's own limit for grouped receives over InfiniBand.
pub const GROUP_LIMIT: usize = 8;
/// The size of an offer without its slots, in bytes.
pub const OFFER_BYTES: usize = 16;
/// The size of a slot of an offer, in bytes.
pub const SLOT_BYTES: usize = 16;
/// The size of a head, in bytes.
pub const HEAD_BYTES: usize = 24;

const OFFER: [u8; 4] = *b"PNO1";
const HEAD: [u8; 4] = *b"PNM1";

/// Room that was offered for one message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Which messages fit.
    pub tag: i32,
    /// How many bytes there is room for.
    pub size: u64,
}

/// What precedes the bytes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The offer that it fills.
    pub offer: u64,
    /// Which of its slots.
    pub slot: u32,
    /// How many bytes follow.
    pub size: u64,
}

/// The bytes of an offer, behind `into`.
pub fn write_offer(into: &mut Vec<u8>, number: u64, slots: impl ExactSizeIterator<Item = Slot>) {
    into.extend_from_slice(&OFFER);
    into.extend_from_slice(&(slots.len() as u32).to_le_bytes());
    into.extend_from_slice(&number.to_le_bytes());
    for Slot { tag, size } in slots {
        into.extend_from_slice(&tag.to_le_bytes());
        into.extend_from_slice(&[0; 4]);
        into.extend_from_slice(&size.to_le_bytes());
    }
}

/// Reads the beginning of an offer: its number, and how many slots follow.
///
/// # Errors
/// In words, what is wrong with it.
pub fn read_offer(bytes: &[u8; OFFER_BYTES]) -> Result<(u64, usize), String> {
    if bytes[..4] != OFFER {
        return Err(format!("{:02x?} does not begin an offer", &bytes[..4]));
    }
    match u32::from_le_bytes(array(&bytes[4..8])) as usize {
        count @ 1..=GROUP_LIMIT => Ok((u64::from_le_bytes(array(&bytes[8..16])), count)),
        count => Err(format!("an offer of {count} slots")),
    }
}

/// Reads a slot of an offer.
///
/// # Errors
/// In words, what is wrong with it.
pub fn read_slot(bytes: &[u8; SLOT_BYTES]) -> Result<Slot, String> {
    if bytes[4..8] != [0; 4] {
        return Err("reserved bytes of a slot are not zero".to_owned());
    }
    Ok(Slot { tag: i32::from_le_bytes(array(&bytes[..4])), size: u64::from_le_bytes(array(&bytes[8..])) })
}

impl Head {
    /// Its bytes.
    pub fn to_bytes(self) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        bytes[..4].copy_from_slice(&HEAD);
        bytes[4..8].copy_from_slice(&self.slot.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.offer.to_le_bytes());
        bytes[16..].copy_from_slice(&self.size.to_le_bytes());
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// In words, what is wrong with it.
    pub fn from_bytes(bytes: &[u8; HEAD_BYTES]) -> Result<Self, String> {
        if bytes[..4] != HEAD {
            return Err(format!("{:02x?} does not begin a message", &bytes[..4]));
        }
        Ok(Self {
            slot: u32::from_le_bytes(array(&bytes[4..8])),
            offer: u64::from_le_bytes(array(&bytes[8..16])),
            size: u64::from_le_bytes(array(&bytes[16..])),
        })
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the caller slices N bytes of a fixed layout")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_offer_has_the_documented_bytes() {
        let mut bytes = vec![9];
        write_offer(&mut bytes, 0x0102, [Slot { tag: -1, size: 5 }].into_iter());
        let golden = [b'P', b'N', b'O', b'1', 1, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0];
        assert_eq!(bytes[1..17], golden);
        assert_eq!(bytes[17..], [255, 255, 255, 255, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn offers_of_no_slot_or_too_many_are_refused() {
        for (count, good) in [(0, false), (1, true), (8, true), (9, false), (u32::MAX, false)] {
            let mut bytes = [0; OFFER_BYTES];
            bytes[..4].copy_from_slice(&OFFER);
            bytes[4..8].copy_from_slice(&count.to_le_bytes());
            assert_eq!(read_offer(&bytes).is_ok(), good, "{count}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(number: u64, slots in prop::collection::vec((any::<i32>(), any::<u64>()), 1..=8)) {
            let slots: Vec<Slot> = slots.into_iter().map(|(tag, size)| Slot { tag, size }).collect();
            let mut bytes = Vec::new();
            write_offer(&mut bytes, number, slots.iter().copied());
            let (begin, rest) = bytes.split_first_chunk().expect("its beginning");
            prop_assert_eq!(read_offer(begin), Ok((number, slots.len())));
            let read: Vec<Slot> =
                rest.chunks(SLOT_BYTES).map(|slot| read_slot(slot.try_into().expect("whole")).expect("good")).collect();
            prop_assert_eq!(read, slots);
            let head = Head { offer: number, slot: 3, size: 4 };
            prop_assert_eq!(Head::from_bytes(&head.to_bytes()), Ok(head));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: [u8; HEAD_BYTES]) {
            if let Ok(head) = Head::from_bytes(&bytes) {
                prop_assert_eq!(head.to_bytes(), bytes);
            }
            let _ = read_offer(bytes.first_chunk().expect("long enough"));
            let _ = read_slot(bytes.first_chunk().expect("long enough"));
        }
    }
}
