//! What a worker says, which nobody has checked yet: a body that decodes takes no memory
//! beside itself, and its message can be sent on with the same meaning.
#![no_main]

use conclave_ipc::frame::{decode, encode};
use conclave_ipc::limits::REPLY_BYTES_MAX;
use conclave_ipc::message::Reply;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    let mut message = None;
    let taken = allocation_counter::measure(|| message = decode::<Reply<'_>>(body).ok());
    assert_eq!(taken.count_total, 0, "decoding has taken {} bytes", taken.bytes_total);
    let Some(message) = message else { return };
    assert!(decode::<Reply<'_>>(&[body, &[0]].concat()).is_err(), "a byte too many is read");

    let mut frame = Vec::new();
    encode(&message, REPLY_BYTES_MAX, &mut frame).expect("what came in a frame fits one");
    let again = frame.get(4..).expect("a frame has a header");
    // The shortest form of a number is not the only one that is read.
    assert!(again.len() <= body.len());
    assert_eq!(decode::<Reply<'_>>(again).expect("what is sent is read"), message);
});
