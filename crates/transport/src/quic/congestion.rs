//! Cubic, made to let the last packet of a connection through.
//!
//! quinn-proto 0.11.19 counts a close frame against the congestion window while data is pending, and a
//! closing connection reads no acknowledgements that could open the window again: a rank that dies in
//! the middle of a transfer would be noticed after seconds instead of at once (quinn issue 2785, fixed
//! by 2787 after 0.11.19). So the window counts as open from the moment we close; all that is sent
//! then is that frame. This file goes when a release has the fix; the test
//! `an_end_with_a_full_congestion_window_is_told_all_the_same` will tell.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory, CubicConfig};

/// Above u32::MAX quinn-proto does not pace either.
const OPEN_WINDOW: u64 = 1 << 33;

/// Makes the controllers of an endpoint's connections.
#[derive(Clone, Debug)]
pub(super) struct CubicUntilClose {
    cubic: Arc<CubicConfig>,
}

/// One connection's controller.
struct UntilClose {
    cubic: Box<dyn Controller>,
    closing: Arc<AtomicBool>,
}

impl CubicUntilClose {
    pub(super) fn new(initial_window_bytes: u64) -> Self {
        let mut cubic = CubicConfig::default();
        cubic.initial_window(initial_window_bytes);
        Self { cubic: Arc::new(cubic) }
    }
}

/// Opens the window of a connection that is about to be closed.
pub(super) fn open(connection: &quinn_proto::Connection) {
    if let Ok(controller) = connection.congestion_state().clone_box().into_any().downcast::<UntilClose>() {
        controller.closing.store(true, Ordering::Relaxed);
    }
}

impl ControllerFactory for CubicUntilClose {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(UntilClose { cubic: self.cubic.clone().build(now, current_mtu), closing: Arc::default() })
    }
}

impl Controller for UntilClose {
    fn window(&self) -> u64 {
        if self.closing.load(Ordering::Relaxed) {
            return OPEN_WINDOW;
        }
        self.cubic.window()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { cubic: self.cubic.clone_box(), closing: self.closing.clone() })
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }

    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_acked: Option<u64>) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_acked);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost_bytes: u64) {
        self.cubic.on_congestion_event(now, sent, persistent, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.cubic.on_mtu_update(new_mtu);
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }
}
