//! NBD servers that lie, stall, drip, overflow or die at every step: a clear error each time, soon, and with
//! little memory.

#![allow(clippy::unwrap_used)] // A step that fails is a test that fails.

mod image_bench;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use image_bench::fake::{
    ACK, Bytes, EXTENDED, LONG, OPTION_REPLY, SHORT, SIZE, STRUCTURED, chunk, data, export_info, handshake,
    option_reply, serve, within,
};

use longhaul_agent::disk::image::nbd::decode::{self, HELLO_LEN, OPTION_REPLY_LEN};
use longhaul_agent::disk::image::nbd::{BASE_ALLOCATION, Connection, Headers, NbdError, replay};
use longhaul_common::extent::Extent;
use proptest::prelude::*;

/// The client's whole session with such a server: connect, read 64 KiB at 1 MiB, ask for 1 MiB's state.
fn session(words: Vec<u8>, limit: Duration) -> Result<(), NbdError> {
    let (stream, server) = serve(words);
    let begun = Instant::now();
    let result = (|| {
        let mut connection = Connection::from_stream(stream, "disk", &within(limit))?;
        let mut buf = vec![0; 65_536];
        connection.read(&mut buf, 1 << 20)?;
        connection.block_status(BASE_ALLOCATION, Extent::between(0, 1 << 20))?;
        Ok(())
    })();
    assert!(begun.elapsed() < LONG, "took {:?}", begun.elapsed());
    server.join().unwrap();
    result
}

fn honest(headers: Headers) -> Vec<Vec<u8>> {
    let mut words = handshake(headers);
    let piece = data(1 << 20, &[7; 32_768]);
    let hole = Bytes::default().u64((1 << 20) + 32_768).u32(32_768).0;
    words.push(
        [
            chunk(headers, false, 1, 1, &piece),
            chunk(headers, true, 2, 1, &hole),
        ]
        .concat(),
    );
    let status = match headers {
        Headers::Extended => (
            6,
            Bytes::default()
                .u32(5)
                .u32(2)
                .u64(4096)
                .u64(0)
                .u64(1 << 40)
                .u64(3)
                .0,
        ),
        _ => (5, Bytes::default().u32(5).u32(4096).u32(0).u32(1 << 30).u32(3).0),
    };
    words.push(chunk(headers, true, status.0, 2, &status.1));
    words
}

#[test]
fn an_honest_server_is_understood_in_both_kinds_of_headers() {
    for headers in [Headers::Structured, Headers::Extended] {
        session(honest(headers).concat(), LONG).unwrap();
        replay_check(headers);
    }
}

/// The fuzzing entry reaches the far end of a session.
fn replay_check(headers: Headers) {
    let mut words = handshake(headers);
    words.push(chunk(headers, true, 1, 1, &data(0, &[7; 65_536])));
    assert!(matches!(
        replay(&words.concat()),
        Err(NbdError::Closed {
            during: "a block status query"
        })
    ));
}

#[test]
fn a_server_without_structured_replies_is_read_plainly() {
    let mut words = handshake(Headers::Simple).concat();
    words.extend(Bytes::default().u32(0x67446698).u32(0).u64(1).raw(&[9; 65_536]).0);
    words.extend(Bytes::default().u32(0x67446698).u32(5).u64(2).0);
    let (stream, server) = serve(words);
    let mut connection = Connection::from_stream(stream, "disk", &within(LONG)).unwrap();
    assert_eq!(connection.export().headers, Headers::Simple);
    let mut buf = vec![0; 65_536];
    connection.read(&mut buf, 4096).unwrap();
    assert!(buf.iter().all(|byte| *byte == 9));
    let error = connection.read(&mut buf, 8192).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the NBD server could not read 65536 bytes at 8192: input/output error"
    );
    assert!(
        !connection.is_broken(),
        "an answer in good order does not end the session"
    );
    assert!(
        connection
            .block_status(BASE_ALLOCATION, Extent::between(0, 4096))
            .is_err()
    );
    drop(connection);
    server.join().unwrap();
}

