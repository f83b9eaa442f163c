use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;

use super::*;

const BODY: &[u8] = b"0123456789abcdef";
const SHA: &str = "9f9f5111f7b27a781f1f1ddde5ebc2dd2b796bfc7365c9c28b548e564176929f";

/// Starts a server that sends one entry of `answers` per connection; its thread returns the `Range` header of each
/// request.
fn serve(answers: Vec<Vec<u8>>) -> (String, JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/x.whl", listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        let mut ranges = Vec::new();
        for answer in answers {
            let (stream, _) = listener.accept().unwrap();
            ranges.push(range_of(&stream));
            (&stream).write_all(&answer).unwrap();
        }
        ranges
    });
    (url, thread)
}

fn range_of(stream: &TcpStream) -> String {
    let mut range = String::new();
    for line in BufReader::new(stream).lines() {
        let line = line.unwrap().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("range: ") {
            range = value.to_string();
        }
        if line.is_empty() {
            break;
        }
    }
    range
}

fn full_response(sent: usize) -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", BODY.len());
    [head.as_bytes(), &BODY[..sent]].concat()
}

fn partial_response(from: usize) -> Vec<u8> {
    let (end, left) = (BODY.len() - 1, BODY.len() - from);
    let head = format!(
        "HTTP/1.1 206 Partial\r\nConnection: close\r\nContent-Length: {left}\r\nContent-Range: bytes {from}-{end}/{}\r\n\r\n",
        BODY.len()
    );
    [head.as_bytes(), &BODY[from..]].concat()
}

fn error_response(status: u16) -> Vec<u8> {
    format!("HTTP/1.1 {status} No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").into_bytes()
}

/// Runs one download with this content of the partial file and these answers of the server. Returns its result, the
/// file's content afterwards, and the requested ranges.
fn run(kept: &[u8], answers: Vec<Vec<u8>>) -> (Result<()>, Vec<u8>, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let part = folder.path().join("x.part");
    if !kept.is_empty() {
        fs::write(&part, kept).unwrap();
    }
    let (url, server) = serve(answers);
    let offer = IndexFile { filename: "x.whl".into(), url, sha256: Some(SHA.into()), authorization: None };
    let agent = Agent::config_builder().proxy(None).build().new_agent();
    let result = download(&agent, &offer, &part);
    (result, fs::read(&part).unwrap_or_default(), server.join().unwrap())
}

#[test]
fn a_cut_download_is_continued() {
    let (result, bytes, ranges) = run(b"", vec![full_response(6), partial_response(6)]);
    result.unwrap();
    assert_eq!(bytes, BODY);
    assert_eq!(ranges, ["", "bytes=6-"]);
}

#[test]
fn what_an_earlier_run_left_is_used() {
    let (result, bytes, ranges) = run(&BODY[..10], vec![partial_response(10)]);
    result.unwrap();
    assert_eq!((bytes.as_slice(), ranges.as_slice()), (BODY, &["bytes=10-".to_string()][..]));
    // The file was complete already.
    let (result, bytes, _) = run(BODY, vec![error_response(416)]);
    result.unwrap();
    assert_eq!(bytes, BODY);
}

#[test]
fn a_server_without_ranges_starts_over() {
    let (result, bytes, _) = run(&BODY[..10], vec![full_response(BODY.len())]);
    result.unwrap();
    assert_eq!(bytes, BODY);
}

#[test]
fn a_wrong_part_is_thrown_away_once() {
    let (result, bytes, ranges) = run(b"wrong", vec![partial_response(5), full_response(BODY.len())]);
    result.unwrap();
    assert_eq!((bytes.as_slice(), ranges.as_slice()), (BODY, &["bytes=5-".to_string(), String::new()][..]));

    let mut wrong = full_response(BODY.len());
    let last = wrong.len() - 1;
    wrong[last] = b'!';
    let (result, bytes, _) = run(b"", vec![wrong]);
    assert!(format!("{:#}", result.unwrap_err()).contains("SHA-256"));
    assert!(bytes.is_empty());
}

#[test]
fn busy_servers_are_asked_again_and_refusals_are_not() {
    let (result, bytes, _) = run(b"", vec![error_response(503), full_response(BODY.len())]);
    result.unwrap();
    assert_eq!(bytes, BODY);
    let (result, _, ranges) = run(b"", vec![error_response(403)]);
    assert!(format!("{:#}", result.unwrap_err()).contains("403"));
    assert_eq!(ranges.len(), 1);
}
