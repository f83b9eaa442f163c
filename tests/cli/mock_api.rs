//! A scripted API on this machine: every request gets the reply that the script chooses.

use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

/// A request that the mock has received.
#[derive(Debug, Clone)]
pub(crate) struct MockRequest {
    /// Number of the request, from 0.
    pub number: usize,
    /// First line and headers.
    pub head: String,
    pub body: Value,
    pub at: Instant,
}

impl MockRequest {
    /// Returns the text of the last message.
    pub(crate) fn prompt(&self) -> &str {
        self.body["messages"].as_array().and_then(|m| m.last()?["content"].as_str()).unwrap_or_default()
    }

    /// Returns a number that depends on the body alone.
    pub(crate) fn digest(&self) -> u64 {
        self.body.to_string().bytes().fold(7, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    }
}

/// The reaction of the mock to a request.
pub(crate) enum MockReply {
    /// A response of status 200.
    Body(String),
    /// Another response.
    Status { code: u16, headers: Vec<(&'static str, String)>, body: String },
    /// The connection is closed in the middle of the response.
    Cut,
    /// Nothing comes.
    Stall,
}

impl MockReply {
    pub(crate) fn status(code: u16, body: &str) -> Self {
        Self::Status { code, headers: Vec::new(), body: body.to_owned() }
    }

    /// Returns the answer of a chat. Its time depends on the text alone.
    pub(crate) fn answer(text: &str) -> Self {
        Self::Body(answer_body(text).to_string())
    }
}

/// Returns a response with an answer of 20 tokens to a prompt of 100.
pub(crate) fn answer_body(text: &str) -> Value {
    json!({
        "created": 1_700_000_000 + text.len(),
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    })
}

/// The server; it runs until the test ends.
pub(crate) struct MockApi {
    pub url: String,
    requests: Arc<Mutex<Vec<MockRequest>>>,
}

impl MockApi {
    pub(crate) fn start(script: impl Fn(&MockRequest) -> MockReply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, script) = (Arc::clone(&requests), Arc::new(script));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, script) = (Arc::clone(&seen), Arc::clone(&script));
                thread::spawn(move || serve(stream, &seen, &*script));
            }
        });
        Self { url, requests }
    }

    pub(crate) fn requests(&self) -> Vec<MockRequest> {
        self.requests.lock().unwrap().clone()
    }

    pub(crate) fn count(&self) -> usize {
        self.requests.lock().unwrap().len()
    }
}

/// Answers one request; a client that has gone away is no failure of the test.
fn serve(stream: TcpStream, seen: &Mutex<Vec<MockRequest>>, script: &dyn Fn(&MockRequest) -> MockReply) {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if let Some((_, value)) = line.to_lowercase().split_once("content-length:").filter(|(name, _)| name.is_empty())
        {
            length = value.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
        head += &line;
    }
    let mut body = vec![0; length];
    if reader.read_exact(&mut body).is_err() {
        return;
    }
    let body = serde_json::from_slice(&body).unwrap();
    let request = {
        let mut seen = seen.lock().unwrap();
        let request = MockRequest { number: seen.len(), head, body, at: Instant::now() };
        seen.push(request.clone());
        request
    };
    let stream = reader.get_mut();
    let _ = match script(&request) {
        MockReply::Body(body) => respond(stream, 200, &[], &body),
        MockReply::Status { code, headers, body } => respond(stream, code, &headers, &body),
        MockReply::Cut => stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"choices\": [{"),
        MockReply::Stall => {
            thread::sleep(Duration::from_secs(30));
            Ok(())
        }
    };
}

fn respond(stream: &mut TcpStream, code: u16, headers: &[(&str, String)], body: &str) -> std::io::Result<()> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    write!(stream, "HTTP/1.1 {code} X\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}")
}
