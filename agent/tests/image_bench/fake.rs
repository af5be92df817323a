//! An NBD server made of canned words: each message of the protocol as bytes, honest or not.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use longhaul_agent::disk::image::nbd::{BASE_ALLOCATION, ConnectOptions, Headers, Timeouts};

pub(crate) const SIZE: u64 = 1 << 30;
pub(crate) const OPTION_REPLY: u64 = 0x3e889045565a9;
pub(crate) const STRUCTURED: u32 = 0x668e33ef;
pub(crate) const EXTENDED: u32 = 0x6e8a278c;
pub(crate) const ACK: u32 = 1;
pub(crate) const UNSUPPORTED: u32 = (1 << 31) + 1;
/// For exchanges that must meet their deadline.
pub(crate) const SHORT: Duration = Duration::from_millis(300);
/// For exchanges that end by themselves, on a busy machine too.
pub(crate) const LONG: Duration = Duration::from_secs(20);

pub(crate) fn within(limit: Duration) -> ConnectOptions {
    let timeouts = Timeouts {
        handshake: limit,
        transfer: limit,
        settle: limit,
    };
    ConnectOptions {
        timeouts,
        ..ConnectOptions::default()
    }
}

/// Big-endian fields, one after the other.
#[derive(Clone, Default)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl Bytes {
    pub(crate) fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

pub(crate) fn hello() -> Vec<u8> {
    Bytes::default().raw(b"NBDMAGICIHAVEOPT").u16(3).0
}

pub(crate) fn option_reply(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    Bytes::default()
        .u64(OPTION_REPLY)
        .u32(option)
        .u32(kind)
        .u32(payload.len() as u32)
        .raw(payload)
        .0
}

pub(crate) fn export_info(size: u64, min: u32) -> Vec<u8> {
    let export = Bytes::default().u16(0).u64(size).u16(0b101_0110_1101).0;
    let blocks = Bytes::default().u16(3).u32(min).u32(4096).u32(32 << 20).0;
    [
        option_reply(7, 3, &export),
        option_reply(7, 3, &blocks),
        option_reply(7, ACK, &[]),
    ]
    .concat()
}

/// What an honest server says from its greeting to the end of the handshake.
pub(crate) fn handshake(headers: Headers) -> Vec<Vec<u8>> {
    let context = Bytes::default().u32(5).raw(BASE_ALLOCATION.as_bytes()).0;
    let contexts = [option_reply(10, 4, &context), option_reply(10, ACK, &[])].concat();
    match headers {
        Headers::Extended => vec![
            hello(),
            option_reply(11, ACK, &[]),
            contexts,
            export_info(SIZE, 1),
        ],
        Headers::Structured => vec![
            hello(),
            option_reply(11, UNSUPPORTED, b"unknown"),
            option_reply(8, ACK, &[]),
            contexts,
            export_info(SIZE, 1),
        ],
        Headers::Simple => {
            vec![
                hello(),
                option_reply(11, UNSUPPORTED, &[]),
                option_reply(8, UNSUPPORTED, &[]),
                export_info(SIZE, 1),
            ]
        }
    }
}

pub(crate) fn chunk(headers: Headers, done: bool, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let len = payload.len();
    let flags = u16::from(done);
    match headers {
        Headers::Extended => {
            Bytes::default()
                .u32(EXTENDED)
                .u16(flags)
                .u16(kind)
                .u64(cookie)
                .u64(0)
                .u64(len as u64)
                .raw(payload)
                .0
        }
        _ => {
            Bytes::default()
                .u32(STRUCTURED)
                .u16(flags)
                .u16(kind)
                .u64(cookie)
                .u32(len as u32)
                .raw(payload)
                .0
        }
    }
}

pub(crate) fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    Bytes::default().u64(offset).raw(bytes).0
}

/// A server that says these bytes, listens to whatever comes, and keeps the connection open until the client
/// leaves.
pub(crate) fn serve(words: Vec<u8>) -> (UnixStream, JoinHandle<Vec<u8>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut speaker = theirs.try_clone().unwrap();
        let talk = std::thread::spawn(move || {
            let _ = speaker.write_all(&words);
        });
        let mut heard = Vec::new();
        let _ = (&theirs).read_to_end(&mut heard);
        talk.join().unwrap();
        heard
    });
    (ours, thread)
}