#[test]
fn silence_and_hangups_at_every_step_end_in_time() {
    for headers in [Headers::Structured, Headers::Extended] {
        let words = honest(headers).concat();
        // Cut within and between messages: around the first bytes of each, and in the bulk.
        let mut cuts: Vec<usize> = (0..honest(headers).len())
            .map(|step| honest(headers)[..step].concat().len())
            .flat_map(|start| [start, start + 1, start + 17])
            .collect();
        cuts.extend([words.len() - 1, words.len() - 20, words.len() - 20_000]);
        std::thread::scope(|scope| {
            for cut in cuts {
                let silent = words[..cut].to_vec();
                scope.spawn(move || {
                    let error = session(silent, SHORT).unwrap_err();
                    assert!(matches!(error, NbdError::Timeout { .. }), "cut at {cut}: {error}");
                });
                let gone = words[..cut].to_vec();
                let error = replay(&gone).unwrap_err();
                assert!(
                    matches!(error, NbdError::Closed { .. } | NbdError::Protocol { .. }),
                    "cut at {cut}: {error}"
                );
            }
        });
    }
}

#[test]
fn a_dripping_server_meets_the_deadline() {
    let words = honest(Headers::Structured).concat();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        for byte in words {
            if theirs.write_all(&[byte]).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let begun = Instant::now();
    let error = Connection::from_stream(ours, "disk", &within(SHORT)).unwrap_err();
    assert!(begun.elapsed() < LONG / 4);
    assert_eq!(
        error.to_string(),
        "the NBD server did not finish the handshake within 0.3 s"
    );
    server.join().unwrap();
}

#[test]
fn a_server_that_takes_no_requests_meets_the_deadline() {
    // Nobody reads at the other end: the write fills the socket's buffer and stops.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs
        .write_all(&handshake(Headers::Structured).concat())
        .unwrap();
    let mut connection = Connection::from_stream(ours, "disk", &within(SHORT)).unwrap();
    let error = connection.write(&vec![1; 8 << 20], 0).unwrap_err();
    assert!(
        matches!(
            error,
            NbdError::Timeout {
                during: "a write",
                ..
            }
        ),
        "{error}"
    );
    assert!(matches!(connection.flush(), Err(NbdError::Broken)));
}

/// What the client says to a server that breaks the rules in one message of the handshake.
fn handshake_error(step: usize, words: Vec<u8>) -> String {
    let mut all = handshake(Headers::Structured);
    all[step] = words;
    session(all.concat(), LONG).unwrap_err().to_string()
}

#[test]
fn a_lying_handshake_is_named() {
    let oldstyle = [
        b"NBDMAGIC".as_slice(),
        &[0, 0, 0x42, 2, 0x81, 0x86, 0x12, 0x53, 0, 0],
    ]
    .concat();
    let huge = Bytes::default()
        .u64(OPTION_REPLY)
        .u32(11)
        .u32(ACK)
        .u32(u32::MAX)
        .0;
    let twice = {
        let context = Bytes::default().u32(5).raw(BASE_ALLOCATION.as_bytes()).0;
        option_reply(10, 4, &context).repeat(2)
    };
    let unasked = option_reply(10, 4, &Bytes::default().u32(5).raw(b"qemu:dirty-bitmap:x").0);
    for (step, words, wanted) in [
        (
            0,
            b"SSH-2.0-OpenSSH_9.2p1 Debian".to_vec(),
            "greeting is 0x5353482d322e302d where NBDMAGIC was expected",
        ),
        (0, oldstyle, "style is"),
        (
            0,
            Bytes::default().raw(b"NBDMAGICIHAVEOPT").u16(2).0,
            "the fixed newstyle bit was expected",
        ),
        (
            1,
            huge,
            "an option reply is 4294967295 bytes long where 16,384 fit",
        ),
        (1, option_reply(8, ACK, &[]), "option of the reply is 0x8"),
        (1, vec![0xff; 20], "option reply magic"),
        (3, [twice, option_reply(10, ACK, &[])].concat(), "granted twice"),
        (
            3,
            [unasked, option_reply(10, ACK, &[])].concat(),
            "granted that was not asked for",
        ),
        (
            3,
            option_reply(10, 4, &Bytes::default().u32(1).raw(BASE_ALLOCATION.as_bytes()).0).repeat(100),
            "too many times",
        ),
        (4, option_reply(7, ACK, &[]), "without its size"),
        (
            4,
            [option_reply(7, 3, &[0, 0, 1]), option_reply(7, ACK, &[])].concat(),
            "export information is cut short",
        ),
        (4, export_info(u64::MAX, 1), "larger than any disk can be"),
        (4, export_info(SIZE, 3), "smallest block is 0x3"),
        (4, export_info(SIZE, 1 << 20), "smallest block is 0x100000"),
        (4, export_info(SIZE + 1, 512), "no multiple of its smallest block"),
        (
            4,
            option_reply(7, (1 << 31) + 6, b"export 'disk'\nnot \x1b[31mpresent"),
            "refused the export \"disk\": it has no export of this name (export 'disk'not [31mpresent)",
        ),
    ] {
        let error = handshake_error(step, words);
        assert!(error.contains(wanted), "{error:?} where {wanted:?} was expected");
    }
}

/// What the client says to these bytes in answer to a read of 64 KiB at 1 MiB.
fn read_error(headers: Headers, words: &[Vec<u8>]) -> String {
    let mut all = handshake(headers);
    all.extend_from_slice(words);
    session(all.concat(), LONG).unwrap_err().to_string()
}

/// Runs the client against each reply, given as chunks: its error must contain the words beside it.
fn check_replies(headers: Headers, cases: &[(&[Vec<u8>], &str)]) {
    for (words, wanted) in cases {
        let error = read_error(headers, words);
        assert!(
            error.contains(wanted),
            "{headers:?}: {error:?} where {wanted:?} was expected"
        );
    }
}

const AT: u64 = 1 << 20;

#[test]
fn data_in_the_wrong_place_is_named() {
    let half = vec![7; 32_768];
    for headers in [Headers::Structured, Headers::Extended] {
        let reply = |done, kind, payload: &[u8]| chunk(headers, done, kind, 1, payload);
        let piece = |done, offset| reply(done, 1, &data(offset, &half));
        let hole = |len| reply(true, 2, &Bytes::default().u64(AT).u32(len).0);
        let scattered: Vec<_> = (0..2000)
            .map(|step| reply(false, 1, &data(AT + 2 * step, &[1])))
            .collect();
        let outside = "outside of the range";
        check_replies(
            headers,
            &[
                (&[piece(true, AT)], "answered only in part"),
                (&[reply(true, 0, &[])], "answered only in part"),
                (&[piece(true, AT - 1)], outside),
                (&[piece(true, AT + 32_769)], outside),
                (&[piece(true, u64::MAX - 3)], outside),
                (&[huge_data(headers)], outside),
                (&[hole(u32::MAX)], outside),
                (&[hole(0)], outside),
                (&[piece(false, AT), piece(true, AT + 9)], "sent twice"),
                (&scattered, "scattered into too many pieces"),
            ],
        );
    }
}

/// A chunk that announces all the data in the world.
fn huge_data(headers: Headers) -> Vec<u8> {
    let (magic, bytes) = match headers {
        Headers::Extended => (EXTENDED, Bytes::default().u64(AT).u64(u64::MAX)),
        _ => (STRUCTURED, Bytes::default().u32(u32::MAX)),
    };
    Bytes::default()
        .u32(magic)
        .u16(1)
        .u16(1)
        .u64(1)
        .raw(&bytes.0)
        .u64(AT)
        .0
}

#[test]
fn a_malformed_chunk_is_named() {
    for headers in [Headers::Structured, Headers::Extended] {
        let reply = |done, kind, payload: &[u8]| chunk(headers, done, kind, 1, payload);
        let error = |kind, payload: Bytes| reply(true, kind, &payload.0);
        let start = |code, len| Bytes::default().u32(code).u16(len);
        check_replies(
            headers,
            &[
                (&[vec![0; 32]], "reply magic is 0x0"),
                (
                    &[chunk(headers, true, 1, 77, &data(AT, &[7; 9]))],
                    "belongs to no request",
                ),
                (&[reply(false, 0, &[])], "an empty chunk is not the last one"),
                (&[reply(true, 2, &[0; 11])], "a hole chunk is 11 bytes long"),
                (&[reply(true, 1, &[0; 8])], "a data chunk is 8 bytes long"),
                (&[reply(true, 5, &[0; 12])], "does not fit its request"),
                (&[reply(true, 99, &[])], "chunk type is 0x63"),
                (&[error(0x8001, start(0, 0))], "error number 0"),
                (&[error(0x8001, start(5, 9))], "error chunk is cut short"),
                (
                    &[error(0x8001, start(28, 4).raw(b"full"))],
                    "no space left (full)",
                ),
                (&[error(0x8002, start(5, 0).u64(AT))], "input/output error"),
                (
                    &[reply(true, 0x8001, &[0; 5000])],
                    "an error chunk is 5000 bytes long",
                ),
            ],
        );
    }
}

#[test]
fn a_lying_status_is_named() {
    let headers = Headers::Structured;
    let read = chunk(headers, true, 1, 1, &data(1 << 20, &vec![7; 65_536]));
    let status = |done, payload: &[u8]| chunk(headers, done, 5, 2, payload);
    let told = Bytes::default().u32(5).u32(4096).u32(0).0;
    for (words, wanted) in [
        (
            vec![status(true, &Bytes::default().u32(6).u32(4096).u32(0).0)],
            "was not answered",
        ),
        (vec![status(false, &told), status(true, &told)], "answered twice"),
        (
            vec![status(true, &Bytes::default().u32(5).u32(0).u32(0).0)],
            "a run of 0 bytes",
        ),
        (
            vec![status(
                true,
                &Bytes::default().u32(5).u32(1 << 20).u32(0).u32(1).u32(0).0,
            )],
            "more state was told",
        ),
        (vec![status(true, &[0; 11])], "a status chunk is 11 bytes long"),
        (vec![status(true, &[0; 13])], "a list of runs is 9 bytes long"),
        (
            vec![
                Bytes::default()
                    .u32(STRUCTURED)
                    .u16(1)
                    .u16(5)
                    .u64(2)
                    .u32(u32::MAX)
                    .0,
            ],
            "is 4294967295 bytes long",
        ),
        (
            vec![chunk(
                headers,
                true,
                6,
                2,
                &Bytes::default().u32(5).u32(9).u64(1).u64(0).0,
            )],
            "another number of runs",
        ),
    ] {
        let mut all = vec![read.clone()];
        all.extend(words);
        let error = read_error(headers, &all);
        assert!(error.contains(wanted), "{error:?} where {wanted:?} was expected");
    }
}

#[test]
fn a_listener_that_never_accepts_meets_the_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let waiting: Vec<_> = (0..2)
        .map_while(|_| {
            let client = rustix::net::socket_with(
                rustix::net::AddressFamily::UNIX,
                rustix::net::SocketType::STREAM,
                rustix::net::SocketFlags::NONBLOCK,
                None,
            );
            let client = client.unwrap();
            rustix::net::connect(&client, &rustix::net::SocketAddrUnix::new(&socket).unwrap())
                .ok()
                .map(|()| client)
        })
        .collect();
    assert!(!waiting.is_empty());
    let begun = Instant::now();
    let error = Connection::connect_with(&socket, "disk", &within(SHORT)).unwrap_err();
    assert!(matches!(error.kind(), std::io::ErrorKind::TimedOut), "{error}");
    assert!(begun.elapsed() < LONG / 4);
}

proptest! {
    #[test]
    fn no_bytes_panic_the_decoder(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..200),
        with_magic in any::<Option<bool>>(),
    ) {
        if let Some(wide) = with_magic {
            let magic = if wide { EXTENDED } else { STRUCTURED };
            bytes.splice(0..0, magic.to_be_bytes());
        }
        let _ = bytes.first_chunk::<HELLO_LEN>().map(decode::hello);
        let _ = bytes.first_chunk::<OPTION_REPLY_LEN>().map(|bytes| decode::option_reply(bytes, 7));
        let _ = decode::info(&bytes);
        let _ = decode::meta_context(&bytes);
        let _ = decode::chunk(&bytes);
        for flag in [false, true] {
            let _ = decode::error(&bytes, flag);
            let _ = decode::block_status(&bytes, flag);
        }
    }

    #[test]
    fn one_flipped_byte_never_panics_a_session(
        extended in any::<bool>(),
        place in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let headers = if extended { Headers::Extended } else { Headers::Structured };
        let mut words = handshake(headers);
        words.push(chunk(headers, true, 1, 1, &data(0, &[7; 65_536])));
        let status = if extended { (6, Bytes::default().u32(5).u32(1).u64(1 << 20).u64(0).0) }
            else { (5, Bytes::default().u32(5).u32(1 << 20).u32(0).0) };
        words.push(chunk(headers, true, status.0, 2, &status.1));
        words.push(chunk(headers, true, 0, 3, &[]));
        let honest = words.concat();
        prop_assert!(replay(&honest).is_ok());
        let mut forged = honest;
        let place = place.index(forged.len());
        forged[place] = byte;
        let _ = replay(&forged);
    }

    #[test]
    fn block_status_holds_what_was_sent(
        runs in proptest::collection::vec((1u32.., any::<u32>()), 1..50),
        wide in any::<bool>(),
    ) {
        let mut payload = Bytes::default().u32(9);
        if wide {
            payload = payload.u32(runs.len() as u32);
        }
        for (len, flags) in &runs {
            payload = match wide {
                true => payload.u64((*len).into()).u64((*flags).into()),
                false => payload.u32(*len).u32(*flags),
            };
        }
        let status = decode::block_status(&payload.0, wide).unwrap();
        prop_assert_eq!(status.context, 9);
        prop_assert_eq!(status.runs, runs.iter().map(|run| (run.0.into(), run.1.into())).collect::<Vec<_>>());
    }
}
